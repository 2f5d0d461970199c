"""The training forward and backward of one layer's VAE in a few kernels, as an autograd function.

Which layers it takes says `problem`; what it computes is `fvae_dist.adapter.vae.FactorizedVAE.forward`.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fvae_dist.kernels.launching import (
    arguments_of,
    cdiv,
    kernels,
    on,
    over_features,
    processors,
    tiles_of,
    token_chunks,
)
from fvae_dist.kernels.spec import Spec

DTYPES = (torch.bfloat16, torch.float32)
WIDEST = 128
DEEPEST_DECODER = 3


class Parameters(NamedTuple):
    """Of one VAE: both encoders' trunk weights (H, D); the decoder's output weight (D, W), bias (D), scale (D); and the
    small ones in the order of `vae_triton`."""

    trunk1: Tensor
    trunk2: Tensor
    out_weight: Tensor
    out_bias: Tensor
    scale: Tensor
    small: tuple[Tensor, ...]


class Outputs(NamedTuple):
    """z1 (T, R) and loss (T,), differentiable; terms (5, T): loss, nll, kl_z1, z1_sq, z2_sq; posterior (T, 4, R): mean
    and log-variance before its clamp, of both encoders; with statistics the squared error (T,) of x's reconstruction.
    All fp32."""

    z1: Tensor
    loss: Tensor
    terms: Tensor
    posterior: Tensor
    squared_error: Tensor


@lru_cache
def problem(spec: Spec, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot be used for inputs of this kind; None if they can."""
    if not importlib.util.find_spec("triton"):
        return "Triton is not installed"
    if device.type != "cuda" and not kernels().INTERPRETED:
        return f"Triton's kernels need a GPU, the input is on {device.type}"
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return "the kernels need an NVIDIA GPU of compute capability 8.0 or newer"
    if dtype not in DTYPES:
        return f"the kernels compute in bf16 and fp32, not in {str(dtype).removeprefix('torch.')}"
    for name in ("r", "encoder_hidden", "decoder_hidden"):
        if getattr(spec, name) > WIDEST:
            return f"{name} {getattr(spec, name)} is above {WIDEST}"
    if not 1 <= spec.decoder_layers <= DEEPEST_DECODER:
        return f"decoder_layers {spec.decoder_layers} is not in 1 .. {DEEPEST_DECODER}"
    return None


def fused_vae(
    x: Tensor, keys: Tensor, salt: int, parameters: Parameters, spec: Spec, with_statistics: bool = False
) -> Outputs:
    """Sample both latents and decode, for tokens x (T, D), bf16 or fp32; `keys` (T,) int64 and `salt`: their noise."""
    large = (parameters.trunk1, parameters.trunk2, parameters.out_weight, parameters.out_bias, parameters.scale)
    return Outputs(*_FusedVAE.apply(spec, with_statistics, salt, x, keys, *large, *parameters.small))


class _FusedVAE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, spec, with_statistics, salt, x, keys, trunk1, trunk2, out_weight, out_bias, scale, *small):  # type: ignore[override]
        x, keys = x.contiguous(), keys.contiguous()
        (num_tokens, features), c = x.shape, spec.coefficients
        wide = partial(x.new_empty, dtype=torch.float32)
        z1, z2, terms = wide((num_tokens, spec.r)), wide((num_tokens, spec.r)), wide((5, num_tokens))
        encoded, posterior = wide((num_tokens, 2 * spec.encoder_hidden)), wide((num_tokens, 4, spec.r))
        decoded = x.new_empty((spec.decoder_layers, num_tokens, spec.decoder_hidden))
        flat = torch.cat([parameter.reshape(-1) for parameter in small])
        with on(x):
            trunks, narrow_weight = _pack(spec, x, trunk1, trunk2, out_weight)
            tiles, grid, chunk = over_features("encode", x, spec)
            products = wide((grid[1], *encoded.shape))
            kernels().encode_kernel[grid](
                x,
                trunks,
                products,
                num_tokens,
                features,
                chunk,
                PARTS=len(trunks),
                **arguments_of("encode", spec, x.dtype),
                **tiles,
            )
            tiles = tiles_of("latents", x)
            kernels().latents_kernel[(cdiv(num_tokens, tiles["BT"]),)](
                products, keys, flat, z1, z2, terms, encoded, posterior, decoded, num_tokens, salt, *c[1:],
                spec.prior_mean, spec.prior_std, CHUNKS=grid[1], **arguments_of("latents", spec, x.dtype), **tiles,
            )  # fmt: skip
            tiles, grid, chunk = over_features("likelihood", x)
            nll = wide((grid[1], 2, num_tokens) if with_statistics else (grid[1], num_tokens))
            kernels().likelihood_kernel[grid](
                x, narrow_weight, out_bias, scale, decoded[-1], nll, num_tokens, features, chunk, STATS=with_statistics,
                **arguments_of("likelihood", spec, x.dtype), **tiles,
            )  # fmt: skip
        nll = _total(nll)
        squared_error = x.new_empty(0)
        if with_statistics:
            nll, squared_error = nll.unbind(0)
        loss = torch.add(terms[0], nll, alpha=c.nll)
        if with_statistics:
            terms[0], terms[1] = loss, nll
        ctx.spec, ctx.shapes = spec, [parameter.shape for parameter in small]
        ctx.save_for_backward(x, trunks, flat, narrow_weight, out_bias, scale, z1, z2, encoded, posterior, decoded)
        ctx.mark_non_differentiable(terms, posterior, squared_error)
        return z1, loss, terms, posterior, squared_error

    @staticmethod
    @once_differentiable
    def backward(ctx, d_z1, d_loss, *_):  # type: ignore[override]
        x, trunks, flat, narrow_weight, out_bias, scale, z1, z2, encoded, posterior, decoded = ctx.saved_tensors
        spec, (num_tokens, features) = ctx.spec, x.shape
        hidden, width, depth = spec.encoder_hidden, spec.decoder_hidden, spec.decoder_layers
        c, wide = spec.coefficients, partial(x.new_empty, dtype=torch.float32)
        d_z1, d_loss = d_z1.contiguous(), d_loss.contiguous()
        d_decoded, d_encoded = torch.empty_like(decoded), x.new_empty((num_tokens, 2 * hidden))
        output, sizes = (narrow_weight, out_bias, scale, decoded[-1]), (num_tokens, features)
        d_x = None
        with on(x):
            tiles, grid, chunk = over_features("backward_likelihood", x)
            d_last = wide((grid[1], num_tokens, width))
            kernels().backward_likelihood_kernel[grid](
                x,
                *output,
                d_loss,
                d_last,
                *sizes,
                chunk,
                c.nll,
                **arguments_of("backward_likelihood", spec, x.dtype),
                **tiles,
            )
            tiles = tiles_of("backward_latents", x)
            blocks, sums = cdiv(num_tokens, tiles["BT"]), spec.sums_fit and x.dtype != torch.float32
            programs = min(blocks, 2 * processors(x)) if sums else blocks
            of_tokens = wide((programs, spec.num_outer) if sums else 0)
            d_posterior = wide(0 if sums else posterior.shape)
            kernels().backward_latents_kernel[(programs,)](
                d_last, flat, z1, z2, encoded, posterior, decoded, d_loss, d_z1, d_decoded, d_encoded, d_posterior,
                of_tokens, num_tokens, blocks, *c[1:5], spec.prior_mean, spec.prior_std, CHUNKS=grid[1],
                SUMS=sums, **arguments_of("backward_latents", spec, x.dtype), **tiles,
            )  # fmt: skip
            if ctx.needs_input_grad[3]:
                d_x, tiles = torch.empty_like(x), tiles_of("backward_input", x)
                kernels().backward_input_kernel[(cdiv(features, tiles["BD"]), cdiv(num_tokens, tiles["BT"]))](
                    x,
                    trunks,
                    *output,
                    d_encoded,
                    d_loss,
                    d_x,
                    *sizes,
                    c.nll,
                    **arguments_of("backward_input", spec, x.dtype),
                    **tiles,
                )
            of_inner = _inner_gradients(spec, x, decoded, d_decoded) if depth > 1 else None
            tiles = tiles_of("backward_features", x)
            chunks = token_chunks(x, cdiv(features, tiles["BD"]), tiles["BT"])
            of_features = wide((chunks, features * (width + 2 + 2 * hidden)))
            kernels().backward_features_kernel[(cdiv(features, tiles["BD"]), chunks)](
                x, *output, d_encoded, d_loss, of_features, *sizes, c.nll, cdiv(num_tokens, chunks),
                **arguments_of("backward_features", spec, x.dtype), **tiles,
            )  # fmt: skip
        numbers = [shape.numel() for shape in ctx.shapes]
        outer = len(numbers) - 2 * (depth - 1)
        if sums:
            small = _total(of_tokens).split(numbers[:outer])
        else:
            small = _outer_gradients(spec, z1, z2, encoded, d_posterior, d_encoded, d_decoded[0])
        if of_inner is not None:
            small += _total(of_inner).split(numbers[outer:])
        d_weight, d_bias, d_scale, d_trunk1, d_trunk2 = _total(of_features).split(
            [features * width, features, features, hidden * features, hidden * features]
        )
        of_trunks = (d_trunk1.view(hidden, features), d_trunk2.view(hidden, features))
        large = (*of_trunks, d_weight.view(features, width), d_bias, d_scale)
        return None, None, None, d_x, None, *large, *(part.view(s) for part, s in zip(small, ctx.shapes, strict=True))


def _pack(spec: Spec, x: Tensor, trunk1: Tensor, trunk2: Tensor, out_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Trunks (parts, 2H, D) and output weight (D, W) in x's dtype."""
    if x.dtype == torch.float32:
        return torch.cat([trunk1, trunk2])[None], out_weight.contiguous()
    trunks, narrow = x.new_empty((2, 2 * len(trunk1), x.shape[1])), x.new_empty(out_weight.shape)
    block = 1024
    kernels().pack_kernel[(cdiv(max(trunks[0].numel(), narrow.numel()), block),)](
        trunk1.contiguous(), trunk2.contiguous(), out_weight.contiguous(), trunks, narrow, x.shape[1],
        **arguments_of("pack", spec, x.dtype), BLOCK=block,
    )  # fmt: skip
    return trunks, narrow


def _inner_gradients(spec: Spec, x: Tensor, decoded: Tensor, d_decoded: Tensor) -> Tensor:
    """Of the decoder's inner layers, a row of weights and biases for each chunk of tokens."""
    tiles, width, inner = tiles_of("backward_inner", x), spec.decoder_hidden, spec.decoder_layers - 1
    blocks = cdiv(width, tiles["BD"])
    chunks = token_chunks(x, inner * blocks, tiles["BT"])
    sums = x.new_empty((chunks, inner * width * (width + 1)), dtype=torch.float32)
    kernels().backward_inner_kernel[(inner, chunks, blocks)](
        decoded, d_decoded, sums, len(x), cdiv(len(x), chunks), **arguments_of("backward_inner", spec, x.dtype), **tiles
    )
    return sums


def _outer_gradients(
    spec: Spec, z1: Tensor, z2: Tensor, encoded: Tensor, d_posterior: Tensor, d_encoded: Tensor, d_first: Tensor
) -> tuple[Tensor, ...]:
    """What the kernel adds up itself for small widths, in the same order."""
    hidden, d_first = spec.encoder_hidden, d_first.float()
    gradients = list(d_encoded.float().sum(0).split(hidden))
    for encoder, values in enumerate(encoded.split(hidden, dim=1)):
        for d_head in d_posterior[:, 2 * encoder : 2 * encoder + 2].unbind(1):
            gradients += [d_head.t() @ values, d_head.sum(0)]
    z = torch.cat([z1, z2], dim=1) if spec.concat else (z1 + z2) / 2
    return (*gradients, d_first.t() @ z, d_first.sum(0))


def _total(partial_sums: Tensor) -> Tensor:
    return partial_sums[0] if len(partial_sums) == 1 else partial_sums.sum(0)
