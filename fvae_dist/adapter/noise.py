"""Where the noise of the latents and of dropout comes from.

By default from torch's default generator, which checkpointing restores for recomputation. A `TokenNoise` makes it a
pure function of (seed, step, layer, document, position) instead: the same tokens get the same noise in whatever
micro-batch, on whatever rank, padded or packed, so that a run does not depend on how it was laid out.

The stream: a token's key is a 64-bit hash of its document's tokens and of its position in it; the layer's salt is a
hash of seed, step and the layer's name (and, if it runs more than once, which time it is); word c of a token is
splitmix64's finalizer of key + salt + c * GOLDEN. A word's halves give two uniforms: a Box-Muller pair (one normal for
z1, one for z2), or two dropout decisions. Two documents with equal tokens in one step share their noise.

Sources: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014); Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (2011) for counter-based streams.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

HALF_BITS = 32
HALF_MASK = 2**HALF_BITS - 1
TOKEN_KEYS = "fvae_token_keys"  # in a batch that is a part of one: the keys its tokens have in the whole


class Draws(NamedTuple):
    """All randomness of one layer's forward."""

    eps1: Tensor
    eps2: Tensor
    keeps: list[Tensor | None]


class GeneratorNoise:
    """Noise from torch's default generator."""

    def draw(self, like: Tensor, dropouts: list[tuple[int, float]]) -> Draws:
        """eps1 and eps2 as `like` (..., R); for each (width, p) a boolean (..., width) that is False with rate p."""
        keeps = [
            torch.empty((*like.shape[:-1], width), dtype=torch.bool, device=like.device).bernoulli_(1 - p)
            if p
            else None
            for width, p in dropouts
        ]
        return Draws(torch.randn_like(like), torch.randn_like(like), keeps)

    def stream(self, num_tokens: int, device: torch.device) -> LayerNoise:
        """A stream begun at random by the CPU's generator, for kernels that compute their noise themselves."""
        return LayerNoise(_numbers(num_tokens, device), draw_ticket())


class LayerNoise:
    """The counter-based stream of one layer in one forward."""

    def __init__(self, keys: Tensor, salt: int):
        self.keys = keys
        self.salt = salt

    def draw(self, like: Tensor, dropouts: list[tuple[int, float]]) -> Draws:
        """As `GeneratorNoise.draw`, as a function of the tokens alone."""
        rows, r = like.shape[:-1], like.shape[-1]
        widths = [width if p else 0 for width, p in dropouts]
        words = self._words(like.device, r + (sum(widths) + 1) // 2)
        uniform1, uniform2 = (_uniform(half, like.dtype) for half in _halves(words[:, :r]))
        radius, angle = (-2 * uniform1.log()).sqrt(), 2 * math.pi * uniform2
        decisions = torch.cat(_halves(words[:, r:]), dim=-1)[:, : sum(widths)].split(widths, dim=-1)
        keeps = [
            (decision >= round(p * 2**HALF_BITS)).view(*rows, width) if p else None
            for decision, (width, p) in zip(decisions, dropouts, strict=True)
        ]
        return Draws((radius * angle.cos()).view(like.shape), (radius * angle.sin()).view(like.shape), keeps)

    def stream(self, num_tokens: int, device: torch.device) -> LayerNoise:
        return self

    def _words(self, device: torch.device, count: int) -> Tensor:
        """(T, count) int64, all bits random."""
        counters = torch.arange(count, device=device) * _GOLDEN + self.salt
        return _mix(self.keys.to(device)[:, None] + counters)


class TokenNoise:
    """Layout-independent noise for the forward of one batch; give it to `side_loss.collect(model, noise=...)`.

    Args:
        batch: `input_ids` (B, T) and, where it has them, 2-D `attention_mask` and `position_ids`. Positions that start
            anew at 0 start another document (packing). Or TOKEN_KEYS (B, T), made of the rows that it is a part of.
        seed: of the run.
        step: optimizer step; every step has noise of its own.
    """

    def __init__(self, batch: Mapping[str, Any], seed: int, step: int):
        keys = batch.get(TOKEN_KEYS)
        if keys is None:
            keys = token_keys(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"))
        self.keys = keys.flatten()
        self.seed = seed
        self.step = step

    def of_layer(self, name: str, num_tokens: int) -> LayerNoise:
        """The stream of the layer of that name, which sees `num_tokens` tokens.

        Raises:
            ValueError: it does not see the tokens of the batch, one by one.
        """
        if num_tokens != len(self.keys):
            raise ValueError(
                f"{name} saw {num_tokens} tokens where the batch has {len(self.keys)}: layers that see only some "
                "tokens (experts of a mixture, cross-attention) cannot have noise that is keyed by token"
            )
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{name}".encode(), digest_size=8).digest()
        return LayerNoise(self.keys, int.from_bytes(digest, "little", signed=True))


def token_keys(input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
    """A 64-bit key for each token, (B, T) -> (B, T) int64: a hash of its document's content and its position there.

    Independent of padding, of packing, and of where in a batch the document stands. Keys of padding are meaningless.
    """
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    position = real.cumsum(-1) - 1 if position_ids is None else position_ids.expand_as(input_ids)
    starts = (position == 0) & (real == 1)
    starts[:, 0] = True
    document = starts.flatten().cumsum(0) - 1
    position = position.long()  # 32 bits would overflow
    token = _mix(input_ids.long() * _GOLDEN + _mix(position + 1)) * real
    content = torch.zeros_like(document).index_add_(0, document, token.flatten())
    return _mix(content[document].view_as(input_ids) + position * _GOLDEN)


# ----------------------------------------------------------------------------------- finding it again in recomputation

GENERATOR = GeneratorNoise()
Noise = GeneratorNoise | LayerNoise
# Ticket -> the noise of the forwards that drew it and whose graphs are alive.
_live: dict[int, list[ReferenceType[_Remembered]]] = {}
# Of forwards without a graph of their own (frozen, first in the model), whose region may be recomputed all the same.
_without_graph: deque[tuple[int, Noise]] = deque(maxlen=512)


def draw_ticket() -> int:
    """A number from the CPU's default generator: checkpointing makes recomputation draw the same one again.

    It is what a layer can know a forward by in both of its runs: by then the forward's caller and its batch are gone,
    and other batches may have run in between.
    """
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())


def in_backward() -> bool:
    """Whether the backward pass is running, so that a forward now is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class _Remembered:
    """Holds one forward's noise; the graph holds it."""

    def __init__(self, ticket: int, noise: Noise):
        self.ticket = ticket
        self.noise = noise


def remember(ticket: int, noise: Noise, outputs: tuple[Tensor, ...]) -> None:
    """Make the noise findable by its ticket for as long as the graph of one of `outputs` lives."""
    if not torch.is_grad_enabled():
        return
    needed = [output for output in outputs if output.requires_grad]
    if not needed:
        _without_graph.append((ticket, noise))
        return
    remembered = _Remembered(ticket, noise)
    reference = ref(remembered, partial(_forget, ticket))  # made first: to make it may free another of this ticket
    _live.setdefault(ticket, []).append(reference)
    for output in needed:
        node: Any = output.grad_fn
        node.metadata.setdefault("fvae_noise", []).append(remembered)


def _forget(ticket: int, reference: ReferenceType[_Remembered]) -> None:
    references = _live.get(ticket, [])
    if reference in references:
        references.remove(reference)
    if not references:
        _live.pop(ticket, None)


def recall(ticket: int) -> Noise:
    """The noise of the forward that is being recomputed.

    Raises:
        RuntimeError: it cannot be told, and other noise would give silently wrong gradients.
    """
    alive = [remembered.noise for reference in _live.get(ticket, []) if (remembered := reference()) is not None]
    found = alive or [noise for other, noise in _without_graph if other == ticket]
    if not found:
        raise RuntimeError(
            "recomputation cannot find the noise of its forward: checkpointing must restore the random state "
            "(preserve_rng_state=True)"
        )
    if not all(_is_same(found[0], other) for other in found[1:]):
        raise RuntimeError(
            "recomputation cannot tell the noise of its forward from another's that began in the same random state; "
            "do not reseed between forwards whose backward passes are still to come"
        )
    return found[-1]  # of the same forward as what its neighbours find


def _is_same(a: Noise, b: Noise) -> bool:
    if isinstance(a, LayerNoise) and isinstance(b, LayerNoise):
        return a.salt == b.salt and (a.keys is b.keys or torch.equal(a.keys, b.keys))
    return type(a) is type(b)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _mix(words: Tensor) -> Tensor:
    """splitmix64's finalizer; overwrites its argument. int64 arithmetic wraps, its shifts carry the sign."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        words ^= (words >> shift) & (2 ** (64 - shift) - 1)
        words *= factor
    words ^= (words >> 31) & (2**33 - 1)
    return words


@lru_cache(maxsize=4)
def _numbers(num_tokens: int, device: torch.device) -> Tensor:
    return _mix(torch.arange(1, num_tokens + 1, device=device) * _GOLDEN)


def _halves(words: Tensor) -> tuple[Tensor, Tensor]:
    return (words >> HALF_BITS) & HALF_MASK, words & HALF_MASK


def _uniform(half: Tensor, dtype: torch.dtype) -> Tensor:
    """(0, 1) in 2^24 steps, which fp32 holds exactly."""
    return ((half >> 8).to(dtype) + 0.5) * 2.0**-24
