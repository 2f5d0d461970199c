"""`fvae-dist plan --measure 1 2`: trains four settings on so many of this machine's GPUs, beside what was planned.

Models have the shapes of Llama-3.2-1B and Llama-3-8B, random weights, and data made up here: nothing is downloaded.
Each run is a `launch/train.py` under torchrun; its memory and speed are read from its TensorBoard files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_dist.benchmarking.trial import WARM_UP, Setting, read_logs, run_to_end, train_command, write_inputs
from fvae_dist.plan_command import own_fit, write_file
from fvae_dist.planning.hardware import Cluster, PlanError, detect_gpu, find_gpu
from fvae_dist.planning.planner import Option, plan_choice
from fvae_dist.planning.report import option_json
from fvae_dist.planning.subject import Subject
from fvae_dist.training.modeling import load_config
from fvae_dist.training.planned import longest_load, make_choice, own_config, subject_of
from fvae_dist.training.recipe import Recipe, RecipeError
from fvae_dist.training.recipe_file import load_recipe

GOAL_MEMORY, GOAL_TIME = 0.1, 0.2
SETTINGS = (
    Setting("1b", 4096, False),
    Setting("1b", 32768, True),
    Setting("8b", 8192, True),
    Setting("8b", 32768, True),
)


@dataclass(frozen=True)
class Comparison:
    """Planned and measured; `measured_*` is None for a run that failed, and `error` says how."""

    setting: Setting
    cluster: Cluster
    planned: Option
    measured_gib: float | None = None
    measured_s: float | None = None
    error: str = ""


def measure(args: argparse.Namespace) -> str:
    """Run the settings on each number of GPUs and return the table; `--json` is written after every run, and the table
    as .md beside it.

    Raises:
        RecipeError: not so many GPUs here, a file that cannot be written, or a mistake in --set.
    """
    try:
        gpu, found = (find_gpu(args.gpu), max(args.measure)) if args.gpu else detect_gpu()
    except PlanError as error:
        raise RecipeError(str(error)) from None
    if max(args.measure) > found:
        raise RecipeError(f"--measure: {max(args.measure)} GPUs asked for, {found} here")
    rows: list[Comparison] = []
    _write(args.json, rows)  # a path that cannot be written to is found now
    with tempfile.TemporaryDirectory() as scratch:
        for cluster in (Cluster(gpu, 1, number) for number in args.measure):
            for setting in SETTINGS:
                folder = Path(scratch) / f"{cluster.world_size}-{setting.shape}-{setting.length}"
                rows.append(_compare(setting, cluster, folder, args.set))
                print(table_of(rows), file=sys.stderr, flush=True)
                _write(args.json, rows)
    return table_of(rows)


def table_of(rows: list[Comparison]) -> str:
    """Markdown: a row for each run, and below how many are as near as they should be."""
    lines = [
        "| run | GiB planned | measured | error | step planned | measured | error | bound by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        total, seconds = row.planned.memory.total_gib, row.planned.step.seconds
        cells = [f"{row.cluster.world_size} x {row.cluster.gpu.name}, {row.setting}"]
        cells += [f"{total:.1f}", *_measured(total, row.measured_gib, "{:.1f}")]
        cells += [f"{seconds:.3f} s", *_measured(seconds, row.measured_s, "{:.3f} s")]
        lines.append("| " + " | ".join([*cells, row.error or row.planned.step.bound]) + " |")
    memory = sum(_is_near(row.planned.memory.total_gib, row.measured_gib, GOAL_MEMORY) for row in rows)
    time = sum(_is_near(row.planned.step.seconds, row.measured_s, GOAL_TIME) for row in rows)
    goals = f"Memory within {GOAL_MEMORY:.0%}: {memory} of {len(rows)}; step within {GOAL_TIME:.0%}: {time}."
    return "\n".join([*lines, "", goals])


def _measured(planned: float, measured: float | None, form: str) -> tuple[str, str]:
    if measured is None:
        return "failed", ""
    return form.format(measured), f"{100 * (planned / measured - 1):+.0f} %"


def _is_near(planned: float, measured: float | None, tolerance: float) -> bool:
    return measured is not None and abs(planned / measured - 1) <= tolerance


def _compare(setting: Setting, cluster: Cluster, folder: Path, changes: list[str]) -> Comparison:
    folder.mkdir()
    path = write_inputs(setting, cluster.world_size, folder)
    recipe = load_recipe(path, changes)
    planned = plan_run(recipe, subject_of(recipe, load_config(recipe.model)), cluster)
    problem = run_to_end(train_command(path, cluster.world_size, changes), folder / "log")
    if problem:
        print((folder / "log").read_text(errors="replace")[-3000:], file=sys.stderr)
        return Comparison(setting, cluster, planned, error=problem)
    logs = read_logs(Path(recipe.training.output_dir) / "tensorboard")
    seconds = planned.step.tokens / statistics.median(logs.speeds[WARM_UP:])
    return Comparison(setting, cluster, planned, max(logs.peaks), seconds)


def plan_run(recipe: Recipe, subject: Subject, cluster: Cluster) -> Option:
    """The plan of a recipe as it stands, every row as long as may be."""
    name, fit = own_config(recipe), own_fit(recipe, subject, cluster)
    choice = make_choice(recipe, subject, name, fit.recompute, fit.resident, cluster.world_size, cluster.gpus_per_node)
    return plan_choice(subject, choice, cluster, longest_load(recipe))


def _write(path: str | None, rows: list[Comparison]) -> None:
    if path is None:
        return
    write_file("--json", path, json.dumps([_json_of(row) for row in rows], indent=1) + "\n")
    write_file("--json", Path(path).with_suffix(".md"), table_of(rows) + "\n")


def _json_of(row: Comparison) -> dict[str, Any]:
    return {
        "gpu": row.cluster.gpu.name,
        "gpus": row.cluster.world_size,
        "setting": str(row.setting),
        "measured_gib": row.measured_gib,
        "measured_s": row.measured_s,
        "error": row.error,
        "planned": option_json(row.planned),
    }
