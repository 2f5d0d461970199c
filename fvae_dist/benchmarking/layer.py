"""`benchmark.py layer`: one frozen linear and its adapter, forward and backward with the gradient into x."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from fvae_dist.adapter import side_loss
from fvae_dist.adapter.flat import flatten
from fvae_dist.adapter.noise import TokenNoise
from fvae_dist.benchmarking.floor import Ceilings, LayerSize, base_floor
from fvae_dist.benchmarking.reference import build_reference_layer, reference_loss
from fvae_dist.benchmarking.samples import add_times, paired_difference, paired_ratio
from fvae_dist.benchmarking.timing import (
    Measured,
    describe,
    device_milliseconds,
    drop_gradients,
    free_memory,
    measure_in_turn,
)
from fvae_dist.benchmarking.variants import BASE, FUSED, LABELS, LORA, REFERENCE, TORCH, AdapterSize, autocast

_NAME = "linear"


@dataclass(frozen=True)
class LayerRun:
    """What `layer` was asked for; `reference` is the path of a clone of the reference code."""

    dim: int
    out_dim: int
    tokens: list[int]
    variants: list[str]
    adapter: AdapterSize
    device: torch.device
    dtype: torch.dtype
    rounds: int
    warm_up: int
    reference: str | None = None


class OneLinear(nn.Module):
    """What PEFT adapts: a model of one linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def benchmark_layer(run: LayerRun, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Yield a row for every number of tokens and variant."""
    torch.manual_seed(0)
    linear = nn.Linear(run.dim, run.out_dim, bias=False, device=run.device, dtype=run.dtype).requires_grad_(False)
    models, missing = build_variants(run, linear)
    for tokens in run.tokens:
        measured = {name: Measured(error=reason) for name, reason in missing.items()}
        measured |= _measure(run, models, tokens)
        yield from (_row(run, ceilings, tokens, name, measured) for name in run.variants)
        free_memory(run.device)


def build_variants(run: LayerRun, linear: nn.Linear) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Variant -> its model around the one linear, and variant -> why it cannot be had here."""
    models: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    for name in run.variants:
        try:
            models[name] = _build(run, name, linear).train()
        except (ValueError, RuntimeError, ImportError) as error:
            missing[name] = describe(error).partition(": ")[2]
    return models, missing


def _build(run: LayerRun, name: str, linear: nn.Linear) -> nn.Module:
    if name == BASE:
        return OneLinear(linear)
    if name == REFERENCE:
        if run.reference is None:
            raise ValueError("--reference PATH names no clone of it")
        return OneLinear(build_reference_layer(run.reference, linear, run.adapter))  # type: ignore[arg-type]
    model = get_peft_model(OneLinear(linear), run.adapter.config(name, [_NAME]))  # type: ignore[arg-type]
    flatten(model)
    return model


def _measure(run: LayerRun, models: dict[str, nn.Module], tokens: int) -> dict[str, Measured]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, run.dim, generator=generator).to(run.device, run.dtype).requires_grad_(True)
    dy = torch.randn(1, tokens, run.out_dim, generator=generator).to(run.device, run.dtype)
    ids = torch.randint(1000, (1, tokens), generator=generator).to(run.device)
    noise = TokenNoise({"input_ids": ids}, seed=0, step=0)  # hashed once a step, not once a layer
    calls = {name: _call(run, name, model, x, dy, noise) for name, model in models.items()}
    repeats = 4 if run.device.type == "cuda" else 1

    def forget(_: str) -> None:
        for model in models.values():
            drop_gradients([x, *model.parameters()])

    measured = measure_in_turn(calls, run.device, run.rounds, run.warm_up, repeats, forget)
    for name, result in measured.items():
        forget(name)
        if not result.error:
            result.device_ms = device_milliseconds(calls[name], run.device)
    return measured


def _call(run: LayerRun, name: str, model: nn.Module, x: Tensor, dy: Tensor, noise: TokenNoise) -> Callable[[], object]:
    """Forward and backward of a variant, as a training step runs them; the gradients of the call before are dropped."""
    trained = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def call() -> None:
        drop_gradients(trained)
        side: Tensor | None = None
        with autocast(run.device, run.dtype):
            if name in (TORCH, FUSED):
                with side_loss.collect(model, terms=False, noise=noise) as collected:
                    y = model(x)
                side = collected.neg_elbo_sum / collected.num_tokens
            else:
                y = model(x)
                side = reference_loss(model.linear) if name == REFERENCE else None
        tensors, gradients = ([y], [dy.to(y.dtype)]) if side is None else ([y, side], [dy.to(y.dtype), None])
        torch.autograd.backward(tensors, gradients)  # type: ignore[arg-type]

    return call


def _row(run: LayerRun, ceilings: Ceilings, tokens: int, name: str, measured: dict[str, Measured]) -> dict[str, Any]:
    size = LayerSize(run.dim, run.out_dim, tokens, run.dtype.itemsize)
    adapter = run.adapter.floor(name, size)
    floor_s = run.adapter.layer_seconds(name, size, ceilings)
    row: dict[str, Any] = {
        "tokens": tokens,
        "variant": name,
        "label": LABELS[name],
        "floor_ms": 1e3 * floor_s,
        "adapter_floor_ms": 1e3 * adapter.seconds(ceilings) if adapter else None,
    }
    result = measured[name]
    if result.error:
        return row | {"note": result.error}
    seconds = add_times(row, result.ms)
    row["tokens_per_s"] = tokens / seconds
    operations = base_floor(size).operations() + (adapter.operations() if adapter else 0.0)
    row["tflops"] = operations / seconds / 1e12
    row["extra_mib"] = None if result.extra_bytes is None else result.extra_bytes / 2**20
    row["device_ms"] = result.device_ms
    base, lora = (measured[other].ms if other in measured else [] for other in (BASE, LORA))
    if base and adapter and result.device_ms is not None:
        row["device_above_base_ms"] = result.device_ms - (measured[BASE].device_ms or 0.0)
    if base and adapter:
        row["above_base_ms"] = paired_difference(result.ms, base)
        row["adapter_x_floor"] = row["above_base_ms"] / row["adapter_floor_ms"]
    if lora:
        row["ratio_to_lora"] = paired_ratio(result.ms, lora)
    return row
