"""results.json and its Markdown table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fvae_dist.evaluation.store import write_text

_PERCENT = {"accuracy"}


def write_report(folder: Path, settings: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """Write FOLDER/results.json and FOLDER/results.md.

    Args:
        settings: how it was run.
        results: suite -> task -> metrics, as the tasks' `summarise` gives them.

    Returns:
        The Markdown text.
    """
    markdown = markdown_report(settings, results)
    write_text(folder / "results.json", json.dumps({"settings": settings, "suites": results}, indent=1) + "\n")
    write_text(folder / "results.md", markdown)
    return markdown


def markdown_report(settings: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """One table with a row for each task, one for each set with groups, and the needle's by length and depth."""
    adapter = f", adapter {settings['adapter']}" if settings.get("adapter") else ", no adapter"
    lines = [f"Model {settings['model']}{adapter}. Intervals: 95 %, bootstrap.", ""]
    lines += ["| suite | task | samples | metric | value | interval | ECE | NLL | unparsed |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for suite, tasks in results.items():
        for task, metrics in tasks.items():
            lines += [_row(suite, task, metrics, name) for name in _estimates(metrics)]
    for suite, tasks in results.items():
        for task, metrics in tasks.items():
            if "groups" in metrics:
                lines += ["", *_group_table(suite, task, metrics["groups"])]
            if "cells" in metrics:
                lines += ["", *_needle_table(metrics)]
    return "\n".join(lines) + "\n"


def _estimates(metrics: dict[str, Any]) -> list[str]:
    return [name for name, value in metrics.items() if isinstance(value, dict) and "value" in value]


def _row(suite: str, task: str, metrics: dict[str, Any], name: str) -> str:
    entry, calibration = metrics[name], metrics.get("calibration", {}) if name == "accuracy" else {}
    value, interval = _show(entry, percent=name in _PERCENT or name.startswith("acc"))
    ece = f"{100 * calibration['ece']:.1f} %" if calibration else ""
    nll = f"{calibration['nll']:.3f}" if calibration else ""
    unparsed = metrics.get("num_parse_failures", "") if name == "accuracy" else ""
    return (
        f"| {suite} | {task} | {metrics.get('num_samples', '')} | {name} | {value} | {interval} | {ece} | {nll} | "
        f"{unparsed} |"
    )


def _group_table(suite: str, task: str, groups: dict[str, Any]) -> list[str]:
    rows = [("average", groups["average"], ""), ("mean of groups", groups["balanced"], "")]
    rows += [(f"worst group ({groups['worst_group_name']})", groups["worst_group"], ""), ("gap", groups["gap"], "")]
    rows += [(name, entry["accuracy"], entry["num_samples"]) for name, entry in groups["groups"].items()]
    title = suite if suite == task else f"{suite} {task}"
    lines = [f"| {title}: group | samples | accuracy | interval |", "|---|---|---|---|"]
    for name, entry, num_samples in rows:
        value, interval = _show(entry, percent=True)
        lines.append(f"| {name} | {num_samples} | {value} | {interval} |")
    return lines


def _needle_table(metrics: dict[str, Any]) -> list[str]:
    cells, depths, lengths = metrics["cells"], metrics["depths"], metrics["lengths"]
    lines = [f"| needle: tokens | {' | '.join(depths)} | all depths |", "|---" * (len(depths) + 2) + "|"]
    for length, share in lengths.items():
        found = [cells.get(f"{length} x {depth}") for depth in depths]
        lines.append(f"| {length} | {' | '.join(map(_percent, [*found, share]))} |")
    found = [*depths.values(), metrics["accuracy"]["value"]]
    return [*lines, f"| all | {' | '.join(map(_percent, found))} |"]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _show(entry: dict[str, float], percent: bool) -> tuple[str, str]:
    scale, digits = (100, 2) if percent else (1, 4)
    low = f"{scale * entry['low']:.{digits}f} .. {scale * entry['high']:.{digits}f}" if "low" in entry else ""
    return f"{scale * entry['value']:.{digits}f}{' %' if percent else ''}", low
