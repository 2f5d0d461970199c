"""`benchmark.py step --gpus N`: the same steps in real training runs under ZeRO-3, one torchrun a variant.

Ours is `launch/train.py` with a recipe of this moment; `--compare trl` adds what a user would take instead, TRL's
SFTTrainer with PEFT's LoRA at its defaults (fvae_dist.benchmarking.stock), on the same data.
"""

from __future__ import annotations

import json
import re
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
from fvae_dist.benchmarking.flops import ModelSize, size_of
from fvae_dist.benchmarking.step import TERMS, StepRun, names_of, step_row
from fvae_dist.benchmarking.timing import OUT_OF_MEMORY, Measured, describe
from fvae_dist.benchmarking.trial import (
    ROOT,
    TIMEOUT_S,
    WARM_UP,
    Setting,
    config_of,
    read_logs,
    run_to_end,
    torchrun,
    train_command,
    write_inputs,
)
from fvae_dist.benchmarking.variants import LORA, STOCKS, TORCH, dtype_name

# Of the device (torch, CUDA, NCCL) and of the host; a rank that the kernel's out-of-memory killer ended says nothing.
_NO_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA error: out of memory|failure 2 'out of memory'|an't allocate memory|annot allocate memory"
    r"|exitcode\s*: -9\b"
)


@dataclass(frozen=True)
class TrainingRun:
    """What `step --gpus` was asked for beside `step` itself.

    Attributes:
        steps: a run's, the first `warm_up` of them unmeasured.
        compare: which of TRL's stock settings (`variants.STOCKS`) are measured too.
        sequence_parallel: GPUs that share a sequence of ours.
        changes: more of ours for --set.
        timeout_s: of a run.
    """

    step: StepRun
    num_gpus: int
    steps: int
    compare: tuple[str, ...]
    warm_up: int = WARM_UP
    sequence_parallel: int = 1
    changes: tuple[str, ...] = ()
    timeout_s: float = TIMEOUT_S


def benchmark_training(run: TrainingRun, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Yield a row for every kind of recomputation, number of tokens and variant, as soon as it is measured: what others
    are compared with goes first.

    Ratios are of the medians of separate runs.
    """
    size, adapted = sizes_of(run.step)

    def row_of(name: str, tokens: int, recompute: str) -> dict[str, Any]:
        print(f"{name}, T = {tokens}, recompute {recompute} ...", file=sys.stderr, flush=True)
        measured = {name: measure_run(run, name, tokens, recompute)}
        return step_row(run.step, ceilings, size, adapted, recompute, tokens, name, measured)

    stock: dict[int, list[dict[str, Any]]] = {}
    names = sorted(names_of(run.step), key=lambda name: name != LORA)
    for recompute in run.step.recompute:
        for tokens in run.step.tokens:
            if tokens not in stock:  # TRL's default is full recomputation, whatever ours does
                stock[tokens] = []
                for name in run.compare:
                    stock[tokens].append(row_of(name, tokens, "full"))
                    yield stock[tokens][-1]
            rows: list[dict[str, Any]] = []
            for name in names:
                rows.append(row_of(name, tokens, recompute))
                add_ratios(rows, stock[tokens])
                yield rows[-1]


def sizes_of(step: StepRun) -> tuple[ModelSize, list[tuple[int, int]]]:
    """The model's size, and (in-features, out-features) of what is adapted."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(step.shape))
    linears = linears_of(model, step.targets).values()
    return size_of(model), [(linear.in_features, linear.out_features) for linear in linears]


def add_ratios(rows: list[dict[str, Any]], stock: list[dict[str, Any]]) -> None:
    """Put the ratios of our rows of one length to LoRA's, the fastest stock one's and the silent one's into them."""
    ms = {row["variant"]: row.get("ms") for row in rows}
    fastest = min((row["ms"] for row in stock if "ms" in row), default=None)
    for row in rows:
        others = {"ratio_to_lora": ms.get(LORA), "ratio_to_trl": fastest}
        if row["variant"].endswith(TERMS):
            others["ratio_to_silent"] = ms.get(row["variant"].removesuffix(TERMS))
        row |= {key: row["ms"] / other for key, other in others.items() if other and "ms" in row}


def measure_run(run: TrainingRun, name: str, tokens: int, recompute: str) -> Measured:
    """Train with one variant; what goes wrong in the run stands in its result, the end of its log on stderr."""
    step = run.step
    variant = TORCH if name in STOCKS else name.removesuffix(TERMS)  # for a stock one only the inputs are taken
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
        1 if name in STOCKS else run.sequence_parallel,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = write_inputs(setting, run.num_gpus, folder)
        if name in STOCKS:
            command = _stock_command(run, setting, folder, STOCKS[name])
        else:
            selective = ["training.recompute=selective"] * (recompute == "selective")
            command = train_command(recipe, run.num_gpus, [*_changes(step), *selective, *run.changes])
        problem = run_to_end(command, folder / "log", run.timeout_s)
        if problem:
            log = (folder / "log").read_text(errors="replace")
            print(log[-3000:], file=sys.stderr)
            return Measured(error=OUT_OF_MEMORY if _NO_MEMORY.search(log) else problem)
        return _read_stock(folder, run) if name in STOCKS else _read_own(folder, tokens, run)


def _changes(step: StepRun) -> list[str]:
    changes = [f"training.deepspeed={ROOT / 'ds_configs' / 'zero3.json'}", f"model.dtype={dtype_name(step.dtype)}"]
    return [*changes, "training.use_cpu=true"] if step.device.type == "cpu" else changes


def _stock_command(run: TrainingRun, setting: Setting, folder: Path, changes: dict[str, Any]) -> list[str]:
    asked = {
        "length": setting.length,
        "steps": setting.steps,
        "dtype": dtype_name(run.step.dtype),
        "use_cpu": run.step.device.type == "cpu",
        "changes": changes,
        "lora": run.step.adapter.settings(LORA, run.step.targets),
    }
    (folder / "stock.json").write_text(json.dumps(asked))
    return [*torchrun(run.num_gpus), "-m", "fvae_dist.benchmarking.stock", str(folder)]


def _read_own(folder: Path, tokens: int, run: TrainingRun) -> Measured:
    """Speeds are a GPU's: a sequence that several share takes so many times less of each."""
    logs = read_logs(folder / "run" / "tensorboard")
    ms = [1e3 * tokens / (run.sequence_parallel * speed) for speed in logs.speeds]
    return _measured(ms, run, max(logs.peaks), max(logs.host_peaks))


def _read_stock(folder: Path, run: TrainingRun) -> Measured:
    found = json.loads((folder / "stock_result.json").read_text())
    return _measured(found["ms"], run, found["peak_gib"], found["host_peak_gib"])


def _measured(ms: list[float], run: TrainingRun, peak_gib: float, host_peak_gib: float) -> Measured:
    return Measured(ms[run.warm_up :], round(peak_gib * 2**30), host_peak_bytes=round(host_peak_gib * 2**30))
