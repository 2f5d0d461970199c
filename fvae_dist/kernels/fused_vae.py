"""The training forward of one layer's VAE in one kernel, its backward in two, as an autograd function.

Which layers it takes says `problem`; what it computes is `fvae_dist.adapter.vae.FactorizedVAE.forward`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.bfloat16, torch.float32)
WIDEST = 128
DEEPEST_DECODER = 3


class Coefficients(NamedTuple):
    """The negative ELBO of a token as a linear function of its terms."""

    nll: float
    kl_z1: float
    kl_z2: float
    z1_sq: float
    z2_sq: float
    constant: float


@dataclass(frozen=True)
class Spec:
    """What the kernels need to know of a layer beside its tensors."""

    r: int
    encoder_hidden: int
    encoder_dropout: float
    decoder_hidden: int
    decoder_layers: int
    decoder_dropout: float
    concat: bool
    prior_mean: float
    prior_std: float
    coefficients: Coefficients

    @property
    def num_small(self) -> int:
        """Length of the vector of small parameters, see `vae_triton`."""
        r, hidden, width = self.r, self.encoder_hidden, self.decoder_hidden
        first = (2 * r if self.concat else r) * width + width
        return 2 * hidden + 4 * r * (hidden + 1) + first + (self.decoder_layers - 1) * width * (width + 1)

    @property
    def num_outer(self) -> int:
        """How many of them stand before the decoder's inner layers."""
        return self.num_small - (self.decoder_layers - 1) * self.decoder_hidden * (self.decoder_hidden + 1)

    @property
    def sums_fit(self) -> bool:
        """Whether a program can hold the gradients of heads and first layer, in 16 bit, beside its tokens."""
        return max(self.r, self.encoder_hidden) <= 32

    @property
    def num_words(self) -> int:
        """Random words of a token for dropout: two decisions each."""
        encoders = 2 * self.encoder_hidden if self.encoder_dropout else 0
        decoder = self.decoder_layers * self.decoder_hidden if self.decoder_dropout else 0
        return (encoders + decoder + 1) // 2


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
    if device.type != "cuda" and not _kernels().INTERPRETED:
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
        x, keys, kernels = x.contiguous(), keys.contiguous(), _kernels()
        (num_tokens, features), constants, c = x.shape, _constants(spec, x.dtype), spec.coefficients
        wide = partial(x.new_empty, dtype=torch.float32)
        z1, z2, terms = wide((num_tokens, spec.r)), wide((num_tokens, spec.r)), wide((5, num_tokens))
        encoded, posterior = wide((num_tokens, 2 * spec.encoder_hidden)), wide((num_tokens, 4, spec.r))
        decoded = x.new_empty((spec.decoder_layers, num_tokens, spec.decoder_hidden))
        flat = torch.cat([parameter.reshape(-1) for parameter in small])
        with _on(x):
            trunks, narrow_weight = _pack(spec, x, trunk1, trunk2, out_weight)
            tiles, grid, chunk = _over_features("encode", x, spec)
            products = wide((grid[1], *encoded.shape))
            kernels.encode_kernel[grid](
                x,
                trunks,
                products,
                num_tokens,
                features,
                chunk,
                PARTS=len(trunks),
                **_only(constants, "H2 HB2"),
                **tiles,
            )
            tiles = _tiles("latents", x)
            kernels.latents_kernel[(_cdiv(num_tokens, tiles["BT"]),)](
                products, keys, flat, z1, z2, terms, encoded, posterior, decoded, num_tokens, salt, *c[1:],
                spec.prior_mean, spec.prior_std, CHUNKS=grid[1], **_only(constants, _LATENTS), **tiles,
            )  # fmt: skip
            tiles, grid, chunk = _over_features("likelihood", x)
            nll = wide((grid[1], 2, num_tokens) if with_statistics else (grid[1], num_tokens))
            kernels.likelihood_kernel[grid](
                x, narrow_weight, out_bias, scale, decoded[-1], nll, num_tokens, features, chunk, STATS=with_statistics,
                **_only(constants, "W WB"), **tiles,
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
        spec, (num_tokens, features), kernels = ctx.spec, x.shape, _kernels()
        hidden, width, depth = spec.encoder_hidden, spec.decoder_hidden, spec.decoder_layers
        constants, c, wide = _constants(spec, x.dtype), spec.coefficients, partial(x.new_empty, dtype=torch.float32)
        d_z1, d_loss = d_z1.contiguous(), d_loss.contiguous()
        d_decoded, d_encoded = torch.empty_like(decoded), x.new_empty((num_tokens, 2 * hidden))
        output, sizes = (narrow_weight, out_bias, scale, decoded[-1]), (num_tokens, features)
        d_x = None
        with _on(x):
            tiles, grid, chunk = _over_features("backward_likelihood", x)
            d_last = wide((grid[1], num_tokens, width))
            kernels.backward_likelihood_kernel[grid](
                x, *output, d_loss, d_last, *sizes, chunk, c.nll, **_only(constants, "W WB"), **tiles
            )
            tiles = _tiles("backward_latents", x)
            blocks, sums = _cdiv(num_tokens, tiles["BT"]), spec.sums_fit and x.dtype != torch.float32
            programs = min(blocks, 2 * _processors(x)) if sums else blocks
            of_tokens = wide((programs, spec.num_outer) if sums else 0)
            d_posterior = wide(0 if sums else posterior.shape)
            kernels.backward_latents_kernel[(programs,)](
                d_last, flat, z1, z2, encoded, posterior, decoded, d_loss, d_z1, d_decoded, d_encoded, d_posterior,
                of_tokens, num_tokens, blocks, *c[1:5], spec.prior_mean, spec.prior_std, CHUNKS=grid[1],
                SUMS=sums, **_only(constants, _BACKWARD_LATENTS), **tiles,
            )  # fmt: skip
            if ctx.needs_input_grad[3]:
                d_x, tiles = torch.empty_like(x), _tiles("backward_input", x)
                kernels.backward_input_kernel[(_cdiv(features, tiles["BD"]), _cdiv(num_tokens, tiles["BT"]))](
                    x,
                    trunks,
                    *output,
                    d_encoded,
                    d_loss,
                    d_x,
                    *sizes,
                    c.nll,
                    **_only(constants, "H2 HB2 W WB"),
                    **tiles,
                )
            of_inner = _inner_gradients(spec, constants, x, decoded, d_decoded) if depth > 1 else None
            tiles = _tiles("backward_features", x)
            chunks = _token_chunks(x, _cdiv(features, tiles["BD"]), tiles["BT"])
            of_features = wide((chunks, features * (width + 2 + 2 * hidden)))
            kernels.backward_features_kernel[(_cdiv(features, tiles["BD"]), chunks)](
                x, *output, d_encoded, d_loss, of_features, *sizes, c.nll, _cdiv(num_tokens, chunks),
                **_only(constants, "H2 HB2 W WB"), **tiles,
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
    _kernels().pack_kernel[(_cdiv(max(trunks[0].numel(), narrow.numel()), block),)](
        trunk1.contiguous(), trunk2.contiguous(), out_weight.contiguous(), trunks, narrow, x.shape[1],
        H=spec.encoder_hidden, W=spec.decoder_hidden, INTERPRETED=_kernels().INTERPRETED, BLOCK=block,
    )  # fmt: skip
    return trunks, narrow


def _inner_gradients(spec: Spec, constants: dict[str, Any], x: Tensor, decoded: Tensor, d_decoded: Tensor) -> Tensor:
    """Of the decoder's inner layers, a row of weights and biases for each chunk of tokens."""
    tiles, width, inner = _tiles("backward_inner", x), spec.decoder_hidden, spec.decoder_layers - 1
    blocks = _cdiv(width, tiles["BD"])
    chunks = _token_chunks(x, inner * blocks, tiles["BT"])
    sums = x.new_empty((chunks, inner * width * (width + 1)), dtype=torch.float32)
    _kernels().backward_inner_kernel[(inner, chunks, blocks)](
        decoded, d_decoded, sums, len(x), _cdiv(len(x), chunks), **_only(constants, "W WB DEPTH"), **tiles
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


# ----------------------------------------------------------------------------------------------------------- launching


@lru_cache
def _kernels() -> Any:
    """The kernels, compiled by their first call; Triton decides at import whether it interprets them instead."""
    from fvae_dist.kernels import vae_triton

    return vae_triton


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _padded(size: int) -> int:
    """A power of two that tl.dot takes."""
    return max(16, 1 << (size - 1).bit_length())


def _on(x: Tensor) -> torch.cuda.device:
    return torch.cuda.device(x.device if x.is_cuda else -1)


@lru_cache
def _num_processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _processors(x: Tensor) -> int:
    return _num_processors(x.device.index) if x.is_cuda else 2


_ALWAYS = "PRECISION INTERPRETED"
_BACKWARD_LATENTS = "R RB H HB W WB DEPTH CONCAT ENCODER_P DECODER_P"
_LATENTS = f"{_BACKWARD_LATENTS} WORDS ENCODER_THRESHOLD DECODER_FIRST DECODER_THRESHOLD HEAD_PRECISION"


def _only(constants: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: constants[name] for name in (*names.split(), *_ALWAYS.split())}


@lru_cache
def _constants(spec: Spec, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments."""
    exact = dtype == torch.float32
    encoder = 2 * spec.encoder_hidden if spec.encoder_dropout else 0
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
        "DECODER_FIRST": encoder,
        "DECODER_THRESHOLD": round(spec.decoder_dropout * 2**32),
        "DECODER_P": spec.decoder_dropout,
        # tf32 (10 bits) is finer than a 16-bit x; before an exponential nothing is rounded, for an fp32 x nowhere.
        "PRECISION": "tf32x3" if exact else "tf32",
        "HEAD_PRECISION": "tf32x3",
        "INTERPRETED": _kernels().INTERPRETED,
    }


# Tokens and features of a tile, warps, pipeline stages.
_NARROW_TILES = {
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


def _tiles(kernel: str, x: Tensor, spec: Spec | None = None) -> dict[str, int]:
    """Arguments of a kernel's launch; `spec` where the encoders' width counts for what a program must hold."""
    table = _INTERPRETED_TILES if not x.is_cuda else _EXACT_TILES if x.dtype == torch.float32 else _NARROW_TILES
    tokens, features, warps, stages = table[kernel]
    if spec is not None and spec.encoder_hidden > 32:
        features = min(features, 32)
    return {"BT": tokens, **({"BD": features} if features else {}), "num_warps": warps, "num_stages": stages}


def _over_features(kernel: str, x: Tensor, spec: Spec | None = None) -> tuple[dict[str, int], tuple[int, int], int]:
    """Tiles, grid (blocks of tokens, chunks of features), features of a chunk: enough programs for all processors."""
    tiles = _tiles(kernel, x, spec)
    blocks, steps = _cdiv(len(x), tiles["BT"]), _cdiv(x.shape[1], tiles["BD"])
    chunks = 1
    while chunks < min(8, steps) and blocks * chunks < 3 * _processors(x):
        chunks *= 2
    chunk = _cdiv(steps, chunks) * tiles["BD"]
    return tiles, (blocks, _cdiv(x.shape[1], chunk)), chunk


def _token_chunks(x: Tensor, programs: int, tile: int) -> int:
    """Into how many chunks the tokens are split so that every processor has a program."""
    return min(max(1, _processors(x) // programs), _cdiv(len(x), tile))
