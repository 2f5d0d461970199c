"""`benchmark.py step --gpus N`: the same steps in real training runs under ZeRO-3, one torchrun a variant.

Ours is `launch/train.py` with a recipe of this moment; `--compare trl` adds what a user would take instead, TRL's
SFTTrainer with PEFT's LoRA at its defaults (fvae_dist.benchmarking.stock), on the same data.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fvae_dist.benchmarking.attached import linears_of
from fvae_dist.benchmarking.floor import Ceilings
from fvae_dist.benchmarking.flops import size_of
from fvae_dist.benchmarking.step import TERMS, StepRun, names_of, step_row
from fvae_dist.benchmarking.timing import OUT_OF_MEMORY, Measured, describe
from fvae_dist.benchmarking.trial import (
    ROOT,
    WARM_UP,
    Setting,
    config_of,
    read_logs,
    run_to_end,
    torchrun,
    train_command,
    write_inputs,
)
from fvae_dist.benchmarking.variants import LORA, STOCK, TORCH, dtype_name


@dataclass(frozen=True)
class TrainingRun:
    """What `step --gpus` was asked for beside `step` itself; `steps` are a run's, the first few of them unmeasured."""

    step: StepRun
    num_gpus: int
    steps: int
    compare: bool


def benchmark_training(run: TrainingRun, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Yield a row for every kind of recomputation, number of tokens and variant.

    Ratios are of the medians of separate runs.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(run.step.shape))
    linears = linears_of(model, run.step.targets).values()
    size, adapted = size_of(model), [(linear.in_features, linear.out_features) for linear in linears]

    def row_of(name: str, tokens: int, recompute: str) -> dict[str, Any]:
        print(f"{name}, T = {tokens}, recompute {recompute} ...", file=sys.stderr, flush=True)
        measured = {name: measure_run(run, name, tokens, recompute)}
        return step_row(run.step, ceilings, size, adapted, recompute, tokens, name, measured)

    stock: dict[int, dict[str, Any]] = {}
    for recompute in run.step.recompute:
        for tokens in run.step.tokens:
            rows = [row_of(name, tokens, recompute) for name in names_of(run.step)]
            is_new = run.compare and tokens not in stock
            if is_new:
                stock[tokens] = row_of(STOCK, tokens, "full")  # TRL's default, whatever ours does
            _add_ratios(rows, stock.get(tokens, {}))
            yield from [*rows, stock[tokens]] if is_new else rows


def _add_ratios(rows: list[dict[str, Any]], stock: dict[str, Any]) -> None:
    ms = {row["variant"]: row.get("ms") for row in rows}
    for row in rows:
        others = {"ratio_to_lora": ms.get(LORA), "ratio_to_trl": stock.get("ms")}
        if row["variant"].endswith(TERMS):
            others["ratio_to_silent"] = ms.get(row["variant"].removesuffix(TERMS))
        row |= {key: row["ms"] / other for key, other in others.items() if other and "ms" in row}


def measure_run(run: TrainingRun, name: str, tokens: int, recompute: str) -> Measured:
    """Train with one variant; what goes wrong in the run stands in its result, the end of its log on stderr."""
    step = run.step
    variant = TORCH if name == STOCK else name.removesuffix(TERMS)  # for STOCK only the inputs are taken
    try:
        step.adapter.config(variant, step.targets)
        adapter = step.adapter.settings(variant, step.targets)
    except (ValueError, ImportError) as error:
        return Measured(error=describe(error).partition(": ")[2])
    setting = Setting(
        step.shape,
        tokens,
        recompute == "full",
        adapter,
        step.attention,
        step.liger,
        name.endswith(TERMS),
        run.steps,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = write_inputs(setting, run.num_gpus, folder)
        if name == STOCK:
            command = _stock_command(run, setting, folder)
        else:
            command = train_command(recipe, run.num_gpus, _changes(step))
        problem = run_to_end(command, folder / "log")
        if problem:
            log = (folder / "log").read_text(errors="replace")
            print(log[-3000:], file=sys.stderr)
            return Measured(error=OUT_OF_MEMORY if "OutOfMemoryError" in log else problem)
        return _read_stock(folder) if name == STOCK else _read_own(folder, tokens)


def _changes(step: StepRun) -> list[str]:
    changes = [f"training.deepspeed={ROOT / 'ds_configs' / 'zero3.json'}", f"model.dtype={dtype_name(step.dtype)}"]
    return [*changes, "training.use_cpu=true"] if step.device.type == "cpu" else changes


def _stock_command(run: TrainingRun, setting: Setting, folder: Path) -> list[str]:
    asked = {
        "length": setting.length,
        "steps": setting.steps,
        "dtype": dtype_name(run.step.dtype),
        "use_cpu": run.step.device.type == "cpu",
        "lora": run.step.adapter.settings(LORA, run.step.targets),
    }
    (folder / "stock.json").write_text(json.dumps(asked))
    return [*torchrun(run.num_gpus), "-m", "fvae_dist.benchmarking.stock", str(folder)]


def _read_own(folder: Path, tokens: int) -> Measured:
    speeds, peaks = read_logs(folder / "run" / "tensorboard")
    return Measured(ms=[1e3 * tokens / speed for speed in speeds[WARM_UP:]], peak_bytes=round(max(peaks) * 2**30))


def _read_stock(folder: Path) -> Measured:
    found = json.loads((folder / "stock_result.json").read_text())
    return Measured(ms=found["ms"][WARM_UP:], peak_bytes=round(found["peak_gib"] * 2**30))
