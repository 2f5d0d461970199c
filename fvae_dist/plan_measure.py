"""`fvae-dist plan --measure GPUS`: trains four settings on this machine and sets the plan beside what was measured.

Models have the shapes of Llama-3.2-1B and Llama-3-8B, random weights, and data made up here: nothing is downloaded.
Each setting is a `deepspeed launch/train.py` of its own; its memory and speed are read from the TensorBoard files.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fvae_dist.planning.hardware import Cluster, PlanError, detect_gpu, find_gpu
from fvae_dist.planning.planner import Load, Option, plan_choice
from fvae_dist.training.modeling import load_config
from fvae_dist.training.planned import make_choice, own_config, own_recompute, subject_of
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.recipe_file import load_recipe

ROOT = Path(__file__).parents[1]
STEPS = 10
WARM_UP = 4  # steps that are slower: allocator, autotuning, DeepSpeed's trace
TIMEOUT_S = 540
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
}
_BOTH = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}


@dataclass(frozen=True)
class Setting:
    """One run: a shape, tokens of a sequence, and whether layers are recomputed."""

    shape: str
    length: int
    recompute: bool

    def __str__(self) -> str:
        return f"{self.shape} T={self.length} {'full' if self.recompute else 'none'}"


SETTINGS = (
    Setting("1b", 4096, False),
    Setting("1b", 32768, True),
    Setting("8b", 8192, True),
    Setting("8b", 32768, True),
)


@dataclass(frozen=True)
class Comparison:
    """Planned and measured; `measured_*` is None for a run that failed, whose last words are in `error`."""

    setting: Setting
    planned: Option
    measured_gib: float | None = None
    measured_s: float | None = None
    error: str = ""


def measure(args: argparse.Namespace) -> str:
    """Run the settings and return the table; with --json also write it, row by row, as it comes.

    Raises:
        RecipeError: no such GPUs here, or a mistake in --set.
    """
    try:
        gpu, found = detect_gpu() if not args.gpu else (find_gpu(args.gpu), args.measure)
    except PlanError as error:
        raise RecipeError(str(error)) from None
    if args.measure > found:
        raise RecipeError(f"--measure: {args.measure} GPUs asked for, {found} here")
    cluster = Cluster(gpu, 1, args.measure)
    rows: list[Comparison] = []
    _write_json(args.json, rows)  # a path that cannot be written to is found now
    with tempfile.TemporaryDirectory() as folder:
        for setting in SETTINGS:
            row = _compare(setting, cluster, Path(folder) / f"{setting.shape}-{setting.length}", args.set)
            rows.append(row)
            print(table_of(rows, cluster), file=sys.stderr, flush=True)
            _write_json(args.json, rows)
    return table_of(rows, cluster)


def table_of(rows: list[Comparison], cluster: Cluster) -> str:
    """Markdown, as it stands in README."""
    lines = [
        f"| {cluster.world_size} x {cluster.gpu.name} | GiB planned | measured | | step planned | measured | | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        total, seconds = row.planned.memory.total_gib, row.planned.step.seconds
        cells = [f"{row.setting}", f"{total:.1f}", *_measured(total, row.measured_gib, "{:.1f}")]
        cells += [f"{1e3 * seconds:,.0f} ms", *_measured(seconds, row.measured_s, "{:.3f} s")]
        lines.append("| " + " | ".join([*cells, row.error or row.planned.step.bound]) + " |")
    return "\n".join(lines)


def _measured(planned: float, measured: float | None, form: str) -> tuple[str, str]:
    if measured is None:
        return "failed", ""
    return form.format(measured), f"{100 * (planned / measured - 1):+.0f} %"


def write_inputs(setting: Setting, cluster: Cluster, folder: Path, changes: list[str]) -> Path:
    """Model folder without weights, data, and the recipe of one run; returns the recipe's path."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    model = folder / "model"
    sizes: dict[str, Any] = _BOTH | SHAPES[setting.shape]
    LlamaConfig(**sizes).save_pretrained(model)
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(1000)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(model)
    records = [
        {"text": " ".join(f"w{(7 * record + word * word) % 1000}" for word in range(setting.length - 1))}
        for record in range(STEPS * cluster.world_size)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = "zero3.json" if cluster.world_size > 1 else "zero2.json"
    recipe = {
        "model": {"name_or_path": str(model), "random_weights": True, "attention": "flash_attention_2"},
        "adapter": {"peft_type": "FVAE_LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": [{"path": str(folder / "data.jsonl"), "format": "text"}], "max_length": setting.length},
        "training": {
            "output_dir": str(folder / "run"),
            "deepspeed": str(ROOT / "ds_configs" / config),
            "max_steps": STEPS,
            "gradient_checkpointing": setting.recompute,
            "save_strategy": "no",
        },
        "logging": {"steps": 1, "telemetry": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    load_recipe(path, changes)  # a mistake in --set is found before anything runs
    return path


def _compare(setting: Setting, cluster: Cluster, folder: Path, changes: list[str]) -> Comparison:
    folder.mkdir(parents=True)
    path = write_inputs(setting, cluster, folder, changes)
    planned = plan_one(path, cluster, changes)
    overrides = [part for change in changes for part in ("--set", change)]
    command = ["deepspeed", "--num_gpus", str(cluster.world_size), "launch/train.py", "--config", str(path), *overrides]
    problem = _run(command, folder / "log")
    if problem:
        print((folder / "log").read_text(errors="replace")[-3000:], file=sys.stderr)
        return Comparison(setting, planned, error=problem)
    recipe = load_recipe(path, changes)
    tokens = recipe.data.max_length * recipe.training.per_device_train_batch_size
    tokens *= recipe.training.gradient_accumulation_steps
    speeds, peaks = read_logs(Path(recipe.training.output_dir) / "tensorboard")
    return Comparison(setting, planned, max(peaks), tokens / statistics.median(speeds[WARM_UP:]))


def _run(command: list[str], log_path: Path) -> str:
    """Run to the end; returns what went wrong, or nothing. A session of its own: the launcher signals its group."""
    with open(log_path, "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"longer than {TIMEOUT_S} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return f"exit code {code}" if code else ""


def plan_one(path: Path, cluster: Cluster, changes: list[str]) -> Option:
    """The plan of a recipe as it stands."""
    recipe = load_recipe(path, changes)
    subject = subject_of(recipe, load_config(recipe.model))
    name, recompute = own_config(recipe), own_recompute(recipe)
    choice = make_choice(recipe, subject, name, recompute, cluster.world_size, cluster.gpus_per_node)
    training = recipe.training
    load = Load(training.gradient_accumulation_steps, training.per_device_train_batch_size, recipe.data.max_length)
    return plan_choice(subject, choice, cluster, load)


def read_logs(folder: Path) -> tuple[list[float], list[float]]:
    """Tokens/s of a GPU and peak GiB, step by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return tuple([e.value for e in events.Scalars(tag)] for tag in ("perf/tokens_per_s_per_gpu", "mem/peak_gib"))  # type: ignore[return-value]


def _write_json(path: str | None, rows: list[Comparison]) -> None:
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps([_json_of(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--json {path}: {(error.strerror or str(error)).lower()}") from None


def _json_of(row: Comparison) -> dict[str, Any]:
    planned = row.planned
    return {
        "setting": str(row.setting),
        "measured_gib": row.measured_gib,
        "measured_s": row.measured_s,
        "error": row.error,
        "planned_gib": planned.memory.total_gib,
        "planned_parts_gib": planned.memory.parts,
        "planned_s": planned.step.seconds,
        "planned_compute_s": planned.step.compute_s,
        "planned_attention_s": planned.step.attention_s,
        "planned_products_s": planned.step.products_s,
        "planned_elementwise_s": planned.step.elementwise_s,
        "planned_host_s": planned.step.host_s,
        "planned_traffic_s": planned.step.traffic.seconds,
    }
