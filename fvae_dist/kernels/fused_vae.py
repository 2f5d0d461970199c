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
        x, keys = x.contiguous(), keys.contiguous()
        num_tokens, features = x.shape
        flat = torch.cat([parameter.reshape(-1) for parameter in small])
        narrow_weight = out_weight.to(x.dtype)
        wide = partial(x.new_empty, dtype=torch.float32)
        z1, z2, terms = wide((num_tokens, spec.r)), wide((num_tokens, spec.r)), wide((5, num_tokens))
        encoded, posterior = wide((num_tokens, 2 * spec.encoder_hidden)), wide((num_tokens, 4, spec.r))
        decoded = x.new_empty((spec.decoder_layers, num_tokens, spec.decoder_hidden))
        squared_error = wide(num_tokens if with_statistics else 0)
        c, constants, tiles = spec.coefficients, _constants(spec, x.dtype), _tiles("forward", spec, x)
        with _on(x):
            _kernels().forward_kernel[(_cdiv(num_tokens, tiles["BT"]),)](
                x, keys, trunk1, trunk2, flat, narrow_weight, out_bias, scale, z1, z2, terms, encoded, posterior,
                decoded, squared_error, num_tokens, features, salt, *c, spec.prior_mean, spec.prior_std,
                STATS=with_statistics, NARROW=x.dtype != torch.float32, **constants, **tiles,
            )  # fmt: skip
        ctx.spec, ctx.shapes = spec, [parameter.shape for parameter in small]
        ctx.save_for_backward(
            x, trunk1, trunk2, flat, narrow_weight, out_bias, scale, z1, z2, encoded, posterior, decoded
        )
        ctx.mark_non_differentiable(terms, posterior, squared_error)
        return z1, terms[0].clone(), terms, posterior, squared_error

    @staticmethod
    @once_differentiable
    def backward(ctx, d_z1, d_loss, *_):  # type: ignore[override]
        x, trunk1, trunk2, flat, narrow_weight, out_bias, scale, z1, z2, encoded, posterior, decoded = ctx.saved_tensors
        spec, (num_tokens, features) = ctx.spec, x.shape
        hidden, width, depth = spec.encoder_hidden, spec.decoder_hidden, spec.decoder_layers
        d_z1, d_loss, need_dx = d_z1.contiguous(), d_loss.contiguous(), ctx.needs_input_grad[3]
        d_x = torch.empty_like(x) if need_dx else x.new_empty(0)
        d_decoded, d_encoded = torch.empty_like(decoded), x.new_empty((num_tokens, 2 * hidden))
        c, constants, tiles = spec.coefficients, _constants(spec, x.dtype), _tiles("tokens", spec, x)
        wide = partial(x.new_empty, dtype=torch.float32)
        blocks = _cdiv(num_tokens, tiles["BT"])
        of_tokens = wide((min(blocks, 2 * _processors(x)), spec.num_outer))
        chunks = _chunks("inner", spec, x)
        of_inner = wide((chunks, (depth - 1) * width * (width + 1)))
        splits = _chunks("features", spec, x)
        of_features = wide((splits, features * (width + 2 + 2 * hidden)))
        with _on(x):
            _kernels().backward_tokens_kernel[(len(of_tokens),)](
                x, trunk1, trunk2, flat, narrow_weight, out_bias, scale, z1, z2, encoded, posterior, decoded, d_loss,
                d_z1, d_x, d_decoded, d_encoded, of_tokens, num_tokens, features, blocks, *c[:5],
                spec.prior_mean, spec.prior_std, NEED_DX=need_dx,
                **_only(constants, "R RB H HB W WB DEPTH CONCAT ENCODER_P DECODER_P PRECISION INTERPRETED"), **tiles,
            )  # fmt: skip
            if depth > 1:
                _kernels().backward_inner_kernel[(depth - 1, chunks)](
                    decoded, d_decoded, of_inner, num_tokens, _cdiv(num_tokens, chunks),
                    **_only(constants, "W WB DEPTH PRECISION INTERPRETED"), **_tiles("inner", spec, x),
                )  # fmt: skip
            tiles = _tiles("features", spec, x)
            _kernels().backward_features_kernel[(_cdiv(features, tiles["BD"]), splits)](
                x, narrow_weight, out_bias, scale, decoded[-1], d_encoded, d_loss, of_features, num_tokens, features,
                c.nll, _cdiv(num_tokens, splits), **_only(constants, "H HB W WB PRECISION INTERPRETED"), **tiles,
            )  # fmt: skip
        sizes = [shape.numel() for shape in ctx.shapes]
        outer = len(sizes) - 2 * (depth - 1)
        small = (*_total(of_tokens).split(sizes[:outer]), *(_total(of_inner).split(sizes[outer:]) if depth > 1 else ()))
        d_weight, d_bias, d_scale, d_trunk1, d_trunk2 = _total(of_features).split(
            [features * width, features, features, hidden * features, hidden * features]
        )
        trunks = (d_trunk1.view(hidden, features), d_trunk2.view(hidden, features))
        large = (*trunks, d_weight.view(features, width), d_bias, d_scale)
        small = tuple(part.view(shape) for part, shape in zip(small, ctx.shapes, strict=True))
        return None, None, None, d_x if need_dx else None, None, *large, *small


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


def _only(constants: dict[str, Any], names: str) -> dict[str, Any]:
    return {name: constants[name] for name in names.split()}


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


def _tiles(kernel: str, spec: Spec, x: Tensor) -> dict[str, int]:
    """Tokens and features of a tile: as many tokens as leave every processor a program."""
    if not x.is_cuda:
        return {"BT": 16} if kernel == "inner" else {"BT": 16, "BD": 32}
    narrow = x.dtype != torch.float32
    if kernel == "inner":
        return {"BT": 64 if narrow else 32, "num_warps": 4, "num_stages": 3}
    if kernel == "features":
        return {"BT": 64 if narrow else 32, "BD": 32, "num_warps": 4, "num_stages": 3}
    tokens, most = 16, 64 if narrow and spec.r <= 32 else 32 if narrow else 16
    while tokens < most and len(x) >= tokens * _processors(x):
        tokens *= 2
    return {"BT": tokens, "BD": 64 if narrow else 32, "num_warps": 4, "num_stages": 3 if kernel == "forward" else 2}


def _chunks(kernel: str, spec: Spec, x: Tensor) -> int:
    """Into how many chunks the tokens are split so that every processor has a program."""
    tiles = _tiles(kernel, spec, x)
    if kernel == "inner":
        programs = _cdiv(_processors(x), max(spec.decoder_layers - 1, 1))
    else:
        programs = max(1, _processors(x) // _cdiv(x.shape[1], tiles["BD"]))
    return min(programs, _cdiv(len(x), tiles["BT"]))
