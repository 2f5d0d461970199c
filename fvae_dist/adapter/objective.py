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

LOG_2PI = math.log(2 * math.pi)
LOGVAR_LIMIT = 20.0


class TokenTerms(NamedTuple):
    """The terms of one layer, one value a token (shape ...), fp32 (float64 for float64 inputs)."""

    nll: Tensor
    kl_z1: Tensor
    z1_sq: Tensor
    z2_sq: Tensor


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in fp32, or as it is where it is wider: the dtype in which statistics are computed."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


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


def kl_to_standard_normal(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, I)) in nats, summed over R: (..., R) -> (...). `logvar` as sampled from."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1)


def token_terms(
    nll: Tensor, z1: Tensor, z2: Tensor, mean1: Tensor, logvar1: Tensor, z2_prior_mean: float
) -> TokenTerms:
    """Collect the four terms of the reference's objective; squares are averaged over R."""
    return TokenTerms(
        nll=nll,
        kl_z1=kl_to_standard_normal(mean1, logvar1),
        z1_sq=z1.square().mean(-1),
        z2_sq=(z2 - z2_prior_mean).square().mean(-1),
    )


def neg_elbo(terms: TokenTerms, config: FVAELoraConfig) -> Tensor:
    """Combine the terms into the negative ELBO per token, (...).

    official: reconstruction_weight nll + z2_weight z2_sq - z1_weight z1_sq + kl_weight kl_z1
    (the form of the reference code, from which the published tables came).
    """
    return (
        config.reconstruction_weight * terms.nll
        + config.z2_weight * terms.z2_sq
        - config.z1_weight * terms.z1_sq
        + config.kl_weight * terms.kl_z1
    )
