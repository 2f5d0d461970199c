"""The decoder's likelihood of many tokens: its products by the matrix library, `PRODUCT_ROWS` tokens at a time.

The kernels that compute the reconstruction tile by tile (`vae_triton`) write nothing of it, but may not use Hopper's
warp-group products. Here cuBLAS does, at the price of writing and reading the reconstruction; docs/performance.md says
what is expected of that, and `launching.PRODUCT_TOKENS` from which length on it is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fvae_dist.kernels.launching import Plan, cdiv
from fvae_dist.kernels.products import wide_product
from fvae_dist.kernels.spec import Spec


class Decoders(NamedTuple):
    """What the likelihood of G adapters reads.

    Attributes:
        x: the rows (T, D).
        parameters: fp32 (G, ...), see `vae_triton`.
        weights: the output weights (G, D, W), in x's dtype.
        last: of each adapter the decoder's last hidden units (T, W), in x's dtype.
    """

    x: Tensor
    parameters: Tensor
    weights: Tensor
    last: list[Tensor]


def decoders_of(plan: Plan, spec: Spec, x: Tensor, parameters: Tensor, packed: Tensor, units: Tensor) -> Decoders:
    """The parts of a forward's state."""
    num_tokens, features, number = *x.shape, plan.adapters
    begin = number * plan.parts * 2 * spec.encoder_hidden * features
    weights = packed[begin : number * plan.num_packed].view(number, features, spec.decoder_hidden)
    decoded = units[number * num_tokens * spec.r :].view(number, spec.decoder_layers, num_tokens, spec.decoder_hidden)
    return Decoders(x, parameters, weights, list(decoded[:, -1].unbind(0)))


def likelihood(
    plan: Plan, stream: int | None, decoders: Decoders, terms: Tensor, c_nll: float, with_statistics: bool
) -> Tensor:
    """The loss (G, T), with the rest of it from terms; with statistics (2, G, T), the nll and the squared error."""
    number, num_tokens = len(decoders.last), len(decoders.x)
    launch = plan.residual_with_statistics if with_statistics else plan.residual
    out = terms.new_empty((2, number, num_tokens) if with_statistics else (number, num_tokens))
    for of, first, xhat in _reconstructions(plan, decoders):
        tensors = (decoders.x, xhat, decoders.parameters, terms, out)
        launch(stream, *tensors, *_sizes(plan, decoders), of, first, len(xhat), c_nll)
    return out


def backward_likelihood(
    plan: Plan,
    stream: int | None,
    decoders: Decoders,
    d_loss: Tensor,
    d_x: Tensor | None,
    of_features: Tensor,
    c_nll: float,
) -> Tensor:
    """Gradient of the decoders' last hidden units, (1, G, T, W), fp32.

    Writes to `d_x` (T, D) what the likelihood gives to it, and to `of_features` (G, W * D + 2 * D) the gradients of
    output weight (D, W), bias and scale.
    """
    number, (num_tokens, features) = len(decoders.last), decoders.x.shape
    width, wide = decoders.weights.shape[-1], decoders.parameters
    d_last = wide.new_empty((1, number, num_tokens, width))
    sums = wide.new_empty((number, cdiv(num_tokens, plan.product_rows), plan.residual_chunks, 2 * features))
    launch = plan.backward_residual if d_x is None else plan.backward_residual_to_x
    for of, first, xhat in _reconstructions(plan, decoders):
        count, row = len(xhat), (of * sums.shape[1] + first // plan.product_rows) * plan.residual_chunks
        tensors = (decoders.x, xhat, decoders.parameters, d_loss, decoders.x if d_x is None else d_x, sums)
        launch(stream, *tensors, *_sizes(plan, decoders), of, first, count, plan.residual_chunk, row, c_nll)
        rows = slice(first, first + count)
        wide_product(xhat, decoders.weights[of], d_last[0, of, rows])
        d_weight = of_features[of, : features * width].view(features, width)
        if first == 0:
            wide_product(xhat.t(), decoders.last[of][rows], d_weight)
        else:
            d_weight += wide_product(xhat.t(), decoders.last[of][rows], torch.empty_like(d_weight))
    torch.sum(sums.flatten(1, 2), 1, out=of_features[:, features * width :])
    return d_last


def _reconstructions(plan: Plan, decoders: Decoders) -> Iterator[tuple[int, int, Tensor]]:
    """Adapter, first token and the products (rows, D) of its last hidden units, all in one buffer, one after the
    other."""
    num_tokens, features = decoders.x.shape
    buffer = decoders.x.new_empty((min(plan.product_rows, num_tokens), features))
    for of, last in enumerate(decoders.last):
        for first in range(0, num_tokens, plan.product_rows):
            rows = last[first : first + plan.product_rows]
            yield of, first, torch.mm(rows, decoders.weights[of].t(), out=buffer[: len(rows)])


def _sizes(plan: Plan, decoders: Decoders) -> tuple[int, int, int]:
    return (*decoders.x.shape, plan.stride)
