"""How the kernels are launched: their compile-time arguments, tiles and grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from fvae_dist.kernels.spec import Spec


@lru_cache
def kernels() -> Any:
    """The kernels, compiled by their first call; Triton decides at import whether it interprets them instead."""
    from fvae_dist.kernels import vae_triton

    return vae_triton


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _padded(size: int) -> int:
    """A power of two that tl.dot takes."""
    return max(16, 1 << (size - 1).bit_length())


_HERE = nullcontext()


def on(x: Tensor) -> AbstractContextManager:
    """Where Triton launches: it takes the current device, which need not be x's."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


@lru_cache
def _num_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Multiprocessors of a device; the interpreter is tested with two, the planner takes a Hopper's."""
    return _num_processors(device.index) if device.type == "cuda" else 132 if device.type == "meta" else 2


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have, as Triton asks: 227 KiB on a Hopper, 99 on a workstation's GPU. The interpreter
    and the planner take a Hopper's."""
    if device.type != "cuda":
        return 232_448
    from triton.compiler.compiler import max_shared_mem

    return max_shared_mem(device.index)


def constants_of(spec: Spec, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of all kernels."""
    exact = dtype == torch.float32
    return {
        "R": spec.r,
        "RB": _padded(spec.r),
        "H": spec.encoder_hidden,
        "HB": _padded(spec.encoder_hidden),
        "H2": 2 * spec.encoder_hidden,
        "HB2": _padded(2 * spec.encoder_hidden),
        "W": spec.decoder_hidden,
        "WB": _padded(spec.decoder_hidden),
        "DEPTH": spec.decoder_layers,
        "CONCAT": spec.concat,
        "WORDS": spec.num_words,
        "ENCODER_THRESHOLD": round(spec.encoder_dropout * 2**32),
        "ENCODER_P": spec.encoder_dropout,
        "DECODER_FIRST": spec.encoder_decisions,
        "DECODER_THRESHOLD": round(spec.decoder_dropout * 2**32),
        "DECODER_P": spec.decoder_dropout,
        # tf32 (10 bits) is finer than a 16-bit x; before an exponential nothing is rounded, for an fp32 x nowhere.
        "PRECISION": "tf32x3" if exact else "tf32",
        "HEAD_PRECISION": "tf32x3",
        "INTERPRETED": kernels().INTERPRETED,
    }


# Tokens and features of a tile, warps, pipeline stages.
NARROW_TILES = {  # 16 bit
    "encode": (64, 64, 2, 4),
    "latents": (32, 0, 8, 1),
    "likelihood": (64, 64, 2, 3),
    "backward_likelihood": (64, 32, 2, 3),
    "backward_latents": (16, 0, 4, 1),
    "backward_input": (32, 128, 4, 1),
    "backward_inner": (64, 32, 4, 3),
    "backward_features": (256, 16, 4, 2),
    "backward_residual": (8, 128, 1, 1),
}
_EXACT_TILES = {  # fp32
    "encode": (32, 32, 4, 2),
    "latents": (16, 0, 4, 1),
    "likelihood": (32, 32, 4, 2),
    "backward_likelihood": (32, 32, 4, 2),
    "backward_latents": (16, 0, 4, 1),
    "backward_input": (32, 32, 4, 1),
    "backward_inner": (32, 32, 4, 2),
    "backward_features": (32, 32, 4, 2),
}
_INTERPRETED_TILES = {name: (16, 32 if tile[1] else 0, 4, 1) for name, tile in NARROW_TILES.items()}


# Tokens from which on the products of the likelihood's backward are the matrix library's (`likelihood.py`), and of how
# many at a time. At 2,048 they would save the GPU 45 us of 240 for two adapters, and cost the host, which is the bound
# there, more launches. The second is a multiple of 8, so that each part begins at a multiple of 16 bytes.
PRODUCT_TOKENS, PRODUCT_ROWS = 4096, 8192


class Launch:
    """A kernel with its grid and its compile-time arguments.

    Triton looks at all arguments of every launch anew, 50 us and more on a slow host: as long as these kernels run.
    Here a compiled kernel is found by what the caller says of the arguments: whatever may differ between two calls of
    one plan and would make Triton compile another kernel (alignment of tensors that were not allocated for this, range
    of integers).
    """

    def __init__(self, kernel: str, grid: tuple[int, ...], constants: dict[str, Any]):
        self._kernel = getattr(kernels(), f"{kernel}_kernel")
        self._grid, self._constants = (*grid, 1, 1)[:3], constants
        self._last = [constants[name] for name in self._kernel.arg_names if name in constants]
        # How each is run, and what that takes between the stream and the kernel's own arguments.
        self._compiled: dict[Any, tuple[Callable, tuple]] = {}

    def __call__(self, stream: int | None, *arguments: Tensor | float, kind: Any = None) -> None:
        """Launch on the current device, which must be the plan's; `arguments` are all but the compile-time ones."""
        found = self._compiled.get(kind)
        if found is not None:
            run, between = found
            # Of a tensor Triton asks the driver where it is; an address it takes as it is.
            own = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
            run(*self._grid, stream, *between, *own, *self._last)
            return
        compiled = self._kernel[self._grid](*arguments, **self._constants)
        if compiled is not None:  # the interpreter compiles nothing
            # As compiled[grid] runs it, but without Triton's launch hooks and what it would gather for them.
            self._compiled[kind] = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)


def stream_of(device: torch.device) -> int | None:
    """The current stream there, as Triton takes it."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None


def alignment_of(tensors: Iterable[Tensor]) -> tuple[bool, ...]:
    """What Triton compiles for: whether each tensor begins at a multiple of 16 bytes, as all new ones do."""
    return tuple([tensor.data_ptr() % 16 == 0 for tensor in tensors])


@lru_cache
def flat_order(spec: Spec, features: int, device: torch.device) -> Tensor:
    """Where each number of an adapter's parameters, weights and then biases, stands in the kernels' gradient: int64."""
    shapes = spec.shapes(features)
    sizes = [math.prod(shape) for shape in shapes]
    parts = list(zip(shapes, torch.arange(sum(sizes), device=device).split(sizes), strict=True))
    matrices = [part for shape, part in parts if len(shape) > 1]
    return torch.cat(matrices + [part for shape, part in parts if len(shape) == 1])


class Plan:
    """All launches for inputs x (T, D) of one kind and so many adapters, and how sums are split between programs.

    A sum over features is split into chunks (`encode_chunk`: features of a chunk; `encode_chunks`: how many) where
    there would be too few programs for all processors; a sum over tokens is, so that every processor has a program.
    """

    def __init__(self, spec: Spec, dtype: torch.dtype, shape: tuple[int, int], adapters: int, device: torch.device):
        self._spec, self._dtype, self._device, self._on_gpu = spec, dtype, device, device.type != "cpu"
        (self._num_tokens, self._features), self.adapters = shape, adapters
        self._processors, self._shared_memory = processors(device), shared_memory(device)
        features = self._features
        self.parts = 1 if dtype == torch.float32 else 2
        # Of an adapter: numbers of `packed` but for its up-projection, of `parameters`, and of the gradient.
        self.num_packed = features * (2 * self.parts * spec.encoder_hidden + spec.decoder_hidden)
        self.stride = 2 * features + spec.num_small
        self.num_outer, self.num_of_features = spec.num_outer, features * spec.num_of_feature
        self.num_parameters = self.num_of_features + spec.num_small
        # What the gradient is split into, and what is then to be viewed in another shape.
        shapes = adapters * spec.shapes(features)
        self.sizes = [math.prod(shape) for shape in shapes]
        self.matrices = [(i, shape) for i, shape in enumerate(shapes) if len(shape) > 1]
        # Which parameters stand one behind the other in flat ones, and how long these are.
        each = len(shapes) // adapters
        kinds = [[i for i in range(each) if (len(shapes[i]) > 1) == is_matrix] for is_matrix in (True, False)]
        self.flat_indices = [each * adapter + i for adapter in range(adapters) for kind in kinds for i in kind]
        self.flat_sizes = adapters * [sum(self.sizes[i] for i in kind) for kind in kinds]
        self._pack: dict[tuple[int, ...], Launch] = {}
        self._plan_forward()
        # In fp32 the kernels' products are as exact, and no slower.
        self.by_products = dtype != torch.float32 and self._num_tokens >= PRODUCT_TOKENS
        self._plan_products() if self.by_products else self._plan_tiles()
        self.latent_blocks = self._blocks("backward_latents")
        self.sums_fit = spec.sums_fit and dtype != torch.float32
        self.latent_programs = self.latent_blocks
        if self.sums_fit:  # a row of sums each: no more of them than run at a time
            self.latent_programs = min(self.latent_blocks, cdiv(2 * self._processors, adapters))
        self.backward_latents = self._launch(
            "backward_latents", (adapters * self.latent_programs,), CHUNKS=self.backward_chunks, SUMS=self.sums_fit
        )
        if spec.decoder_layers > 1:
            inner, blocks = spec.decoder_layers - 1, cdiv(spec.decoder_hidden, self._tile("backward_inner")[1])
            self.inner_chunks, self.inner_chunk = self._over_tokens("backward_inner", adapters * inner * blocks)
            self.backward_inner = self._launch("backward_inner", (adapters * inner, self.inner_chunks, blocks))

    def _plan_forward(self) -> None:
        """The kernels of the forward, the same for every number of tokens."""
        blocks, self.encode_chunks, self.encode_chunk = self._over_features("encode")
        self.encode = self._launch("encode", (blocks, self.encode_chunks))
        blocks = self.adapters * self._blocks("latents")
        self.latents = self._launch("latents", (blocks,), CHUNKS=self.encode_chunks)
        blocks, self.likelihood_chunks, self.likelihood_chunk = self._over_features("likelihood")
        grid = (blocks, self.likelihood_chunks)
        self.likelihood = self._launch("likelihood", grid, STATS=False)
        self.likelihood_with_statistics = self._launch("likelihood", grid, STATS=True)

    def _plan_tiles(self) -> None:
        """The likelihood's backward and the gradients to x and to what has values for each feature, each in a kernel
        that computes the reconstruction tile by tile."""
        blocks, self.backward_chunks, self.backward_chunk = self._over_features("backward_likelihood")
        self.backward_likelihood = self._launch("backward_likelihood", (blocks, self.backward_chunks))
        blocks = cdiv(self._features, self._tile("backward_input")[1])
        grid = (blocks, self._blocks("backward_input"))
        self.backward_input = self._launch("backward_input", grid)
        blocks = self.adapters * cdiv(self._features, self._tile("backward_features")[1])
        self.feature_chunks, self.feature_chunk = self._over_tokens("backward_features", blocks)
        self.backward_features = self._launch("backward_features", (blocks, self.feature_chunks))

    def _plan_products(self) -> None:
        """The same by products of the matrix library."""
        self.backward_chunks = self.feature_chunks = 1
        self.product_rows = min(PRODUCT_ROWS, self._num_tokens)
        tokens, features = self._tile("backward_residual")[:2]
        blocks = cdiv(self._features, features)
        # A row of sums each, and enough programs to keep the memory busy.
        self.residual_chunks = min(cdiv(self.product_rows, tokens), max(1, 8 * self._processors // blocks))
        self.residual_chunk = cdiv(self.product_rows, self.residual_chunks)
        grid = (blocks, self.residual_chunks)
        self.backward_residual = self._launch("backward_residual", grid, NEEDS_X=False)
        self.backward_residual_to_x = self._launch("backward_residual", grid, NEEDS_X=True)

    @cached_property
    def order(self) -> Tensor:
        """See `flat_order`."""
        return flat_order(self._spec, self._features, self._device)

    def pack(self, sizes_up: tuple[int, ...]) -> Launch:
        """For up-projections of so many numbers each, for which Triton compiles."""
        if sizes_up not in self._pack:
            spec, block = self._spec, 1024
            widest = max(2 * spec.encoder_hidden, spec.decoder_hidden)
            largest = max(*sizes_up, self._features * widest, 2 * self._features + spec.num_small)
            grid = (cdiv(largest, block), self.adapters)
            self._pack[sizes_up] = self._launch("pack", grid, BLOCK=block, PAIRS=spec.pairs)
        return self._pack[sizes_up]

    def _tile(self, kernel: str) -> tuple[int, int, int, int]:
        exact = self._dtype == torch.float32
        table = _INTERPRETED_TILES if not self._on_gpu else _EXACT_TILES if exact else NARROW_TILES
        tokens, features, warps, stages = table[kernel]
        spec = self._spec
        if kernel == "encode":
            if spec.encoder_hidden > 32:  # what a program must hold
                features = min(features, 32)
            # The bytes, here and below, are those that Triton's compiler takes.
            rows = tokens + self.parts * _padded(2 * spec.encoder_hidden)
            while (stages - 1) * rows * features * self._dtype.itemsize > self._shared_memory:
                stages -= 1
        if kernel == "backward_latents" and self.by_products and spec.encoder_hidden <= 64:
            tokens *= 2  # one gradient is handed to it, not chunks of a sum
        if kernel == "backward_features":
            of_token = 4 * _padded(spec.encoder_hidden) + 2 * _padded(spec.decoder_hidden) + 4 * features + 4
            while tokens * of_token + 2 * features * _padded(spec.decoder_hidden) > self._shared_memory:
                tokens //= 2
        return tokens, features, warps, stages

    def _blocks(self, kernel: str) -> int:
        return cdiv(self._num_tokens, self._tile(kernel)[0])

    def _over_features(self, kernel: str) -> tuple[int, int, int]:
        """Blocks of tokens of all adapters, chunks of features, features of a chunk."""
        blocks, tile = self.adapters * self._blocks(kernel), self._tile(kernel)[1]
        steps, chunks = cdiv(self._features, tile), 1
        while chunks < min(8, steps) and blocks * chunks < 3 * self._processors:
            chunks *= 2
        chunk = cdiv(steps, chunks) * tile
        return blocks, cdiv(self._features, chunk), chunk

    def _over_tokens(self, kernel: str, programs: int) -> tuple[int, int]:
        """Chunks of tokens and tokens of a chunk, where each chunk has so many programs."""
        chunks = min(max(1, self._processors // programs), self._blocks(kernel))
        return chunks, cdiv(self._num_tokens, chunks)

    def _launch(self, kernel: str, grid: tuple[int, ...], **constants: Any) -> Launch:
        values, options = constants_of(self._spec, self._dtype) | constants, {}
        values |= {"G": self.adapters, "GB": 1 << (self.adapters - 1).bit_length(), "PARTS": self.parts}
        if kernel != "pack":
            values["BT"], values["BD"], options["num_warps"], options["num_stages"] = self._tile(kernel)
        names = getattr(kernels(), f"{kernel}_kernel").arg_names
        return Launch(kernel, grid, {name: value for name, value in values.items() if name in names} | options)


@lru_cache(maxsize=256)  # lengths of rows differ from batch to batch
def plan_of(spec: Spec, dtype: torch.dtype, shape: tuple[int, int], adapters: int, device: torch.device) -> Plan:
    """The plan for x of that shape, made once."""
    return Plan(spec, dtype, shape, adapters, device)
