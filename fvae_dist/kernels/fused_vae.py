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
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.autograd.function import once_differentiable

from fvae_dist.kernels.launching import Plan, alignment_of, kernels, on, plan_of, stream_of
from fvae_dist.kernels.products import wide_product
from fvae_dist.kernels.spec import Spec

DTYPES = (torch.bfloat16, torch.float32)
WIDEST = 128
DEEPEST_DECODER = 3
MAX_ADAPTERS = 3
# Of a VAE's parameters the first, which are packed: both trunks' and the decoder's output weight.
_WIDE = 3


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
        ctx.run = run = _Run(call, x, 1)
        state, loss, statistics = run.forward(x, keys, parameters)
        ctx.save_for_backward(*state)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        leading = x.shape[:-1]
        return run.z1_of(state).view(*leading, call.spec.r), loss.view(leading), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, d_z1, d_loss, *_):  # type: ignore[override]
        state = State(*ctx.saved_tensors)
        shape = (1, ctx.run.num_tokens, ctx.run.call.spec.r)
        d_rows = state.latents.new_empty(shape)
        d_rows = d_rows.zero_() if d_z1 is None else d_rows.copy_(d_z1.reshape(shape))
        d_x, of_parameters = ctx.run.backward(state, d_rows, [d_loss], ctx.needs_input_grad[1])
        return None, d_x, None, *of_parameters


class _FusedUpdates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, x: Tensor, keys: Tensor, *tensors: Tensor):  # type: ignore[override]
        number, leading = len(call.salts), x.shape[:-1]
        bases, parameters, ups = tensors[:number], tensors[number:-number], tensors[-number:]
        ctx.run = run = _Run(call, x, number)
        state, loss, statistics = run.forward(x, keys, parameters, ups)
        ctx.up_shapes = [up.shape for up in ups]
        ctx.save_for_backward(*state)
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        outputs = [
            torch.addmm(base.reshape(run.num_tokens, -1), z1, up.t()).view(base.shape)
            for base, (z1, up) in zip(bases, run.updates_of(state, ctx.up_shapes), strict=True)
        ]
        return *outputs, *(of.view(leading) for of in loss.unbind(0)), *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):  # type: ignore[override]
        run, state, number = ctx.run, State(*ctx.saved_tensors), len(ctx.up_shapes)
        d_outputs, d_losses = gradients[:number], gradients[number : 2 * number]
        d_z1 = state.latents.new_empty((number, run.num_tokens, run.call.spec.r))
        d_ups: list[Tensor | None] = [None] * number
        for i, (d_output, (z1, up)) in enumerate(zip(d_outputs, run.updates_of(state, ctx.up_shapes), strict=True)):
            if d_output is None:
                d_z1[i] = 0
                continue
            d_rows = d_output.reshape(run.num_tokens, -1)
            wide_product(d_rows, up, d_z1[i])
            d_ups[i] = wide_product(d_rows.t(), z1, state.latents.new_empty(up.shape))
        d_x, of_parameters = run.backward(state, d_z1, d_losses, ctx.needs_input_grad[1])
        return None, d_x, None, *d_outputs, *of_parameters, *d_ups


class State(NamedTuple):
    """What the backward needs, of all G adapters.

    Attributes:
        x: the rows (T, D).
        parameters: fp32 (G, ...), but for the wide weights.
        packed: these in x's dtype, see `vae_triton`; the up-projections (O, R) behind all others.
        latents: fp32; z1, z2 (G, T, R each), the trunks' hidden units (G, T, 2H), the posterior (G, T, 4, R).
        units: in x's dtype; scaling * z1 (G, T, R), the decoder's hidden units (G, DEPTH, T, W).
    """

    x: Tensor
    parameters: Tensor
    packed: Tensor
    latents: Tensor
    units: Tensor


class _Run:
    """Forward and backward of G adapters for one x. Tensors that kernels take are new, or their alignment is told."""

    def __init__(self, call: Call, x: Tensor, number: int):
        self.call, self.number, self.shape = call, number, x.shape
        features = x.shape[-1]
        self.num_tokens = x.numel() // features
        self.plan: Plan = plan_of(call.spec, x.dtype, (self.num_tokens, features), number, x.device)

    def z1_of(self, state: State) -> Tensor:
        """(G, T, R), fp32"""
        return self._first(state.latents, self.call.spec.r)

    def posterior_of(self, state: State) -> Tensor:
        """(G, T, 4, R)"""
        last = 4 * self.number * self.num_tokens * self.call.spec.r
        return state.latents[-last:].view(self.number, self.num_tokens, 4, self.call.spec.r)

    def updates_of(self, state: State, shapes: Sequence[torch.Size]) -> list[tuple[Tensor, Tensor]]:
        """Of each adapter scaling * z1 (T, R) and its up-projection (O, R), in x's dtype."""
        r, num_tokens = self.call.spec.r, self.num_tokens
        # One operation for each view; of its storage, in which a tensor that a hook has kept may begin anywhere.
        at_z1 = state.units.storage_offset()
        at_up = state.packed.storage_offset() + self.number * self.plan.num_packed
        found = []
        for shape in shapes:
            z1 = state.units.as_strided((num_tokens, r), (r, 1), at_z1)
            found.append((z1, state.packed.as_strided(shape, (r, 1), at_up)))
            at_z1 += num_tokens * r
            at_up += shape.numel()
        return found

    def _first(self, buffer: Tensor, width: int) -> Tensor:
        shape = (self.number, self.num_tokens, width)
        return buffer[: self.number * self.num_tokens * width].view(shape)

    def forward(
        self, x: Tensor, keys: Tensor, parameters: Sequence[Tensor], ups: Sequence[Tensor] = ()
    ) -> tuple[State, Tensor, tuple[Tensor, ...]]:
        """The state, the loss (G, T) and with statistics the other fields of `Side`, (G, ...).

        `parameters` and `ups` are those of all adapters.
        """
        call, plan, number, num_tokens = self.call, self.plan, self.number, self.num_tokens
        spec, features = call.spec, x.shape[-1]
        c, r, hidden = spec.coefficients, spec.r, spec.encoder_hidden
        rows = x.reshape(-1, features).contiguous()
        wide = partial(x.new_empty, dtype=torch.float32)
        each = len(parameters) // number
        of_adapters = [parameters[i * each : (i + 1) * each] for i in range(number)]
        sizes_up = [up.numel() for up in ups] + [0] * (MAX_ADAPTERS - len(ups))
        state = State(
            rows if rows.data_ptr() % 16 == 0 else rows.clone(),
            _flatten_dense_tensors([one for of in of_adapters for one in of[_WIDE:]]),
            x.new_empty(number * plan.num_packed + sum(sizes_up)),
            wide(number * num_tokens * (6 * r + 2 * hidden)),
            x.new_empty(number * num_tokens * (r + spec.decoder_layers * spec.decoder_hidden)),
        )
        terms = wide((number, 5, num_tokens))
        statistics: tuple[Tensor, ...] = ()
        with on(x):
            stream = stream_of(x.device)
            keys = keys.contiguous()
            packing = [
                one.contiguous()
                for i in range(number)
                for one in (*of_adapters[i][:_WIDE], ups[i] if ups else state.parameters)
            ]
            kind = alignment_of(packing)
            packing += packing[:4] * (MAX_ADAPTERS - number)
            plan.pack(max(sizes_up))(stream, *packing, state.packed, features, *sizes_up, kind=kind)
            products = wide((plan.encode_chunks, number, num_tokens, 2 * hidden))
            plan.encode(stream, state.x, state.packed, products, num_tokens, features, plan.encode_chunk)
            salts = (*call.salts, 0, 0)[:MAX_ADAPTERS]
            plan.latents(
                stream, products, keys, state.parameters, state.latents, state.units, terms, num_tokens, features,
                plan.stride, *salts, float(call.scaling), *c[1:], spec.prior_mean, spec.prior_std,
                kind=(keys.data_ptr() % 16, *(-(2**31) <= salt < 2**31 for salt in salts)),
            )  # fmt: skip
            decoder = (state.x, state.parameters, state.packed, state.units)
            sizes = (num_tokens, features, plan.stride, plan.likelihood_chunk, c.nll)
            if call.with_statistics:
                sums = wide((plan.likelihood_chunks, 2, number, num_tokens))
                plan.likelihood_with_statistics(stream, *decoder, terms, sums, *sizes)
                nll, squared_error = _total(sums).unbind(0)
                loss = torch.add(terms[:, 0], nll, alpha=c.nll)
                terms[:, 0], terms[:, 1] = loss, nll
                statistics = terms, self.posterior_of(state), squared_error
            elif call.with_loss:
                sums = wide((plan.likelihood_chunks, number, num_tokens))
                plan.likelihood(stream, *decoder, terms, sums, *sizes)
                loss = _total(sums)
            else:
                loss = terms[:, 0]
        return state, loss, statistics

    def backward(
        self, state: State, d_z1: Tensor, d_losses: Sequence[Tensor | None], needs_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients to x, in its own shape, and to the parameters. `d_z1` (G, T, R) counts `scaling` times."""
        call, plan, number, num_tokens = self.call, self.plan, self.number, self.num_tokens
        spec, c, features = call.spec, call.spec.coefficients, self.shape[-1]
        hidden, width, depth = spec.encoder_hidden, spec.decoder_hidden, spec.decoder_layers
        wide = partial(state.x.new_empty, dtype=torch.float32)
        d_loss = torch.stack([wide(num_tokens).zero_() if loss is None else loss.reshape(-1) for loss in d_losses])
        d_units = state.x.new_empty(number * num_tokens * (2 * hidden + depth * width))
        d_last = wide((plan.backward_chunks, number, num_tokens, width))
        of_tokens = wide((plan.latent_programs, number, spec.num_outer) if plan.sums_fit else 0)
        d_posterior = wide(0 if plan.sums_fit else (number, num_tokens, 4, spec.r))
        of_features = wide((plan.feature_chunks, number, plan.num_parameters))
        d_x = state.x.new_empty(self.shape) if needs_x else None
        sizes = (num_tokens, features, plan.stride)
        decoder = (state.x, state.parameters, state.packed, state.units)
        with on(state.x):
            stream = stream_of(state.x.device)
            plan.backward_likelihood(stream, *decoder, d_loss, d_last, *sizes, plan.backward_chunk, c.nll)
            plan.backward_latents(
                stream, d_last, state.parameters, state.latents, state.units, d_loss, d_z1, d_units, d_posterior,
                of_tokens, *sizes, plan.latent_blocks, float(call.scaling), *c[1:5], spec.prior_mean, spec.prior_std,
            )  # fmt: skip
            if d_x is not None:
                plan.backward_input(stream, *decoder, d_units, d_loss, d_x, *sizes, c.nll)
            plan.backward_features(
                stream, *decoder, d_units, d_loss, of_features, *sizes, plan.num_parameters, c.nll, plan.feature_chunk
            )
            # The gradient of all adapters, in which each kernel's sums have their place.
            flat, first = of_features[0], features * spec.num_of_feature
            if len(of_features) > 1:
                flat = wide(flat.shape)
                torch.sum(of_features[:, :, :first], 0, out=flat[:, :first])
            outer, inner = flat[:, first : first + spec.num_outer], flat[:, first + spec.num_outer :]
            if plan.sums_fit:
                torch.sum(of_tokens, 0, out=outer)
            else:
                outer.copy_(self._outer_gradients(state, d_posterior, d_units))
            if depth > 1:
                of_inner = wide((plan.inner_chunks, *inner.shape))
                plan.backward_inner(stream, state.units, d_units, of_inner, num_tokens, plan.inner_chunk)
                torch.sum(of_inner, 0, out=inner)
        return d_x, _unflatten_dense_tensors(flat.view(-1), plan.like)

    def _outer_gradients(self, state: State, d_posterior: Tensor, d_units: Tensor) -> Tensor:
        """(G, num_outer): what the kernel adds up itself for small widths, in the same order."""
        spec, number, num_tokens = self.call.spec, self.number, self.num_tokens
        hidden, r = spec.encoder_hidden, spec.r
        each = number * num_tokens
        z1, z2, encoded, _ = state.latents.split([each * r, each * r, each * 2 * hidden, each * 4 * r])
        z1, z2 = z1.view(number, num_tokens, r), z2.view(number, num_tokens, r)
        encoded = encoded.view(number, num_tokens, 2 * hidden)
        d_encoded = self._first(d_units, 2 * hidden).float()
        d_decoded = d_units[each * 2 * hidden :].view(number, spec.decoder_layers, num_tokens, spec.decoder_hidden)
        d_first = d_decoded[:, 0].float()
        gradients = [d_encoded.sum(1)]
        for encoder, values in enumerate(encoded.split(hidden, dim=2)):
            for d_head in d_posterior[:, :, 2 * encoder : 2 * encoder + 2].unbind(2):
                gradients += [(d_head.mT @ values).flatten(1), d_head.sum(1)]
        z = torch.cat([z1, z2], dim=2) if spec.concat else (z1 + z2) / 2
        return torch.cat([*gradients, (d_first.mT @ z).flatten(1), d_first.sum(1)], dim=1)


def _total(partial_sums: Tensor) -> Tensor:
    return partial_sums[0] if len(partial_sums) == 1 else partial_sums.sum(0)
