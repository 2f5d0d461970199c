"""What a benchmark found, as Markdown, CSV, JSON and a plot."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A column of the Markdown table: the row's key, the title, and a format for numbers."""

    key: str
    title: str
    form: str = ""


class Axes(NamedTuple):
    """What the plot shows against tokens: the row's key and its label; `lines` are the keys that tell lines apart."""

    key: str
    label: str
    lines: Sequence[str] = ("label",)


@dataclass(frozen=True)
class Report:
    """`head` (GPU, versions, date, configuration, ceilings) and the rows, with how to show them.

    `order`: sorts the rows by what it returns; None: as they come.
    """

    title: str
    head: dict[str, Any]
    columns: list[Column]
    axes: Axes
    notes: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    order: Callable[[dict[str, Any]], Any] | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Put a row where it belongs."""
        self.rows.append(row)
        if self.order is not None:
            self.rows.sort(key=self.order)

    def markdown(self) -> str:
        """Title, circumstances, table, notes; columns that no row has are left out."""
        shown = [column for column in self.columns if any(row.get(column.key) is not None for row in self.rows)]
        lines = [f"## {self.title}", "", *self._circumstances(), ""]
        lines.append("| " + " | ".join(column.title for column in shown) + " |")
        lines.append("|" + "---|" * len(shown))
        lines += ["| " + " | ".join(_cell(row.get(c.key), c.form) for c in shown) + " |" for row in self.rows]
        return "\n".join([*lines, "", *self.notes])

    def line(self, row: dict[str, Any]) -> str:
        """One row in words, for whoever waits."""
        cells = ((column.title, _cell(row.get(column.key), column.form)) for column in self.columns)
        return "  ".join(f"{title} {cell}" for title, cell in cells if cell)

    def _circumstances(self) -> list[str]:
        ceilings = self.head["ceilings"]
        versions = ", ".join(f"{name} {version}" for name, version in self.head["versions"].items())
        return [
            f"{self.head['device']}, {self.head['date']}; {versions}.",
            f"Measured here: copy {ceilings['bytes_per_s'] / 1e9:,.1f} GB/s, "
            f"product {ceilings['operations_per_s'] / 1e12:,.2f} TFLOP/s.",
        ]

    def csv(self) -> str:
        """Every row in full, and with each the device, the date and the versions."""
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        common = {"device": self.head["device"], "date": self.head["date"], **self.head["versions"]}
        text = io.StringIO()
        writer = csv.DictWriter(text, [*keys, *common], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | common for row in self.rows)
        return text.getvalue()

    def json(self) -> str:
        return json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """benchmark.md, .csv and .json, of the rows there are; each is replaced as a whole."""
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("md", self.markdown() + "\n"), ("csv", self.csv()), ("json", self.json())):
            aside = folder / f".benchmark.{suffix}.partial"
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, folder / f"benchmark.{suffix}")

    def plot(self, path: Path) -> None:
        """Lines over tokens with quartiles where they were measured; says so where it cannot."""
        try:
            import matplotlib
        except ImportError:
            print("no plot: matplotlib is not installed (`pip install matplotlib`)", file=sys.stderr)
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axis = pyplot.subplots(figsize=(8, 5))
        for name, rows in _lines(self.rows, self.axes).items():
            points = [row["tokens"] for row in rows]
            values = [row[self.axes.key] for row in rows]
            bars = None
            if self.axes.key == "ms":
                bars = [[row["ms"] - row["ms_low"] for row in rows], [row["ms_high"] - row["ms"] for row in rows]]
            axis.errorbar(points, values, yerr=bars, marker="o", capsize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens")
        axis.set_ylabel(self.axes.label)
        axis.set_title(f"{self.title}\n{self.head['device']}, {self.head['date']}", fontsize=10)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _lines(rows: list[dict[str, Any]], axes: Axes) -> dict[str, list[dict[str, Any]]]:
    """Name of a line -> its rows, those without a value left out."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get(axes.key) is not None:
            lines.setdefault(", ".join(str(row[key]) for key in axes.lines), []).append(row)
    return lines


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return format(value, form) if form and isinstance(value, (int, float)) else str(value).replace("|", "\\|")
