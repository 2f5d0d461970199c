"""The training forward and backward of VAEs with one input in a few kernels, as autograd functions.

`fused_vae` is one VAE, `fused_updates` also the up-projections of up to MAX_ADAPTERS layers that read the same x: the
kernels run once for all of them. Which layers they take says `problem`; what they compute is
`fvae_dist.adapter.vae.FactorizedVAE.forward`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fvae_dist.kernels.launching import kernels
from fvae_dist.kernels.passes import Call, Run
from fvae_dist.kernels.products import wide_product
from fvae_dist.kernels.spec import Spec

DTYPES = (torch.bfloat16, torch.float32)
WIDEST = 128
DEEPEST_DECODER = 3


class Side(NamedTuple):
    """Of one adapter, all fp32: the loss of each token (...), differentiable where it was asked for. With statistics
    also terms (5, T): loss, nll, kl_z1, z1_sq, z2_sq; posterior (T, 4, R): mean and log-variance before its clamp, of
    both encoders; squared_error (T,) of x's reconstruction."""

    loss: Tensor
    terms: Tensor | None = None
    posterior: Tensor | None = None
    squared_error: Tensor | None = None


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
    return size_problem(spec)


def size_problem(spec: Spec) -> str | None:
    """Why the kernels cannot be used for adapters of these sizes; None if they can."""
    for name in ("r", "encoder_hidden", "decoder_hidden"):
        if getattr(spec, name) > WIDEST:
            return f"{name} {getattr(spec, name)} is above {WIDEST}"
    if not 1 <= spec.decoder_layers <= DEEPEST_DECODER:
        return f"decoder_layers {spec.decoder_layers} is not in 1 .. {DEEPEST_DECODER}"
    return None


def fused_vae(call: Call, x: Tensor, keys: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Side]:
    """z1 (..., R) fp32 of one VAE for x (..., D), bf16 or fp32; `keys` (T,) int64: of the noise of x's T tokens.

    `parameters`: the VAE's, fp32, in the order of `vae_triton`: two flat ones, or each by itself.
    """
    z1, loss, *statistics = _FusedVAE.apply(call, x, keys, *parameters)
    return z1, Side(loss, *(part[0] for part in statistics))


def fused_updates(
    call: Call,
    x: Tensor,
    keys: Tensor,
    bases: Sequence[Tensor],
    parameters: Sequence[Tensor],
    ups: Sequence[Tensor],
    is_weight: bool = False,
) -> tuple[Sequence[Tensor], list[Side]]:
    """base + scaling * B z1 of several layers, in the dtype of x and the bases: as `fused_vae` for each.

    `bases`: the base layers' outputs (..., O) or, where `is_weight`, their frozen weights (O, D): then both products
    and both gradients to x are added up in place. `parameters`: those of one VAE after the other; `ups`: their B
    (O, R), fp32.
    """
    number, tensors = len(bases), (*bases, *parameters, *ups)
    # Autograd takes a microsecond or two for each tensor that it is told of.
    held = tensors if call.recomputes and x.requires_grad else None
    found = _apply_updates(call, x, keys, is_weight, held, *(() if held else tensors))
    statistics = found[2 * number :]
    sides = [Side(loss, *(part[i] for part in statistics)) for i, loss in enumerate(found[number : 2 * number])]
    return found[:number], sides


class _FusedVAE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, x: Tensor, keys: Tensor, *parameters: Tensor):  # type: ignore[override]
        ctx.run = run = Run(call, x, 1)
        state, loss, statistics = run.forward(x, keys, parameters)
        ctx.save_for_backward(*state[:3])
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        leading = x.shape[:-1]
        return run.z1_of(state).view(*leading, call.spec.r), loss.view(leading), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, d_z1, d_loss, *_):  # type: ignore[override]
        state = ctx.run.state_of(*ctx.saved_tensors)
        shape = (1, ctx.run.num_tokens, ctx.run.call.spec.r)
        d_rows = state.latents.new_empty(shape)
        d_rows = d_rows.zero_() if d_z1 is None else d_rows.copy_(d_z1.reshape(shape))
        d_x, of_parameters = ctx.run.backward(state, d_rows, [d_loss], ctx.needs_input_grad[1])
        return None, d_x, None, *of_parameters


class _FusedUpdates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, x: Tensor, keys: Tensor, is_weight: bool, held, *tensors: Tensor):  # type: ignore[override]
        number, leading, tensors = len(call.salts), x.shape[:-1], held or tensors
        bases, parameters, ups = tensors[:number], tensors[number:-number], tensors[-number:]
        ctx.run = run = Run(call, x, number)
        state, loss, statistics = run.forward(x, keys, parameters, ups)
        ctx.up_shapes = [up.shape for up in ups]
        ctx.save_for_backward(*state[:3])
        # Weights stay where they are: hooks on saved tensors, checkpointing's, would only take time over them.
        ctx.weights = bases if is_weight else ()
        ctx.versions = [weight._version for weight in ctx.weights]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        outputs = []
        for base, (z1, up) in zip(bases, run.updates_of(state, ctx.up_shapes), strict=True):
            if is_weight:
                output = torch.mm(state.x, base.t()).addmm_(z1, up.t())
            else:
                output = torch.addmm(base.reshape(run.num_tokens, -1), z1, up.t())
            outputs.append(output.view(*leading, -1))
        return *outputs, *(of.view(leading) for of in loss.unbind(0)), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # type: ignore[override]
        run, number, weights = ctx.run, len(ctx.up_shapes), ctx.weights
        if [weight._version for weight in weights] != ctx.versions:
            raise RuntimeError("a base layer's weight was modified in place between forward and backward")
        state = run.state_of(*ctx.saved_tensors)
        d_outputs, d_losses = gradients[:number], gradients[number : 2 * number]
        d_z1 = state.latents.new_empty((number, run.num_tokens, run.call.spec.r))
        d_ups: list[Tensor | None] = [None] * number
        d_rows: list[Tensor | None] = [None] * number
        for i, (d_output, (z1, up)) in enumerate(zip(d_outputs, run.updates_of(state, ctx.up_shapes), strict=True)):
            if d_output is None:
                d_z1[i] = 0
                continue
            rows = d_rows[i] = d_output.reshape(run.num_tokens, -1)
            wide_product(rows, up, d_z1[i])
            d_ups[i] = wide_product(rows.t(), z1, state.latents.new_empty(up.shape))
        d_x, of_parameters = run.backward(state, d_z1, d_losses, ctx.needs_input_grad[1])
        if d_x is not None:
            for rows, weight in zip(d_rows, weights):
                if rows is not None:
                    d_x.view(run.num_tokens, -1).addmm_(rows, weight)
        d_bases = [None] * number if weights else d_outputs
        return None, d_x, None, None, None, *d_bases, *of_parameters, *d_ups


# Past `Function.apply`, whose Python looks at each tensor for what only torch.func makes. Not by a method of the class,
# which torch.compile could not trace.
_apply_updates = super(torch.autograd.Function, _FusedUpdates).apply  # type: ignore[misc]
