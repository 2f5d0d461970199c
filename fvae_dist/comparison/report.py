"""What a comparison found, as Markdown, CSV, a plot and one HTML page."""

from __future__ import annotations

import base64
import csv
import html
import io
import sys
from pathlib import Path
from statistics import median
from typing import Any

from fvae_dist.comparison import running
from fvae_dist.comparison.statistics import Difference, Spread, paired_difference, spread
from fvae_dist.comparison.study import Study, Trial
from fvae_dist.evaluation.store import write_text

_COST = ("trainable_parameters", "inference_parameters", "step_s", "tokens_per_s_per_gpu", "peak_gib")
_HEADER = ["method", "lr", "seeds", "test", "difference", "worst group"]
_HEADER += ["trained", "at inference", "step", "tokens/s/GPU", "peak GiB", "failed"]


def rows_of(study: Study) -> list[dict[str, Any]]:
    """One row for each method, of what is finished; None where nothing is known yet.

    Cost is that of the chosen learning rate: medians over seeds, of memory the largest.
    """
    rows = [_row(study, method) for method in study.comparison.methods]
    baseline = next((row for row in rows if row["method"] == study.comparison.baseline_name()), None)
    for row in rows:
        comparable = baseline is not None and row is not baseline
        row["difference"] = paired_difference(row["values"], baseline["values"]) if baseline and comparable else None
    return rows


def _row(study: Study, method: str) -> dict[str, Any]:
    trials = [trial for trial in study.trials() if trial.method == method]
    learning_rate = running.chosen_learning_rate(study, method)
    chosen = [trial for trial in trials if trial.learning_rate == learning_rate]
    tests = {trial.seed: result for trial in chosen if (result := running.tested(study, trial)) is not None}
    # A method of which no learning rate is chosen costs something all the same.
    results = [result for trial in chosen or trials if (result := running.finished(study, trial)) is not None]
    values = {seed: result["value"] for seed, result in tests.items()}
    worst = [result["worst_group"] for result in tests.values() if result["worst_group"] is not None]
    row: dict[str, Any] = {"method": method, "learning_rate": learning_rate, "values": values}
    row["test"] = spread(list(values.values())) if values else None
    row["worst_group"] = spread(worst) if worst else None
    for key in _COST:
        known = [result[key] for result in results if result[key] is not None]
        row[key] = (max(known) if key == "peak_gib" else median(known)) if known else None
    row["jobs"] = max((result.get("jobs", 1) for result in results), default=1)
    row["num_failed"] = sum(_has_failed(study, trial) for trial in trials)
    row["num_open"] = sum(_is_open(study, trial) for trial in trials)
    return row


def _has_failed(study: Study, trial: Trial) -> bool:
    return running.failure(study, trial) is not None or running.failure(study, trial, running.TESTED) is not None


def _is_open(study: Study, trial: Trial) -> bool:
    return running.finished(study, trial) is None and running.failure(study, trial) is None


def write_report(study: Study) -> str:
    """comparison.md, .csv, .png and .html in the output folder; returns the Markdown."""
    rows = rows_of(study)
    study.output.mkdir(parents=True, exist_ok=True)
    markdown = markdown_of(study, rows)
    plot = study.output / "comparison.png"
    drawn = _draw(study, rows, plot)
    write_text(study.output / "comparison.md", markdown)
    write_text(study.output / "comparison.csv", csv_of(study, rows))
    write_text(study.output / "comparison.html", html_of(study, rows, plot.read_bytes() if drawn else None))
    return markdown


def markdown_of(study: Study, rows: list[dict[str, Any]]) -> str:
    lines = [f"# {_title(study)}", "", "| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", *[f"* {note}" for note in _notes(study, rows)]]) + "\n"


def csv_of(study: Study, rows: list[dict[str, Any]]) -> str:
    """A line for each method, every number in full, each seed's test value in a column of its own."""
    lines = []
    for row in rows:
        test, worst = row["test"], row["worst_group"]
        difference = row["difference"] or Difference(*[None] * 4)  # type: ignore[arg-type]
        line = {"method": row["method"], "learning_rate": row["learning_rate"], "num_seeds": len(row["values"])}
        line |= {"test_mean": test and test.mean, "test_sd": test and test.deviation}
        line |= {"difference": difference.mean, "difference_low": difference.low, "difference_high": difference.high}
        line |= {"worst_group_mean": worst and worst.mean, "worst_group_sd": worst and worst.deviation}
        line |= {key: row[key] for key in (*_COST, "jobs", "num_failed", "num_open")}
        line |= {f"test_seed_{seed}": row["values"].get(seed) for seed in study.comparison.seeds}
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def html_of(study: Study, rows: list[dict[str, Any]], png: bytes | None) -> str:
    """One page that needs no other file."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in _HEADER)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in _cells(row)) + "</tr>\n" for row in rows)
    notes = "".join(f"<li>{html.escape(note)}</li>\n" for note in _notes(study, rows))
    encoded = base64.b64encode(png).decode() if png else ""
    image = f'<p><img alt="test metric" src="data:image/png;base64,{encoded}"></p>\n' if png else ""
    title = html.escape(_title(study))
    style = "body{font-family:sans-serif}table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:4px 8px}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"</head><body>\n<h1>{title}</h1>\n<table><tr>{head}</tr>\n{body}</table>\n{image}<ul>{notes}</ul></body></html>\n"
    )


def _title(study: Study) -> str:
    return f"{study.comparison.test.metric} of {study.recipe.model.name_or_path}"


def _cells(row: dict[str, Any]) -> list[str]:
    rate, difference = row["learning_rate"], row["difference"]
    trained, kept = row["trainable_parameters"], row["inference_parameters"]
    return [
        row["method"],
        "" if rate is None else f"{rate:g}",
        str(len(row["values"])),
        _show_spread(row["test"]),
        "" if difference is None else _show_difference(difference),
        _show_spread(row["worst_group"]),
        "" if trained is None else f"{trained:,.0f}",
        "" if kept is None else f"{kept:,.0f}",
        "" if row["step_s"] is None else f"{1000 * row['step_s']:,.0f} ms",
        "" if row["tokens_per_s_per_gpu"] is None else f"{row['tokens_per_s_per_gpu']:,.0f}",
        "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}",
        str(row["num_failed"] or ""),
    ]


def _show_spread(value: Spread | None) -> str:
    if value is None:
        return ""
    return f"{value.mean:.4f}" + ("" if value.deviation is None else f" ± {value.deviation:.4f}")


def _show_difference(value: Difference) -> str:
    interval = "" if value.low is None else f" [{value.low:+.4f}, {value.high:+.4f}]"
    return f"{value.mean:+.4f}{interval}"


def _notes(study: Study, rows: list[dict[str, Any]]) -> list[str]:
    asked = study.comparison
    num_rates, num_seeds = len(asked.learning_rates), len(asked.seeds)
    better = "smaller" if running.smaller_is_better(asked.test.metric) else "larger"
    training = study.recipe.training
    budget = f"{training.max_steps} steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"
    rates = ", ".join(f"{rate:g}" for rate in asked.learning_rates)
    notes = [
        f"Budget of every method: {num_rates} learning rates ({rates}) x {num_seeds} seeds, {budget} each.",
        f"lr: chosen by {asked.validation.metric} on the validation data, mean over seeds; a learning rate with a "
        "failed seed is not taken. Only the chosen one is tested, once a seed.",
        f"test: {asked.test.metric}, mean ± standard deviation (n - 1) over seeds; {better} is better.",
    ]
    if asked.baseline_name() is not None:
        notes.append(
            f"difference: to {asked.baseline_name()} with the same seed, mean and 95 % t interval over seeds. It holds "
            "the seeds' uncertainty, not that of the test samples, and is not corrected for the number of methods."
        )
    notes += [
        "at inference: parameters of the adapter that a forward pass needs; of FVAE-LoRA encoder 1's mean and B.",
        "step, tokens/s, peak: of the chosen learning rate, medians over log lines and seeds (peak: the largest; on "
        "CPU the process's resident set).",
    ]
    beside_others = [f"{row['method']} ({row['jobs']})" for row in rows if row["jobs"] > 1]
    if beside_others:
        notes.append(
            "Trained beside other trials on one machine, in brackets up to how many at once: "
            f"{', '.join(beside_others)}. Their step, tokens/s and peak do not compare with those of a run alone."
        )
    unfinished = [f"{row['method']} ({row['num_open']})" for row in rows if row["num_open"]]
    if unfinished:
        notes.append(f"Not finished yet: {', '.join(unfinished)}.")
    return notes


def _draw(study: Study, rows: list[dict[str, Any]], path: Path) -> bool:
    """Mean, deviation and every seed of each tested method; says so where it cannot."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (`pip install matplotlib`)", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["test"] is not None]
    figure, axis = pyplot.subplots(figsize=(8, 1.5 + 0.4 * len(shown)), layout="constrained")
    for place, row in enumerate(shown):
        axis.plot(list(row["values"].values()), [place] * len(row["values"]), "o", color="tab:gray", alpha=0.5)
        axis.errorbar(row["test"].mean, place, xerr=row["test"].deviation, fmt="D", color="tab:blue", capsize=4)
    axis.set_yticks(range(len(shown)), [row["method"] for row in shown])
    axis.invert_yaxis()
    axis.set(xlabel=study.comparison.test.metric, title=_title(study))
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
