"""`benchmark.py step`: whole training steps of a Llama with random weights on one device.

A step is what a trainer with bf16=True runs: the forward under autocast, the loss of the next token, the side loss with
noise that is keyed by token, the backward, AdamW on the adapter. No gradient clipping, no data loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fvae_dist.adapter import side_loss
from fvae_dist.adapter.noise import TokenNoise
from fvae_dist.benchmarking.attached import Attached, attach, attach_reference, put_in_place
from fvae_dist.benchmarking.floor import Ceilings, LayerSize
from fvae_dist.benchmarking.flops import ModelSize, size_of
from fvae_dist.benchmarking.reference import reference_loss
from fvae_dist.benchmarking.samples import add_times, paired_ratio
from fvae_dist.benchmarking.timing import Measured, describe, drop_gradients, free_memory, measure_in_turn
from fvae_dist.benchmarking.trial import config_of
from fvae_dist.benchmarking.variants import BASE, FUSED, LABELS, LORA, REFERENCE, TORCH, AdapterSize, autocast

TERMS = " +terms"  # behind a variant's name: with telemetry
FVAE = (TORCH, FUSED)


@dataclass(frozen=True)
class StepRun:
    """What `step` was asked for; `recompute` lists "full" and "none", `reference` is the path of a clone of it."""

    shape: str
    tokens: list[int]
    recompute: list[str]
    variants: list[str]
    targets: list[str]
    adapter: AdapterSize
    attention: str
    liger: bool
    telemetry: bool
    device: torch.device
    dtype: torch.dtype
    rounds: int
    warm_up: int
    reference: str | None = None


def benchmark_step(run: StepRun, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Yield a row for every kind of recomputation, number of tokens and variant."""
    model = build_model(run)
    size = size_of(model)
    bench = _Bench(run, model)
    for recompute in run.recompute:
        use_checkpointing(model, recompute == "full")
        for tokens in run.tokens:
            measured = bench.measure(tokens)
            for name in bench.names:
                adapted = bench.adapted_sizes(name)
                yield step_row(run, ceilings, size, adapted, recompute, tokens, name, measured)
            free_memory(run.device)


def names_of(run: StepRun) -> list[str]:
    """The variants in their order; each of FVAE's followed by itself with telemetry, if that is measured."""
    twice = [[name, name + TERMS] if run.telemetry and name in FVAE else [name] for name in run.variants]
    return [name for names in twice for name in names]


def build_model(run: StepRun) -> PreTrainedModel:
    """The frozen base on the device, in training mode."""
    torch.manual_seed(0)
    with run.device:
        model = AutoModelForCausalLM.from_config(
            config_of(run.shape), dtype=run.dtype, attn_implementation=run.attention
        )
    model.config.use_cache = False
    if run.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    return model.requires_grad_(False).train()


def use_checkpointing(model: PreTrainedModel, on: bool) -> None:
    """Non-reentrant checkpointing of every layer, or none."""
    new = hasattr(model, "activation_checkpointing_enable")  # transformers 5.23 renamed it
    if on:
        enable: Any = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    else:
        (model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable)()


class _Bench:
    """One base model and its variants, of which one at a time is in place."""

    def __init__(self, run: StepRun, model: PreTrainedModel):
        self.run, self.model = run, model
        self.attached: dict[str, Attached] = {}
        self.missing: dict[str, str] = {}
        for name in run.variants:
            try:
                self.attached[name] = self._attach(name)
            except (ValueError, RuntimeError, ImportError) as error:
                self.missing[name] = describe(error).partition(": ")[2]
        self.names = names_of(run)
        self.in_place = Attached()
        self.step = 0

    def _attach(self, name: str) -> Attached:
        if name == BASE:
            return Attached()
        if name == REFERENCE:
            assert self.run.reference is not None
            return attach_reference(self.model, self.run.reference, self.run.targets, self.run.adapter)
        return attach(self.model, self.run.adapter.config(name, self.run.targets))

    def adapted_sizes(self, name: str) -> list[tuple[int, int]]:
        """Of the linears that a variant would adapt, or adapts."""
        found = self.attached.get(name.removesuffix(TERMS), Attached()).sizes()
        return found or next((other.sizes() for other in self.attached.values() if other.layers), [])

    def measure(self, tokens: int) -> dict[str, Measured]:
        """Every variant at this length; memory is a variant's own, without what the others keep on the device."""
        run = self.run
        ids = torch.randint(1000, (1, tokens), generator=torch.Generator().manual_seed(tokens)).to(run.device)
        calls = {n: self._call(n, ids) for n in self.names if n.removesuffix(TERMS) in self.attached}
        measured = measure_in_turn(calls, run.device, run.rounds, run.warm_up, prepare=self._prepare)
        for name, result in measured.items():
            own = self.attached[name.removesuffix(TERMS)]
            others = sum(other.num_bytes() for other in self.attached.values() if other is not own)
            if result.peak_bytes is not None:
                result.peak_bytes -= others
        missing = {n: self.missing[b] for n in self.names if (b := n.removesuffix(TERMS)) in self.missing}
        return measured | {name: Measured(error=reason) for name, reason in missing.items()}

    def _prepare(self, name: str) -> None:
        for attached in self.attached.values():
            drop_gradients(attached.parameters)  # of a step that ran out of memory
        wanted = self.attached[name.removesuffix(TERMS)]
        put_in_place(self.model, wanted, self.in_place)
        self.in_place = wanted

    def _call(self, name: str, ids: Tensor) -> Callable[[], object]:
        attached = self.attached[name.removesuffix(TERMS)]
        if name == BASE:
            return lambda: self._base_step(ids)

        def call() -> None:
            self._loss(name, ids).backward()
            assert attached.optimizer is not None
            attached.optimizer.step()
            attached.optimizer.zero_grad(set_to_none=True)

        return call

    def _loss(self, name: str, ids: Tensor) -> Tensor:
        if name.removesuffix(TERMS) in FVAE:
            return self._fvae_loss(ids, name.endswith(TERMS))
        if name != REFERENCE:
            return self._task_loss(ids)
        layers = self.attached[name].layers.values()
        for layer in layers:
            reference_loss(layer)  # recomputation in the step before has left one again
        task = self._task_loss(ids)
        return 1000 * task + torch.stack([reference_loss(layer) for layer in layers]).mean()

    def _task_loss(self, ids: Tensor) -> Tensor:
        with autocast(self.run.device, self.run.dtype):
            return self.model(input_ids=ids, labels=ids).loss

    def _fvae_loss(self, ids: Tensor, with_terms: bool) -> Tensor:
        noise = TokenNoise({"input_ids": ids}, seed=0, step=self.step)
        self.step += 1
        with side_loss.collect(self.model, terms=with_terms, noise=noise) as collected:
            task = self._task_loss(ids)
        if with_terms:
            collected.sums()
        return 1000 * task + collected.neg_elbo_sum / collected.num_tokens

    def _base_step(self, ids: Tensor) -> None:
        """Nothing of it trains: the gradient goes through all layers, down to the embedded tokens."""
        embedded = self.model.get_input_embeddings()(ids).requires_grad_(True)
        with autocast(self.run.device, self.run.dtype):
            loss = self.model(inputs_embeds=embedded, labels=ids).loss
        loss.backward()


def step_row(
    run: Any,
    ceilings: Ceilings,
    size: ModelSize,
    adapted: list[tuple[int, int]],
    recompute: str,
    tokens: int,
    name: str,
    measured: dict[str, Measured],
    num_gpus: int = 1,
) -> dict[str, Any]:
    """One line of the table; `adapted` are the linears that the variant adapts, `num_gpus` share the sequence."""
    variant = name.removesuffix(TERMS)
    again = recompute == "full"
    layers = [LayerSize(dim, out, tokens, run.dtype.itemsize) for dim, out in adapted]
    floors = [floor for layer in layers if (floor := run.adapter.floor(variant, layer))]
    of_base = size.hardware_operations(tokens, again, adapters=0.0)
    floor_s = of_base / ceilings.operations_per_s + sum(floor.seconds(ceilings, again) for floor in floors)
    label = LABELS.get(variant, variant) + (", telemetry" if name.endswith(TERMS) else "")
    row: dict[str, Any] = {"recompute": recompute, "tokens": tokens, "variant": name, "label": label}
    row["floor_ms"] = 1e3 * floor_s / num_gpus
    result = measured[name]
    if result.error:
        return row | {"note": result.error}
    seconds = add_times(row, result.ms) * num_gpus
    row["tokens_per_s"] = tokens / seconds
    row["mfu"] = size.model_operations(tokens) / seconds / ceilings.operations_per_s
    operations = of_base + sum(floor.operations(again) for floor in floors)
    row["tflops"] = operations / seconds / 1e12
    row["peak_gib"] = None if result.peak_bytes is None else result.peak_bytes / 2**30
    if result.host_peak_bytes is not None:
        row["host_peak_gib"] = result.host_peak_bytes / 2**30
    others = {"ratio_to_lora": LORA} | ({"ratio_to_silent": variant} if name.endswith(TERMS) else {})
    for key, other in others.items():
        if other in measured and measured[other].ms:
            row[key] = paired_ratio(result.ms, measured[other].ms)
    return row
