"""The backward of the decoder's likelihood of many tokens: its products by the matrix library, `PRODUCT_ROWS` tokens
at a time.

The kernels that compute the reconstruction tile by tile (`vae_triton`) write nothing of it, but may not use Hopper's
warp-group products. Here cuBLAS does, at the price of writing and reading the reconstruction (docs/performance.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fvae_dist.kernels.launching import Plan
from fvae_dist.kernels.products import wide_product
from fvae_dist.kernels.spec import Spec


def backward_likelihood(
    plan: Plan,
    spec: Spec,
    stream: int | None,
    decoder: tuple[Tensor, Tensor, Tensor, Tensor],
    d_loss: Tensor,
    d_x: Tensor | None,
    of_features: Tensor,
) -> Tensor:
    """Gradient of the decoders' last hidden units, (1, G, T, W), fp32.

    Writes to `d_x` (T, D) what the likelihoods give to it, and to `of_features` (G, W * D + 2 * D) the gradients of
    output weight (D, W), bias and scale. `decoder`: x (T, D), parameters, packed and units of a forward's state.
    """
    x, parameters, packed, units = decoder
    (num_tokens, features), number, width = x.shape, plan.adapters, spec.decoder_hidden
    begin = number * plan.parts * 2 * spec.encoder_hidden * features
    weights = packed[begin : number * plan.num_packed].view(number, features, width)
    last = units[number * num_tokens * spec.r :].view(number, spec.decoder_layers, num_tokens, width)[:, -1]
    size = plan.product_rows
    d_last = parameters.new_empty((1, number, num_tokens, width))
    sums = parameters.new_empty((plan.residual_chunks, number, 2 * features))
    xhat = x.new_empty((number, size, features))
    launch = plan.backward_residual if d_x is None else plan.backward_residual_to_x
    for first in range(0, num_tokens, size):
        rows = slice(first, min(first + size, num_tokens))
        count, of_x = rows.stop - first, x[rows]
        for of in range(number):
            torch.mm(last[of, rows], weights[of].t(), out=xhat[of, :count])
        tensors = (of_x, xhat, parameters, d_loss, of_x if d_x is None else d_x[rows], sums)
        sizes = (num_tokens, features, plan.stride, first, count, plan.residual_chunk, size)
        launch(stream, *tensors, *sizes, spec.coefficients.nll)
        for of in range(number):
            d_xhat = xhat[of, :count]
            wide_product(d_xhat, weights[of], d_last[0, of, rows])
            d_weight = of_features[of, : features * width].view(features, width)
            if first == 0:
                wide_product(d_xhat.t(), last[of, rows], d_weight)
            else:
                d_weight += wide_product(d_xhat.t(), last[of, rows], torch.empty_like(d_weight))
    torch.sum(sums, 0, out=of_features[:, features * width :])
    return d_last
