"""The least that an adapted linear can take: bytes that must move and operations that must run, from its sizes alone.

Letters: T tokens, D in-features, O out-features, r latents, H width of the encoders, Hd width of the decoder. A product
of (m, k) and (k, n) is 2 m k n operations; everything else (ReLU, dropout, sampling, likelihood, casts) counts as none.

Assumed, for every phase: whatever is narrower than D and O (hidden layers, noise, dropout) never leaves the chip;
wide tensors are read or written once, in the run's dtype; parameters and their gradients are fp32, each moved once; the
phases share nothing. All operations run at the rate of large products in the run's dtype. A phase takes the longer of
its bytes at the copy bandwidth and its operations at the matmul rate; phases add up.

Adapter of FVAE-LoRA, beside the base layer's own product:

forward
    bytes: x read (T D); parameters read; z1 written (T r) for the backward; the base's output read and y written
    (2 T O); the loss per token written (T, fp32).
    operations: the first linear of both encoders over D; their further layers and heads; the decoder's hidden layers
    and its last product (2 T Hd D); B (2 T r O).
backward
    bytes: x and dy read (T D + T O); z1 read (T r); parameters read; dx written (T D); gradients of parameters written.
    operations: the decoder's last product again, because xhat (T D) is not kept; for every product the gradient of its
    weight and of its input.
recompute (with checkpointing): the forward again.

A plain LoRA (A: D -> r, B: r -> O) is counted alike, without a loss, and the bare frozen linear by its two products
(y = W x, dx = W^T dy), each of which reads the weight and one wide tensor and writes another.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from fvae_dist.adapter.config import FVAELoraConfig

FP32_BYTES = 4


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches: bytes/s of a large copy (read plus write) and operations/s of a large product."""

    bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True)
class Phase:
    """Bytes to and from memory, and operations."""

    num_bytes: float = 0.0
    operations: float = 0.0

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.num_bytes / ceilings.bytes_per_s, self.operations / ceilings.operations_per_s)

    def bound(self, ceilings: Ceilings) -> str:
        by_bytes = self.num_bytes / ceilings.bytes_per_s
        return "bytes" if by_bytes >= self.operations / ceilings.operations_per_s else "operations"


@dataclass(frozen=True)
class Floor:
    """Forward and backward of one layer; `recompute` is the forward that checkpointing repeats."""

    forward: Phase
    backward: Phase

    @property
    def recompute(self) -> Phase:
        return self.forward

    def seconds(self, ceilings: Ceilings, recompute: bool = False) -> float:
        again = self.recompute.seconds(ceilings) if recompute else 0.0
        return self.forward.seconds(ceilings) + again + self.backward.seconds(ceilings)

    def operations(self, recompute: bool = False) -> float:
        return self.forward.operations * (2 if recompute else 1) + self.backward.operations


@dataclass(frozen=True)
class LayerSize:
    """One linear and what it works on; `item_bytes` is the size of a number of the run's dtype."""

    dim: int
    out_dim: int
    tokens: int
    item_bytes: int


def base_floor(size: LayerSize) -> Floor:
    """The frozen linear, with the gradient into its input and none into its weight."""
    wide = size.tokens * (size.dim + size.out_dim) + size.dim * size.out_dim
    phase = Phase(wide * size.item_bytes, 2.0 * size.tokens * size.dim * size.out_dim)
    return Floor(phase, phase)


def lora_floor(size: LayerSize, r: int) -> Floor:
    """The adapter of a plain LoRA; without the base layer."""
    products = [(size.dim, r), (r, size.out_dim)]
    parameters = r * (size.dim + size.out_dim)
    return _adapter_floor(size, r, products, parameters, again=0.0, loss=False)


def fvae_floor(size: LayerSize, config: FVAELoraConfig) -> Floor:
    """The adapter of FVAE-LoRA; without the base layer."""
    encoder = _encoder_products(size.dim, config)
    decoder = _decoder_products(size.dim, config)
    products = 2 * encoder + decoder + [(config.r, size.out_dim)]
    xhat = 2.0 * size.tokens * decoder[-1][0] * decoder[-1][1]
    return _adapter_floor(size, config.r, products, num_parameters(size.dim, size.out_dim, config), xhat, loss=True)


def num_parameters(dim: int, out_dim: int, config: FVAELoraConfig) -> int:
    """Of one adapted layer: weights and biases of encoders and decoder, the scale of each feature, and B."""
    linears = 2 * _encoder_products(dim, config) + _decoder_products(dim, config)
    return sum(a * b + b for a, b in linears) + dim + config.r * out_dim


def _encoder_products(dim: int, config: FVAELoraConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear of one encoder."""
    widths = [dim] + [config.encoder_hidden] * config.encoder_layers
    trunk = list(pairwise(widths)) * (1 if config.encoder_shared_trunk else 2)
    return trunk + 2 * [(widths[-1], config.r)]


def _decoder_products(dim: int, config: FVAELoraConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear of the decoder, the one over D last."""
    latent = 2 * config.r if config.latent_fusion == "concat" else config.r
    return list(pairwise([latent] + [config.decoder_hidden] * config.decoder_layers + [dim]))


def _adapter_floor(
    size: LayerSize, r: int, products: list[tuple[int, int]], parameters: int, again: float, loss: bool
) -> Floor:
    """`again`: operations of what the backward computes anew; `loss`: whether a loss per token is written."""
    tokens, item = size.tokens, size.item_bytes
    once = sum(2.0 * tokens * a * b for a, b in products)
    x, y, z1 = tokens * size.dim * item, tokens * size.out_dim * item, tokens * r * item
    weights = parameters * FP32_BYTES
    per_token = tokens * FP32_BYTES if loss else 0
    return Floor(
        forward=Phase(x + weights + z1 + 2 * y + per_token, once),
        backward=Phase(x + y + z1 + weights + x + weights, again + 2 * once),
    )
