"""The objective of FVAE-LoRA, as pure functions of one layer's tensors.

Every term is kept per token: the mask of tokens that count and the mean over them are applied once, outside the
(possibly recomputed) layer, by `fvae_dist.adapter.side_loss`. All terms are linear in tokens, so that
mean_t(neg_elbo_t) is the layer's negative ELBO.

Shapes: ... any leading dimensions, one row a token; D in-features, R latent dimension.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fvae_dist.adapter.config import FVAELoraConfig
from fvae_dist.kernels.spec import Coefficients

LOG_2PI = math.log(2 * math.pi)


class TokenTerms(NamedTuple):
    """The terms of one layer, one value a token (shape ...), fp32 (float64 for float64 inputs).

    Sums over D or R for nll and the KLs, means over R for the squares. `kl_z2` is there for the ablations only.
    """

    nll: Tensor
    kl_z1: Tensor
    z1_sq: Tensor
    z2_sq: Tensor
    kl_z2: Tensor | None = None


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics are computed: fp32, or float64 for float64 inputs."""
    return dtype if dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in `wide_dtype`."""
    return tensor.to(wide_dtype(tensor.dtype))


def diag_gaussian_nll(x: Tensor, xhat: Tensor, scale_D: Tensor) -> Tensor:
    """Negative log-likelihood of x under N(xhat, diag(scale)^2), in nats.

    Summed over D, one value a token. Computed in fp32 whatever the input dtype.

    Args:
        x: input of the adapted linear, (..., D); gradient flows into it.
        xhat: decoder mean, (..., D).
        scale_D: standard deviation per feature, (D,), > 0.

    Returns:
        (...), fp32.

    Source: arXiv 2510.19640, reconstruction term.
    """
    scale_D = wide(scale_D)
    standardised = (wide(x) - wide(xhat)) / scale_D
    return 0.5 * standardised.square().sum(-1) + (scale_D.log() + 0.5 * LOG_2PI).sum()


def kl_to_prior(mean: Tensor, logvar: Tensor, prior_mean: float = 0.0, prior_std: float = 1.0) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(prior_mean, prior_std^2 I)) in nats, summed over R: (..., R) -> (...).

    `logvar` as sampled from, that is clamped.
    """
    ratio = logvar - 2 * math.log(prior_std)
    return 0.5 * ((mean - prior_mean).square() / prior_std**2 + ratio.exp() - 1 - ratio).sum(-1)


def token_terms(
    nll: Tensor,
    z1: Tensor,
    z2: Tensor,
    q1: tuple[Tensor, Tensor],
    q2: tuple[Tensor, Tensor],
    config: FVAELoraConfig,
) -> TokenTerms:
    """The terms that `config.objective` needs; z1, z2, and each of q1, q2 = (mean, log-variance) are (..., R)."""
    kl_z2 = None
    if config.objective in ("vae2lat", "beta_vae2lat"):
        kl_z2 = kl_to_prior(*q2, config.z2_prior_mean, config.z2_prior_std)
    return TokenTerms(
        nll=nll,
        kl_z1=kl_to_prior(*q1),
        z1_sq=z1.square().mean(-1),
        z2_sq=(z2 - config.z2_prior_mean).square().mean(-1),
        kl_z2=kl_z2,
    )


def factorization(z1_sq: Tensor, z2_sq: Tensor, config: FVAELoraConfig) -> Tensor:
    """Gamma = log p2(z2) - log p1(z1), summed over R, from the means over R of the squares: (...) -> (...), nats.

    p1 = N(0, I), p2 = N(z2_prior_mean, z2_prior_std^2 I); source: arXiv 2510.19640, factorising term.
    """
    std = config.z2_prior_std
    return config.r * (0.5 * z1_sq - 0.5 * z2_sq / std**2 - math.log(std))


def coefficients(config: FVAELoraConfig) -> Coefficients:
    """`neg_elbo` as a linear function: kernels that compute the terms combine them by these."""
    c = config
    if c.objective == "vae2lat":
        return Coefficients(1.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    if c.objective == "beta_vae2lat":
        return Coefficients(c.reconstruction_weight, c.kl_weight, c.kl_weight, 0.0, 0.0, 0.0)
    if c.objective == "paper":
        per_square = 0.5 * c.factorization_weight * c.r
        constant = c.factorization_weight * c.r * math.log(c.z2_prior_std)
        weights = (-per_square, per_square / c.z2_prior_std**2, constant)
        return Coefficients(c.reconstruction_weight, c.kl_weight, 0.0, *weights)
    return Coefficients(c.reconstruction_weight, c.kl_weight, 0.0, -c.z1_weight, c.z2_weight, 0.0)


def neg_elbo(terms: TokenTerms, config: FVAELoraConfig) -> Tensor:
    """Combine the terms into the negative ELBO per token, (...).

    official: reconstruction_weight nll + z2_weight z2_sq - z1_weight z1_sq + kl_weight kl_z1
        (the form of the reference code, from which the published tables came).
    paper: reconstruction_weight nll + kl_weight kl_z1 - factorization_weight Gamma.
    vae2lat: nll + kl_z1 + kl_z2; beta_vae2lat: reconstruction_weight nll + kl_weight (kl_z1 + kl_z2).
    """
    if terms.kl_z2 is not None and config.objective == "vae2lat":
        return terms.nll + terms.kl_z1 + terms.kl_z2
    if terms.kl_z2 is not None and config.objective == "beta_vae2lat":
        return config.reconstruction_weight * terms.nll + config.kl_weight * (terms.kl_z1 + terms.kl_z2)
    fit = config.reconstruction_weight * terms.nll + config.kl_weight * terms.kl_z1
    if config.objective == "paper":
        return fit - config.factorization_weight * factorization(terms.z1_sq, terms.z2_sq, config)
    return fit + config.z2_weight * terms.z2_sq - config.z1_weight * terms.z1_sq
