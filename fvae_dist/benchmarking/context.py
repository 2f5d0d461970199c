"""`benchmark.py context`: how long a sequence may be, and what a step takes at each length, in real training runs.

Every row is one torchrun under ZeRO-3 (fvae_dist.benchmarking.zero3). Rows of an earlier start are taken from its
benchmark.json, where nothing that they depend on has changed; of these only what failed is run again.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvae_dist.benchmarking.floor import Ceilings
from fvae_dist.benchmarking.lengths import Bounds, Row, walk
from fvae_dist.benchmarking.report import Column, Report
from fvae_dist.benchmarking.step import step_row
from fvae_dist.benchmarking.timing import OUT_OF_MEMORY, Measured
from fvae_dist.benchmarking.variants import LABELS, LORA, STOCKS
from fvae_dist.benchmarking.zero3 import TrainingRun, add_ratios, measure_run, sizes_of
from fvae_dist.training.recipe import RecipeError

CONTEXT = [
    Column("tokens", "T"),
    Column("label", "variant"),
    Column("ms", "ms", ",.0f"),
    Column("ms_low", "25 %", ",.0f"),
    Column("ms_high", "75 %", ",.0f"),
    Column("ratio_to_lora", "/ LoRA", ".3f"),
    Column("ratio_to_trl", "/ TRL", ".3f"),
    Column("tokens_per_s", "tokens/s/GPU", ",.0f"),
    Column("mfu", "MFU", ".1%"),
    Column("attention_share", "of attention's ceiling", ".1%"),
    Column("peak_gib", "peak GiB", ",.2f"),
    Column("host_peak_gib", "host peak GiB", ",.2f"),
    Column("note", "note"),
]
# Of the command's arguments, those that a row does not depend on.
_FREE = {"output", "tokens", "first", "last", "resolution", "variants", "compare", "run_timeout"}


@dataclass(frozen=True)
class ContextRun:
    """What `context` was asked for; `attention_tflops` is what attention alone reaches here, if that is known."""

    training: TrainingRun
    names: list[str]
    lengths: list[int]
    resolution: int
    attention_tflops: float | None = None
    bounds: dict[str, Bounds] = field(default_factory=dict)


def benchmark_context(
    run: ContextRun, report: Report, ceilings: Ceilings, measure: Callable[..., Measured] = measure_run
) -> Iterator[Row]:
    """Yield the rows that `report` does not have yet; its head and last note say how far each variant came.

    `measure` trains once, as `zero3.measure_run`.
    """
    run.bounds.update({name: Bounds() for name in run.names})
    for row in report.rows:
        if row["variant"] in run.bounds:
            run.bounds[row["variant"]].add(row)
    done = {(row["variant"], row["tokens"]) for row in report.rows}
    report.notes.extend(["", ""])
    _summarise(run, report)
    with tempfile.TemporaryDirectory() as cache:  # the variants of a length share its tokens
        training = dataclasses.replace(run.training, changes=(*run.training.changes, f"data.cache_dir={cache}"))
        one = _One(dataclasses.replace(run, training=training), ceilings, measure)
        for row in walk(run.lengths, run.bounds, run.resolution, one, done):
            _compare([*(other for other in report.rows if other["tokens"] == row["tokens"]), row])
            _summarise(run, report)
            yield row


class _One:
    """Runs a variant at a length; returns its row."""

    def __init__(self, run: ContextRun, ceilings: Ceilings, measure: Callable[..., Measured]):
        self.run, self.ceilings, self.measure = run, ceilings, measure
        self.size, self.adapted = sizes_of(run.training.step)

    def __call__(self, name: str, tokens: int) -> Row:
        print(f"{name}, T = {tokens} ...", file=sys.stderr, flush=True)
        training = self.run.training
        recompute = "full" if name in STOCKS else training.step.recompute[0]  # TRL's default
        sharing = 1 if name in STOCKS else training.sequence_parallel
        measured = {name: self.measure(training, name, tokens, recompute)}
        row = step_row(
            training.step, self.ceilings, self.size, self.adapted, recompute, tokens, name, measured, sharing
        )
        if self.run.attention_tflops is not None and "ms" in row:
            operations = self.size.attention_operations(tokens, recompute == "full") / sharing
            row["attention_share"] = operations / (row["ms"] / 1e3) / (self.run.attention_tflops * 1e12)
        return row


def _compare(rows: list[Row]) -> None:
    """Put the ratios into the rows of one length."""
    stock = [row for row in rows if row["variant"] in STOCKS]
    add_ratios([row for row in rows if row["variant"] not in STOCKS], stock)


def _summarise(run: ContextRun, report: Report) -> None:
    """The longest that fits of each variant, and ours beside LoRA's where both ended at the memory."""
    report.head["largest"] = {name: dataclasses.asdict(bounds) for name, bounds in run.bounds.items()}
    texts = [f"{LABELS[name]} {bounds}" for name, bounds in run.bounds.items()]
    ratios = report.head["largest_to_lora"] = {}
    lora = run.bounds.get(LORA, Bounds())
    for name, bounds in run.bounds.items():
        if name != LORA and all(one.fits and one.too_long and not one.failed for one in (bounds, lora)):
            ratios[name] = bounds.fits / lora.fits
            texts.append(f"{LABELS[name]} / {LABELS[LORA]} {ratios[name]:.3f}")
    report.notes[-1] = f"Longest T that fits, to {run.resolution:,} tokens: {'; '.join(texts)}."


# ----------------------------------------------------------------------------------------------------- an earlier start


def take_up(path: Path, head: dict[str, Any]) -> tuple[dict[str, Any], list[Row]]:
    """The head and the finished rows of an earlier start; `head` itself and none where there was none.

    The earlier head is kept, its ceilings among it: what all rows are shares of.

    Raises:
        RecipeError: the file is no such report, or of other settings.
    """
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["command"] != head["command"]:
            raise RecipeError(f"{path}: of benchmark {earlier['command']}; take another --output")
        differing = _differing(earlier, head)
        rows = [row for row in earlier["rows"] if "ms" in row or row["note"] == OUT_OF_MEMORY]
        Ceilings(**earlier["ceilings"])
    except FileNotFoundError:
        return head, []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path}: no report that could be continued ({error!r}); take another --output") from None
    if differing:
        raise RecipeError(f"{path}: rows of other settings: {'; '.join(differing)}; take another --output")
    return {key: value for key, value in earlier.items() if key != "rows"} | {"config": head["config"]}, rows


def _differing(earlier: dict[str, Any], head: dict[str, Any]) -> list[str]:
    """What the rows depend on and is not as it was."""
    differing = []
    for before, now in ((earlier["config"], head["config"]), (earlier["versions"], head["versions"])):
        keys = [key for key in {**before, **now} if key not in _FREE and before.get(key) != now.get(key)]
        differing += [f"{key} {before.get(key)}, now {now.get(key)}" for key in keys]
    for key in ("device", "dtype"):
        if earlier[key] != head[key]:
            differing.append(f"{key} {earlier[key]}, now {head[key]}")
    return differing
