"""What can be seen of a layer while it trains: statistics per token, added up over tokens, read as terms.

    layer --token_statistics--> side_loss.Collector --sums--> (+ micro-batches, ranks) --terms_from_sums--> terms

Nothing here has a gradient, and nothing here runs unless a collector asks for it. A layer only hands over what it has;
the sums of several layers are computed together, because a GPU runs one such sum in less time than it is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fvae_dist.adapter.config import LOGVAR_LIMIT, FVAELoraConfig
from fvae_dist.adapter.objective import TokenTerms, factorization, wide

ACTIVE_VARIANCE = 0.01
# Tokens of a forward on which the reconstruction's R^2 is measured: it needs passes over all of D.
R2_TOKENS = 256
_GOLDEN_RATIO = 0.6180339887498949
_GIVEN = ("nll", "kl_z1", "z1_sq", "z2_sq", "neg_elbo")
PER_TOKEN = (*_GIVEN, "wasserstein", "clamped")


class TokenStatistics(NamedTuple):
    """Of one layer's forward, detached, fp32 (float64): terms per token (...); means and clamped log-variances of q1
    and q2 (..., R); for the tokens of `r2_sample` x and its reconstruction (S, D), as the layer computes, or instead of
    the latter its squared error (S,): whichever a layer does not have is empty."""

    nll: Tensor
    kl_z1: Tensor
    z1_sq: Tensor
    z2_sq: Tensor
    neg_elbo: Tensor
    mean1: Tensor
    logvar1: Tensor
    mean2: Tensor
    logvar2: Tensor
    x: Tensor
    xhat: Tensor
    squared_error: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


@torch.no_grad()
def token_statistics(
    terms: TokenTerms,
    neg_elbo: Tensor,
    q1: tuple[Tensor, Tensor],
    q2: tuple[Tensor, Tensor],
    x: Tensor,
    hidden: Tensor,
    reconstruct: Callable[[Tensor], Tensor],
) -> TokenStatistics:
    """q1, q2: mean and clamped log-variance, (..., R); x: the input, (..., D); hidden: the decoder's units (..., H), of
    which `reconstruct` makes xhat."""
    given = (terms.nll, terms.kl_z1, terms.z1_sq, terms.z2_sq, neg_elbo, *q1, *q2)
    sample = r2_sample(neg_elbo.numel(), x.device)
    x, hidden = (part.detach().reshape(-1, part.shape[-1])[sample] for part in (x, hidden))
    return TokenStatistics(*(tensor.detach() for tensor in (*given, x, reconstruct(hidden), x.new_empty(0))))


@lru_cache(maxsize=8)
def r2_sample(num_tokens: int, device: torch.device) -> Tensor | slice:
    """Which of a forward's tokens R^2 is measured on: spread evenly, but in step with no period of the data."""
    if num_tokens <= R2_TOKENS:
        return slice(None)
    spread = (torch.arange(R2_TOKENS, dtype=torch.float64, device=device) * _GOLDEN_RATIO) % 1
    return (spread * num_tokens).long()


@torch.no_grad()
def sums_over_tokens(statistics: Sequence[TokenStatistics], mask: Tensor) -> dict[str, Tensor]:
    """Sums over the tokens that count, each (L, ...) for L layers of equal shapes; additive over forwards,
    micro-batches and ranks; fp32 and float64.

    For R^2 the input's scatter is kept as scatter within each forward plus that of the forwards' means: a difference
    of large sums would lose it in channels whose mean is far from 0.

    Args:
        statistics: of L layers (or forwards) whose tensors have the same shapes.
        mask: 1 for tokens that count, as many as each forward has.
    """
    weights = mask.flatten()
    count = len(statistics)
    given = torch.stack([getattr(of, key).flatten() for of in statistics for key in _GIVEN])
    given = given.view(count, len(_GIVEN), -1)
    # (4, L, T, R): mean1, logvar1, mean2, logvar2
    posterior = torch.stack([tensor.flatten(0, -2) for i in range(4) for tensor in (of[5 + i] for of in statistics)])
    mean1, logvar1, mean2, logvar2 = posterior.unflatten(0, (4, count))
    spread = (0.5 * logvar1).exp() - (0.5 * logvar2).exp()
    wasserstein = ((mean1 - mean2).square() + spread.square()).sum(-1).sqrt()
    clamped = (posterior.unflatten(0, (2, 2, count))[:, 1].abs() >= LOGVAR_LIMIT).to(given.dtype).mean((0, -1))
    per_token = torch.cat([given, torch.stack([wasserstein, clamped], dim=1)], dim=1)
    sums = dict(zip(PER_TOKEN, (per_token * weights).sum(-1).unbind(1), strict=True))
    for key, mean in (("mean1", mean1), ("mean2", mean2)):
        # A variance as a difference of sums: in fp32 a mean far from 0 would drown it.
        mean = mean.double()
        sums[key] = weights.double() @ mean
        sums[f"{key}_sq"] = weights.double() @ mean.square()
    weights = weights[r2_sample(len(weights), weights.device)]
    measured = weights.sum().double()
    x, xhat, squared_error = (
        wide(torch.stack([getattr(of, key) for of in statistics])) for key in ("x", "xhat", "squared_error")
    )
    if xhat.numel():
        squared_error = (x - xhat).square().sum(-1)
    mean = (weights @ x).double() / measured.clamp(min=1)
    within = (x - mean.to(x.dtype)[:, None]).square().sum(-1)
    sums["r2_tokens"] = measured.expand(count)
    sums["x_error"] = (squared_error @ weights).double()
    sums["x_within"] = (within @ weights).double()
    sums["x_mean"] = measured * mean
    sums["x_mean_sq"] = measured * mean.square().sum(-1)
    return sums


def terms_from_sums(sums: dict[str, Tensor], configs: list[FVAELoraConfig]) -> dict[str, Tensor]:
    """Per-layer terms, each (L,), from sums (L, ...) over tokens; `configs`: of the L layers, in the same order.

    nll, kl_z1, z1_sq, z2_sq, neg_elbo: means over tokens, as in the objective.
    gamma: the paper's factorising term, summed over R.
    wasserstein: mean over tokens of the 2-Wasserstein distance between q1 and q2.
    active_z1, active_z2: dimensions whose mean varies over tokens by more than 0.01 (Burda et al., arXiv 1509.00519).
    r2: 1 - squared error of the reconstruction / scatter of the input, over up to 256 tokens of each forward; 0: the
        decoder does no better than the input's mean, or the input does not vary.
    clamped: share of both encoders' log-variances that stand at their limit of +-20.
    """
    num_tokens = sums["num_tokens"].clamp(min=1)
    terms = {key: sums[key] / num_tokens for key in PER_TOKEN}
    for latent in ("1", "2"):
        mean = sums[f"mean{latent}"] / num_tokens[:, None]
        variance = sums[f"mean{latent}_sq"] / num_tokens[:, None] - mean.square()
        terms[f"active_z{latent}"] = (variance > ACTIVE_VARIANCE).sum(-1).to(num_tokens.dtype)
    between = sums["x_mean_sq"] - sums["x_mean"].square().sum(-1) / sums["r2_tokens"].clamp(min=1)
    scatter = sums["x_within"] + between
    is_varied = scatter > torch.finfo(torch.float32).tiny
    terms["r2"] = torch.where(is_varied, 1 - sums["x_error"] / scatter, 0.0).to(num_tokens.dtype)
    gamma = [
        factorization(z1_sq, z2_sq, config)
        for z1_sq, z2_sq, config in zip(terms["z1_sq"], terms["z2_sq"], configs, strict=True)
    ]
    terms["gamma"] = torch.stack(gamma)
    return terms
