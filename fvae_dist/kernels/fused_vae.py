"""The training forward and backward of one layer's VAE in a few kernels, as an autograd function.

Which layers it takes says `problem`; what it computes is `fvae_dist.adapter.vae.FactorizedVAE.forward`.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.autograd.function import once_differentiable

from fvae_dist.kernels.launching import Plan, kernels, on, plan_of
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
    x: Tensor,
    keys: Tensor,
    salt: int,
    parameters: Parameters,
    spec: Spec,
    with_statistics: bool = False,
    with_loss: bool = True,
) -> Outputs:
    """Sample both latents and decode, for tokens x (T, D), bf16 or fp32; `keys` (T,) int64 and `salt`: their noise.

    Without loss its values are not computed, and meaningless; the graph is the same.
    """
    large = (parameters.trunk1, parameters.trunk2, parameters.out_weight, parameters.out_bias, parameters.scale)
    return Outputs(*_FusedVAE.apply(spec, with_statistics, with_loss, salt, x, keys, *large, *parameters.small))


class _FusedVAE(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, spec, with_statistics, with_loss, salt, x, keys, trunk1, trunk2, out_weight, out_bias, scale, *small
    ):
        x, keys = x.contiguous(), keys.contiguous()
        (num_tokens, features), c = x.shape, spec.coefficients
        plan = plan_of(spec, x.dtype, num_tokens, features, x.device)
        wide = partial(x.new_empty, dtype=torch.float32)
        z1, z2, terms = wide((num_tokens, spec.r)), wide((num_tokens, spec.r)), wide((5, num_tokens))
        encoded, posterior = wide((num_tokens, 2 * spec.encoder_hidden)), wide((num_tokens, 4, spec.r))
        decoded = x.new_empty((spec.decoder_layers, num_tokens, spec.decoder_hidden))
        flat = _flatten_dense_tensors(small)
        with on(x):
            trunks, narrow_weight = _pack(plan, x, trunk1, trunk2, out_weight)
            products = wide((plan.encode_chunks, *encoded.shape))
            plan.encode(x, trunks, products, num_tokens, features, plan.encode_chunk)
            plan.latents(
                products, keys, flat, z1, z2, terms, encoded, posterior, decoded, num_tokens, salt, *c[1:],
                spec.prior_mean, spec.prior_std,
            )  # fmt: skip
            output = (narrow_weight, out_bias, scale, decoded[-1])
            loss, squared_error = terms[0], x.new_empty(0)
            if with_statistics:
                sums = wide((plan.likelihood_chunks, 2, num_tokens))
                plan.likelihood_with_statistics(x, *output, sums, num_tokens, features, plan.likelihood_chunk)
                nll, squared_error = _total(sums).unbind(0)
                loss = torch.add(loss, nll, alpha=c.nll)
                terms[0], terms[1] = loss, nll
            elif with_loss:
                sums = wide((plan.likelihood_chunks, num_tokens))
                plan.likelihood(x, *output, sums, num_tokens, features, plan.likelihood_chunk)
                loss = torch.add(loss, _total(sums), alpha=c.nll)
            else:
                loss = loss.clone()  # an output of its own, beside terms
        # Not the parameters themselves: ZeRO-3 may have emptied them by the backward.
        ctx.spec, ctx.plan, ctx.shapes = spec, plan, [parameter.shape for parameter in small]
        ctx.save_for_backward(x, trunks, flat, narrow_weight, out_bias, scale, z1, z2, encoded, posterior, decoded)
        ctx.mark_non_differentiable(terms, posterior, squared_error)
        ctx.set_materialize_grads(False)
        return z1, loss, terms, posterior, squared_error

    @staticmethod
    @once_differentiable
    def backward(ctx, d_z1, d_loss, *_):  # type: ignore[override]
        x, trunks, flat, narrow_weight, out_bias, scale, z1, z2, encoded, posterior, decoded = ctx.saved_tensors
        spec, plan, (num_tokens, features) = ctx.spec, ctx.plan, x.shape
        hidden, width, depth = spec.encoder_hidden, spec.decoder_hidden, spec.decoder_layers
        c, wide = spec.coefficients, partial(x.new_empty, dtype=torch.float32)
        d_z1 = torch.zeros_like(z1) if d_z1 is None else d_z1.contiguous()
        d_loss = wide(num_tokens).zero_() if d_loss is None else d_loss.contiguous()
        d_decoded, d_encoded = torch.empty_like(decoded), x.new_empty((num_tokens, 2 * hidden))
        output, sizes = (narrow_weight, out_bias, scale, decoded[-1]), (num_tokens, features)
        d_last = wide((plan.backward_chunks, num_tokens, width))
        of_tokens = wide((plan.latent_programs, spec.num_outer) if plan.sums_fit else 0)
        d_posterior = wide(0 if plan.sums_fit else posterior.shape)
        of_inner = wide((plan.inner_chunks, spec.num_small - spec.num_outer)) if depth > 1 else None
        of_features = wide((plan.feature_chunks, features * (width + 2 + 2 * hidden)))
        d_x = torch.empty_like(x) if ctx.needs_input_grad[4] else None
        with on(x):
            plan.backward_likelihood(x, *output, d_loss, d_last, *sizes, plan.backward_chunk, c.nll)
            plan.backward_latents(
                d_last, flat, z1, z2, encoded, posterior, decoded, d_loss, d_z1, d_decoded, d_encoded, d_posterior,
                of_tokens, num_tokens, plan.latent_blocks, *c[1:5], spec.prior_mean, spec.prior_std,
            )  # fmt: skip
            if d_x is not None:
                plan.backward_input(x, trunks, *output, d_encoded, d_loss, d_x, *sizes, c.nll)
            if of_inner is not None:
                plan.backward_inner(decoded, d_decoded, of_inner, num_tokens, plan.inner_chunk)
            plan.backward_features(x, *output, d_encoded, d_loss, of_features, *sizes, c.nll, plan.feature_chunk)
        numbers = [shape.numel() for shape in ctx.shapes]
        outer = len(numbers) - 2 * (depth - 1)
        if plan.sums_fit:
            of_small = _total(of_tokens).split(numbers[:outer])
        else:
            of_small = _outer_gradients(spec, z1, z2, encoded, d_posterior, d_encoded, d_decoded[0])
        if of_inner is not None:
            of_small += _total(of_inner).split(numbers[outer:])
        d_weight, d_bias, d_scale, d_trunk1, d_trunk2 = _total(of_features).split(
            [features * width, features, features, hidden * features, hidden * features]
        )
        of_trunks = (d_trunk1.view(hidden, features), d_trunk2.view(hidden, features))
        large = (*of_trunks, d_weight.view(features, width), d_bias, d_scale)
        of_small = (part.view(shape) for part, shape in zip(of_small, ctx.shapes, strict=True))
        return None, None, None, None, d_x, None, *large, *of_small


def _pack(plan: Plan, x: Tensor, trunk1: Tensor, trunk2: Tensor, out_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Trunks (parts, 2H, D) and output weight (D, W) in x's dtype."""
    if x.dtype == torch.float32:
        return torch.cat([trunk1, trunk2])[None], out_weight.contiguous()
    trunks, narrow = x.new_empty((2, 2 * len(trunk1), x.shape[1])), x.new_empty(out_weight.shape)
    plan.pack(trunk1.contiguous(), trunk2.contiguous(), out_weight.contiguous(), trunks, narrow, x.shape[1])
    return trunks, narrow


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
