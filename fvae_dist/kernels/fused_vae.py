"""The training forward and backward of VAEs with one input in a few kernels, as autograd functions.

`fused_vae` is one VAE, `fused_updates` also the up-projections of up to MAX_ADAPTERS layers that read the same x: the
kernels run once for all of them. Which layers they take says `problem`; what they compute is
`fvae_dist.adapter.vae.FactorizedVAE.forward`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.autograd.function import once_differentiable

from fvae_dist.kernels.launching import Plan, kernels, on, plan_of
from fvae_dist.kernels.products import wide_product
from fvae_dist.kernels.spec import Spec

DTYPES = (torch.bfloat16, torch.float32)
WIDEST = 128
DEEPEST_DECODER = 3
MAX_ADAPTERS = 3
# Of a VAE's parameters: those with values for each feature, and those before the decoder's inner layers.
_OF_FEATURES, _BEFORE_INNER = 5, 17


class Side(NamedTuple):
    """Of one adapter, all fp32: the loss of each token (...), differentiable where it was asked for. With statistics
    also terms (5, T): loss, nll, kl_z1, z1_sq, z2_sq; posterior (T, 4, R): mean and log-variance before its clamp, of
    both encoders; squared_error (T,) of x's reconstruction."""

    loss: Tensor
    terms: Tensor | None = None
    posterior: Tensor | None = None
    squared_error: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What a forward needs beside tensors: `salts`, one for each adapter, begin their noise; the update is added
    `scaling` times. Without loss its values are not computed, and meaningless; the graph is the same."""

    spec: Spec
    salts: tuple[int, ...]
    scaling: float = 1.0
    with_statistics: bool = False
    with_loss: bool = True


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


def fused_vae(call: Call, x: Tensor, keys: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Side]:
    """z1 (..., R) fp32 of one VAE for x (..., D), bf16 or fp32; `keys` (T,) int64: of the noise of x's T tokens.

    `parameters`: the VAE's in the order of `vae_triton`, fp32.
    """
    z1, loss, *statistics = _FusedVAE.apply(call, x, keys, *parameters)
    return z1, Side(loss, *(part[0] for part in statistics))


def fused_updates(
    call: Call, x: Tensor, keys: Tensor, bases: Sequence[Tensor], parameters: Sequence[Tensor], ups: Sequence[Tensor]
) -> tuple[Sequence[Tensor], list[Side]]:
    """base + scaling * B z1 of several layers, in the dtype of x and the bases (..., O): as `fused_vae` for each.

    `parameters`: those of one VAE after the other; `ups`: their B (O, R), fp32.
    """
    number = len(bases)
    found = _FusedUpdates.apply(call, x, keys, *bases, *parameters, *ups)
    statistics = found[2 * number :]
    sides = [Side(loss, *(part[i] for part in statistics)) for i, loss in enumerate(found[number : 2 * number])]
    return found[:number], sides


class _FusedVAE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, x: Tensor, keys: Tensor, *parameters: Tensor):  # type: ignore[override]
        run = _Run(call, x, 1)
        rows, state, loss, statistics = run.forward(x, keys, parameters)
        ctx.run, ctx.shapes = run, [parameter.shape for parameter in parameters]
        ctx.save_for_backward(rows, *state)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        leading = x.shape[:-1]
        return state.z1.view(*leading, call.spec.r), loss.view(leading), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, d_z1, d_loss, *_):  # type: ignore[override]
        rows, *saved = ctx.saved_tensors
        state = State(*saved)
        d_z1 = torch.zeros_like(state.z1) if d_z1 is None else d_z1.contiguous()
        d_x, of_parameters = ctx.run.backward(rows, state, d_z1, [d_loss], ctx.needs_input_grad[1])
        return None, d_x, None, *_split(of_parameters, ctx.shapes)


class _FusedUpdates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, x: Tensor, keys: Tensor, *tensors: Tensor):  # type: ignore[override]
        number, leading = len(call.salts), x.shape[:-1]
        bases, parameters, ups = tensors[:number], tensors[number:-number], tensors[-number:]
        run = _Run(call, x, number)
        rows, state, loss, statistics = run.forward(x, keys, parameters, ups)
        # Not the parameters themselves: ZeRO-3 may have emptied them by the backward.
        ctx.run, ctx.shapes, ctx.up_shapes = run, [one.shape for one in parameters], [up.shape for up in ups]
        ctx.save_for_backward(rows, *state)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        outputs = [
            torch.addmm(base.reshape(len(rows), -1), z1, up.t(), alpha=call.scaling).view(base.shape)
            for base, z1, up in zip(bases, state.narrow_z1, _split_ups(state, ctx.up_shapes), strict=True)
        ]
        return *outputs, *(of.view(leading) for of in loss), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # type: ignore[override]
        rows, *saved = ctx.saved_tensors
        run, state, number = ctx.run, State(*saved), len(ctx.up_shapes)
        d_outputs, d_losses = gradients[:number], gradients[number : 2 * number]
        d_z1 = torch.empty_like(state.z1)
        d_ups: list[Tensor | None] = [None] * number
        for i, (d_output, up) in enumerate(zip(d_outputs, _split_ups(state, ctx.up_shapes), strict=True)):
            if d_output is None:
                d_z1[i] = 0
                continue
            d_rows = d_output.reshape(len(rows), -1)
            wide_product(d_rows, up, d_z1[i])
            d_up = wide_product(d_rows.t(), state.narrow_z1[i], rows.new_empty(up.shape, dtype=torch.float32))
            d_ups[i] = d_up if run.call.scaling == 1 else d_up.mul_(run.call.scaling)
        d_x, of_parameters = run.backward(rows, state, d_z1, d_losses, ctx.needs_input_grad[1])
        return None, d_x, None, *d_outputs, *_split(of_parameters, ctx.shapes), *d_ups


class State(NamedTuple):
    """What the backward needs beside x, of all G adapters: the parameters as packed by the kernels, and of each token
    what is narrow. `up` are the up-projections in x's dtype, one behind the other."""

    parameters: Tensor
    trunks: Tensor
    narrow: Tensor
    up: Tensor
    z1: Tensor
    z2: Tensor
    narrow_z1: Tensor
    encoded: Tensor
    posterior: Tensor
    decoded: Tensor


class _Run:
    """Forward and backward of G adapters for one x."""

    def __init__(self, call: Call, x: Tensor, number: int):
        self.call, self.number, self.shape = call, number, x.shape
        features = x.shape[-1]
        self.plan: Plan = plan_of(call.spec, x.dtype, (x.numel() // features, features), number, x.device)

    def forward(
        self, x: Tensor, keys: Tensor, parameters: Sequence[Tensor], ups: Sequence[Tensor] = ()
    ) -> tuple[Tensor, State, Tensor, tuple[Tensor, ...]]:
        """x's rows (T, D), the state, the loss (G, T) and with statistics the other fields of `Side`, (G, ...).

        `parameters` and `ups` are those of all adapters.
        """
        call, plan, number = self.call, self.plan, self.number
        x = x.reshape(-1, x.shape[-1]).contiguous()
        spec, (num_tokens, features), keys = call.spec, x.shape, keys.contiguous()
        wide = partial(x.new_empty, dtype=torch.float32)
        flat = _flatten_dense_tensors((*parameters, *ups))
        num_up = len(flat) - number * plan.stride
        state = State(
            parameters=flat,
            trunks=x.new_empty((number, plan.parts, 2 * spec.encoder_hidden, features)),
            narrow=x.new_empty((number, features, spec.decoder_hidden)),
            up=x.new_empty(num_up),
            z1=wide((number, num_tokens, spec.r)),
            z2=wide((number, num_tokens, spec.r)),
            narrow_z1=x.new_empty((number, num_tokens, spec.r)),
            encoded=wide((number, num_tokens, 2 * spec.encoder_hidden)),
            posterior=wide((number, num_tokens, 4, spec.r)),
            decoded=x.new_empty((number, spec.decoder_layers, num_tokens, spec.decoder_hidden)),
        )
        terms = wide((number, 5, num_tokens))
        c, loss = spec.coefficients, terms[:, 0]
        statistics: tuple[Tensor, ...] = ()
        salts = (*call.salts, 0, 0)[:MAX_ADAPTERS]
        with on(x):
            plan.pack(flat, state.trunks, state.narrow, state.up, features, plan.stride, num_up)
            products = wide((plan.encode_chunks, *state.encoded.shape))
            plan.encode(x, state.trunks, products, num_tokens, features, plan.encode_chunk)
            plan.latents(
                products, keys, flat, state.z1, state.z2, state.narrow_z1, terms, state.encoded, state.posterior,
                state.decoded, num_tokens, plan.stride, *salts, *c[1:], spec.prior_mean, spec.prior_std,
            )  # fmt: skip
            decoder = (x, flat, state.narrow, state.decoded)
            sizes = (num_tokens, features, plan.stride, plan.likelihood_chunk)
            if call.with_statistics:
                sums = wide((plan.likelihood_chunks, 2, number, num_tokens))
                plan.likelihood_with_statistics(*decoder, sums, *sizes)
                nll, squared_error = _total(sums).unbind(0)
                loss = torch.add(loss, nll, alpha=c.nll)
                terms[:, 0], terms[:, 1] = loss, nll
                statistics = terms, state.posterior.detach(), squared_error
            elif call.with_loss:
                sums = wide((plan.likelihood_chunks, number, num_tokens))
                plan.likelihood(*decoder, sums, *sizes)
                loss = torch.add(loss, _total(sums), alpha=c.nll)
        return x, state, loss, statistics

    def backward(
        self, x: Tensor, state: State, d_z1: Tensor, d_losses: Sequence[Tensor | None], needs_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients to x and to the parameters: a list of flat parts, each (G, ...), that follow one another.

        `d_z1` (G, T, R) counts `scaling` times.
        """
        call, plan, number = self.call, self.plan, self.number
        spec, (num_tokens, features) = call.spec, x.shape
        c, wide = spec.coefficients, partial(x.new_empty, dtype=torch.float32)
        d_loss = torch.stack([wide(num_tokens).zero_() if loss is None else loss.reshape(-1) for loss in d_losses])
        d_decoded = torch.empty_like(state.decoded)
        d_encoded = x.new_empty((number, num_tokens, 2 * spec.encoder_hidden))
        d_last = wide((plan.backward_chunks, number, num_tokens, spec.decoder_hidden))
        of_tokens = wide((plan.latent_programs, number, spec.num_outer) if plan.sums_fit else 0)
        d_posterior = wide(0 if plan.sums_fit else state.posterior.shape)
        num_inner = spec.num_small - spec.num_outer
        of_features = wide((plan.feature_chunks, number, features * spec.num_of_feature))
        d_x = x.new_empty(self.shape) if needs_x else None
        decoder, sizes = (x, state.parameters, state.narrow, state.decoded), (num_tokens, features, plan.stride)
        with on(x):
            plan.backward_likelihood(*decoder, d_loss, d_last, *sizes, plan.backward_chunk, c.nll)
            plan.backward_latents(
                d_last, state.parameters, state.z1, state.z2, state.encoded, state.posterior, state.decoded, d_loss,
                d_z1, d_decoded, d_encoded, d_posterior, of_tokens, num_tokens, plan.stride, plan.latent_blocks,
                float(call.scaling), *c[1:5], spec.prior_mean, spec.prior_std,
            )  # fmt: skip
            if d_x is not None:
                plan.backward_input(*decoder, state.trunks, d_encoded, d_loss, d_x, *sizes, c.nll)
            plan.backward_features(*decoder, d_encoded, d_loss, of_features, *sizes, c.nll, plan.feature_chunk)
            outer = (
                _total(of_tokens) if plan.sums_fit else _outer_gradients(spec, state, d_posterior, d_encoded, d_decoded)
            )
            parts = [_total(of_features), outer]
            if num_inner:
                of_inner = wide((plan.inner_chunks, number, num_inner))
                plan.backward_inner(state.decoded, d_decoded, of_inner, num_tokens, plan.inner_chunk)
                parts.append(_total(of_inner))
        return d_x, parts


def _outer_gradients(spec: Spec, state: State, d_posterior: Tensor, d_encoded: Tensor, d_decoded: Tensor) -> Tensor:
    """(G, num_outer): what the kernel adds up itself for small widths, in the same order."""
    hidden, d_first = spec.encoder_hidden, d_decoded[:, 0].float()
    gradients = [d_encoded.float().sum(1)]
    for encoder, values in enumerate(state.encoded.split(hidden, dim=2)):
        for d_head in d_posterior[:, :, 2 * encoder : 2 * encoder + 2].unbind(2):
            gradients += [(d_head.mT @ values).flatten(1), d_head.sum(1)]
    z = torch.cat([state.z1, state.z2], dim=2) if spec.concat else (state.z1 + state.z2) / 2
    return torch.cat([*gradients, (d_first.mT @ z).flatten(1), d_first.sum(1)], dim=1)


def _split(parts: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Gradients of all adapters' parameters, from those of features, of heads and first layer, of inner layers."""
    of_one = [shape.numel() for shape in shapes[: len(shapes) // len(parts[0])]]
    sizes = (of_one[:_OF_FEATURES], of_one[_OF_FEATURES:_BEFORE_INNER], of_one[_BEFORE_INNER:])
    values = (value for i in range(len(parts[0])) for part, of in zip(parts, sizes) for value in part[i].split(of))
    return [value.view(shape) for value, shape in zip(values, shapes, strict=True)]


def _split_ups(state: State, shapes: Sequence[torch.Size]) -> list[Tensor]:
    parts = state.up.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _total(partial_sums: Tensor) -> Tensor:
    return partial_sums[0] if len(partial_sums) == 1 else partial_sums.sum(0)
