"""The launches of one forward and one backward, for VAEs with one input; `fused_vae` makes autograd functions of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fvae_dist.kernels.launching import Plan, alignment_of, on, plan_of, stream_of
from fvae_dist.kernels.likelihood import backward_likelihood
from fvae_dist.kernels.products import wide_product
from fvae_dist.kernels.spec import Spec

MAX_ADAPTERS = 3


@dataclass(frozen=True)
class Call:
    """What a forward needs beside tensors: `salts`, one for each adapter, begin their noise; the update is added
    `scaling` times. Without loss its values are not computed, and meaningless; the graph is the same. `recomputes`:
    the forward is there for what it saves, and its graph is thrown away."""

    spec: Spec
    salts: tuple[int, ...]
    scaling: float = 1.0
    with_statistics: bool = False
    with_loss: bool = True
    recomputes: bool = False


class State(NamedTuple):
    """What the backward needs, of all G adapters. Hooks on saved tensors, such as checkpointing's, take their time over
    each one: the first three are saved, the others are parts of them.

    Attributes:
        x: the rows (T, D).
        wide: parameters and latents.
        narrow: packed and units.
        parameters: fp32 (G, ...), but for the wide weights.
        packed: these in x's dtype, see `vae_triton`; the up-projections (O, R) behind all others.
        latents: fp32; z1, z2 (G, T, R each), the trunks' hidden units (G, T, 2H), the posterior (G, T, 4, R).
        units: in x's dtype; scaling * z1 (G, T, R), the decoder's hidden units (G, DEPTH, T, W).
    """

    x: Tensor
    wide: Tensor
    narrow: Tensor
    parameters: Tensor
    packed: Tensor
    latents: Tensor
    units: Tensor


class Run:
    """Forward and backward of G adapters for one x. Tensors that kernels take are new, or their alignment is told."""

    def __init__(self, call: Call, x: Tensor, number: int):
        self.call, self.number, self.shape = call, number, x.shape
        features = x.shape[-1]
        self.num_tokens = x.numel() // features
        self.plan: Plan = plan_of(call.spec, x.dtype, (self.num_tokens, features), number, x.device)
        # Of the two saved buffers, how long their parts are, and whether parameters are flat; known in the forward.
        self.parts: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
        self.is_flat = False

    def state_of(self, x: Tensor, wide: Tensor, narrow: Tensor) -> State:
        """From what was saved."""
        of_wide, of_narrow = self.parts
        parameters, latents = wide.split_with_sizes(of_wide)
        packed, units = narrow.split_with_sizes(of_narrow)
        return State(x, wide, narrow, parameters, packed, latents, units)

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

        `parameters`, of each either the two flat ones or what they are made of, and `ups` are those of all adapters.
        """
        call, plan, number, num_tokens = self.call, self.plan, self.number, self.num_tokens
        spec, features = call.spec, x.shape[-1]
        c, r, hidden = spec.coefficients, spec.r, spec.encoder_hidden
        rows = x.reshape(-1, features).contiguous()
        wide = partial(x.new_empty, dtype=torch.float32)
        self.is_flat = len(parameters) == 2 * number
        sizes_up = (*[up.numel() for up in ups], *[0] * (MAX_ADAPTERS - len(ups)))
        of_wide = (_aligned(number * plan.stride), number * num_tokens * (6 * r + 2 * hidden))
        of_narrow = (
            _aligned(number * plan.num_packed + sum(sizes_up)),
            number * num_tokens * (r + spec.decoder_layers * spec.decoder_hidden),
        )
        self.parts = of_wide, of_narrow
        rows = rows if rows.data_ptr() % 16 == 0 else rows.clone()
        state = self.state_of(rows, wide(sum(of_wide)), x.new_empty(sum(of_narrow)))
        terms = wide((number, 5, num_tokens))
        statistics: tuple[Tensor, ...] = ()
        with on(x):
            stream = stream_of(x.device)
            keys = keys.contiguous()
            flats: Sequence[Tensor] = parameters
            if not self.is_flat:
                in_order = [parameters[i] for i in plan.flat_indices]
                flats = torch._C._nn.flatten_dense_tensors(in_order).split_with_sizes(plan.flat_sizes)
            packing = [
                one.contiguous()
                for i in range(number)
                for one in (*flats[2 * i : 2 * i + 2], ups[i] if ups else state.parameters)
            ]
            kind = alignment_of(packing)
            packing += packing[:3] * (MAX_ADAPTERS - number)
            plan.pack(sizes_up)(
                stream, *packing, state.packed, state.parameters, features, plan.stride, *sizes_up, kind=kind
            )
            products = wide((plan.encode_chunks, number, num_tokens, 2 * hidden))
            plan.encode(stream, state.x, state.packed, products, num_tokens, features, plan.encode_chunk)
            salts = (*call.salts, 0, 0)[:MAX_ADAPTERS]
            plan.latents(
                stream, products, keys, state.parameters, state.latents, state.units, terms, num_tokens, features,
                plan.stride, *salts, float(call.scaling), *c[1:], spec.prior_mean, spec.prior_std,
                kind=(keys.data_ptr() % 16, *(-(2**31) <= salt < 2**31 for salt in salts)),
            )  # fmt: skip
            loss = terms[:, 0]
            if call.with_statistics or call.with_loss:
                loss = self._likelihood(stream, state, terms)
            if call.with_statistics:
                nll, squared_error = loss.unbind(0)
                loss = torch.add(terms[:, 0], nll, alpha=c.nll)
                terms[:, 0], terms[:, 1] = loss, nll
                statistics = terms, self.posterior_of(state), squared_error
        return state, loss, statistics

    def _likelihood(self, stream: int | None, state: State, terms: Tensor) -> Tensor:
        """The loss (G, T), or with statistics (2, G, T): the nll and the squared error."""
        plan, (num_tokens, features), c_nll = self.plan, state.x.shape, self.call.spec.coefficients.nll
        has_statistics = self.call.with_statistics
        of_token = (2, self.number, num_tokens) if has_statistics else (self.number, num_tokens)
        sums = terms.new_empty((plan.likelihood_chunks, *of_token))
        launch = plan.likelihood_with_statistics if has_statistics else plan.likelihood
        decoder = (state.x, state.parameters, state.packed, state.units)
        launch(stream, *decoder, terms, sums, num_tokens, features, plan.stride, plan.likelihood_chunk, c_nll)
        return sums[0] if len(sums) == 1 else sums.sum(0)

    def backward(
        self, state: State, d_z1: Tensor, d_losses: Sequence[Tensor | None], needs_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients to x, in its own shape, and to the parameters as they were given to the forward. `d_z1` (G, T, R)
        counts `scaling` times."""
        call, plan, number, num_tokens = self.call, self.plan, self.number, self.num_tokens
        spec, c, features = call.spec, call.spec.coefficients, self.shape[-1]
        hidden, width, depth = spec.encoder_hidden, spec.decoder_hidden, spec.decoder_layers
        wide = partial(state.x.new_empty, dtype=torch.float32)
        d_loss = d_losses[0]
        if d_loss is None or not _is_one_block(d_loss, d_losses, num_tokens):
            d_loss = torch.stack([wide(num_tokens).zero_() if loss is None else loss.reshape(-1) for loss in d_losses])
        d_units = state.x.new_empty(number * num_tokens * (2 * hidden + depth * width))
        of_tokens = wide((plan.latent_programs, number, plan.num_outer) if plan.sums_fit else 0)
        d_posterior = wide(0 if plan.sums_fit else (number, num_tokens, 4, spec.r))
        of_features = wide((plan.feature_chunks, number, plan.num_parameters))
        d_x = state.x.new_empty(self.shape) if needs_x else None
        sizes = (num_tokens, features, plan.stride)
        decoder = (state.x, state.parameters, state.packed, state.units)
        with on(state.x):
            stream = stream_of(state.x.device)
            if plan.by_products:
                rows = None if d_x is None else d_x.view(num_tokens, features)
                at_decoder = slice(2 * hidden * features, plan.num_of_features)
                of_decoder = of_features[0, :, at_decoder]
                d_last = backward_likelihood(plan, spec, stream, decoder, d_loss, rows, of_decoder)
            else:
                d_last = wide((plan.backward_chunks, number, num_tokens, width))
                plan.backward_likelihood(stream, *decoder, d_loss, d_last, *sizes, plan.backward_chunk, c.nll)
            plan.backward_latents(
                stream, d_last, state.parameters, state.latents, state.units, d_loss, d_z1, d_units, d_posterior,
                of_tokens, *sizes, plan.latent_blocks, float(call.scaling), *c[1:5], spec.prior_mean, spec.prior_std,
            )  # fmt: skip
            if plan.by_products:
                self._backward_trunks(state, d_units, rows, of_features[0])
            else:
                if d_x is not None:
                    plan.backward_input(stream, *decoder, d_units, d_loss, d_x, *sizes, c.nll)
                plan.backward_features(
                    stream, *decoder, d_units, d_loss, of_features, *sizes, plan.num_parameters, c.nll,
                    plan.feature_chunk,
                )  # fmt: skip
            # The gradient of all adapters, in which each kernel's sums have their place.
            flat, first = of_features[0], plan.num_of_features
            if len(of_features) > 1:
                flat = wide(flat.shape)
                torch.sum(of_features[:, :, :first], 0, out=flat[:, :first])
            outer, inner = flat[:, first : first + plan.num_outer], flat[:, first + plan.num_outer :]
            if plan.sums_fit:
                torch.sum(of_tokens, 0, out=outer)
            else:
                outer.copy_(self._outer_gradients(state, d_posterior, d_units))
            if depth > 1:
                of_inner = wide((plan.inner_chunks, *inner.shape))
                plan.backward_inner(stream, state.units, d_units, of_inner, num_tokens, plan.inner_chunk)
                torch.sum(of_inner, 0, out=inner)
        # "Unsafe" if the whole were used again; half as many operations as torch's own unflattening.
        if self.is_flat:
            ordered = flat.index_select(1, plan.order)
            return d_x, list(torch.unsafe_split_with_sizes(ordered.view(-1), plan.flat_sizes))
        gradients = list(torch.unsafe_split_with_sizes(flat.view(-1), plan.sizes))
        for i, shape in plan.matrices:
            gradients[i] = gradients[i].view(shape)
        return d_x, gradients

    def _backward_trunks(self, state: State, d_units: Tensor, d_x: Tensor | None, of_features: Tensor) -> None:
        """From the gradients of the trunks' products: adds to that of x (T, D), writes those of the trunks, in front of
        `of_features` (G, ..). All adapters at once, as their weights are packed: of each high parts, then low ones."""
        number, parts, hidden = self.number, self.plan.parts, 2 * self.call.spec.encoder_hidden
        d_encoded = self._first(d_units, hidden)
        columns = torch.cat([d_encoded[i] for i in range(number) for _ in range(parts)], 1)
        size = columns.shape[1] * state.x.shape[1]
        if d_x is not None:
            d_x.addmm_(columns, state.packed[:size].view(columns.shape[1], -1))
        products = wide_product(columns.t(), state.x, of_features.new_empty((columns.shape[1], state.x.shape[1])))
        of_features[:, : size // (number * parts)] = products.view(number, parts, -1)[:, 0]

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


def _aligned(size: int) -> int:
    """So many numbers or a few more, that what stands behind them begins at a multiple of 16 bytes."""
    return (size + 7) & -8


def _is_one_block(first: Tensor, tensors: Sequence[Tensor | None], size: int) -> bool:
    """Whether these, fp32 and of that size each, stand in memory as kernels expect it of one new tensor: gradients of
    layers that reported one after the other do."""
    at = first.data_ptr()
    return at % 16 == 0 and all(
        one is not None and one.is_contiguous() and one.data_ptr() == at + 4 * size * i for i, one in enumerate(tensors)
    )
