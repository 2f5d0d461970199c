"""How the kernels are launched: their compile-time arguments, tiles and grids."""

from __future__ import annotations

from functools import lru_cache
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


def on(x: Tensor) -> torch.cuda.device:
    """Where Triton launches: it takes the current device, which need not be x's."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


@lru_cache
def _num_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x: Tensor) -> int:
    """Multiprocessors of x's device; the interpreter is tested with two."""
    return _num_processors(x.device.index) if x.is_cuda else 2


@lru_cache
def arguments_of(kernel: str, spec: Spec, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of the kernel of that name, but its tile."""
    names = getattr(kernels(), f"{kernel}_kernel").arg_names
    return {name: value for name, value in constants_of(spec, dtype).items() if name in names}


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
NARROW_TILES = {
    "encode": (32, 128, 4, 3),
    "latents": (16, 0, 4, 1),
    "likelihood": (32, 64, 4, 3),
    "backward_likelihood": (32, 64, 4, 3),
    "backward_latents": (16, 0, 4, 1),
    "backward_input": (32, 128, 4, 1),
    "backward_inner": (64, 32, 4, 3),
    "backward_features": (64, 16, 4, 3),
}
_EXACT_TILES = {
    "encode": (32, 32, 4, 2),
    "latents": (16, 0, 4, 1),
    "likelihood": (32, 32, 4, 2),
    "backward_likelihood": (32, 32, 4, 2),
    "backward_latents": (16, 0, 4, 1),
    "backward_input": (32, 32, 4, 1),
    "backward_inner": (32, 32, 4, 2),
    "backward_features": (32, 32, 4, 2),
}
_INTERPRETED_TILES = {name: (16, 32 if tile[1] else 0, 4, 1) for name, tile in _EXACT_TILES.items()}


def tiles_of(kernel: str, x: Tensor, spec: Spec | None = None) -> dict[str, int]:
    """Arguments of a kernel's launch; `spec` where the encoders' width counts for what a program must hold."""
    table = _INTERPRETED_TILES if not x.is_cuda else _EXACT_TILES if x.dtype == torch.float32 else NARROW_TILES
    tokens, features, warps, stages = table[kernel]
    if spec is not None and spec.encoder_hidden > 32:
        features = min(features, 32)
    return {"BT": tokens, **({"BD": features} if features else {}), "num_warps": warps, "num_stages": stages}


def over_features(kernel: str, x: Tensor, spec: Spec | None = None) -> tuple[dict[str, int], tuple[int, int], int]:
    """Tiles, grid (blocks of tokens, chunks of features), features of a chunk: enough programs for all processors."""
    tiles = tiles_of(kernel, x, spec)
    blocks, steps = cdiv(len(x), tiles["BT"]), cdiv(x.shape[1], tiles["BD"])
    chunks = 1
    while chunks < min(8, steps) and blocks * chunks < 3 * processors(x):
        chunks *= 2
    chunk = cdiv(steps, chunks) * tiles["BD"]
    return tiles, (blocks, cdiv(x.shape[1], chunk)), chunk


def token_chunks(x: Tensor, programs: int, tile: int) -> int:
    """Into how many chunks the tokens are split so that every processor has a program."""
    return min(max(1, processors(x) // programs), cdiv(len(x), tile))
