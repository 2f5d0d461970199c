"""`benchmark.py attention`: causal attention alone, forward and backward, on each backend that runs here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fvae_dist.benchmarking.floor import Ceilings, Phase
from fvae_dist.benchmarking.flops import attention_forward
from fvae_dist.benchmarking.samples import add_times
from fvae_dist.benchmarking.timing import Measured, drop_gradients, free_memory, measure_in_turn

FLASH = "flash_attention_2"
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
BACKENDS = [*SDPA, FLASH]


@dataclass(frozen=True)
class AttentionRun:
    """What `attention` was asked for."""

    tokens: list[int]
    backends: list[str]
    heads: int
    kv_heads: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype
    rounds: int
    warm_up: int


def benchmark_attention(run: AttentionRun, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Yield a row for every number of tokens and backend."""
    for tokens in run.tokens:
        measured = _measure(run, tokens)
        yield from (_row(run, ceilings, tokens, name, measured[name]) for name in run.backends)
        free_memory(run.device)


def _measure(run: AttentionRun, tokens: int) -> dict[str, Measured]:
    shapes = [(1, heads, tokens, run.head_dim) for heads in (run.heads, run.kv_heads, run.kv_heads)]
    q, k, v = (torch.randn(shape, device=run.device, dtype=run.dtype, requires_grad=True) for shape in shapes)
    calls: dict[str, Callable[[], object]] = {name: _call(name, q, k, v) for name in run.backends}
    return measure_in_turn(calls, run.device, run.rounds, run.warm_up)


def _call(name: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    def call() -> None:
        drop_gradients((q, k, v))
        if name == FLASH:
            out = _flash(q, k, v)
            out.backward(torch.ones_like(out))
            return
        with sdpa_kernel(SDPA[name]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            out.backward(torch.ones_like(out))

    return call


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        raise ValueError("flash-attn is not installed") from None
    return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)


def _row(run: AttentionRun, ceilings: Ceilings, tokens: int, name: str, result: Measured) -> dict[str, Any]:
    """Operations: the forward's two products and the backward's five; bytes: q, k, v, out and their gradients."""
    forward = attention_forward(tokens, run.heads, run.head_dim)
    item = tokens * run.head_dim * run.dtype.itemsize
    inputs, outputs = item * (run.heads + 2 * run.kv_heads), item * run.heads
    phases = Phase(inputs + outputs, forward), Phase(2 * inputs + 2 * outputs, 2.5 * forward)
    row: dict[str, Any] = {"tokens": tokens, "variant": name, "label": name}
    row["floor_ms"] = 1e3 * sum(phase.seconds(ceilings) for phase in phases)
    if result.error:
        return row | {"note": result.error.removeprefix("ValueError: ")}
    row["tflops"] = 3.5 * forward / add_times(row, result.ms) / 1e12
    row["extra_mib"] = None if result.extra_bytes is None else result.extra_bytes / 2**20
    return row
