"""Runs that go on in another layout: python -m tests.faults --elastic."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.faults.harness import Layout, Place

FROM_STEP = 6
LAYOUTS = (
    Layout(),
    Layout(accumulation=1, deepspeed="zero2"),
    Layout(num_ranks=2),
    Layout(num_ranks=2, deepspeed="zero3"),
    Layout(num_ranks=4, accumulation=1, deepspeed="zero3"),
    Layout(num_ranks=2, deepspeed="zero3", sequence_parallel=2),
)


def resumed_in(place: Place, layout: Layout, output: Path) -> float:
    """Take the undisturbed run from step 6 to its end in another layout; the difference of what is logged."""
    shutil.copytree(place.undisturbed() / f"checkpoint-{FROM_STEP}", output / f"checkpoint-{FROM_STEP}")
    run = place.complete(output, resume=True, layout=layout)
    assert run.resumed_at == FROM_STEP
    return place.difference(output)


def matrix(folder: Path) -> list[str]:
    """Rows of a Markdown table: from each layout to each."""
    rows = ["| from, to | " + " | ".join(map(str, LAYOUTS)) + " |", "|---" * (len(LAYOUTS) + 1) + "|"]
    for start in LAYOUTS:
        (folder / str(len(rows))).mkdir()
        place = Place(folder / str(len(rows)), start)
        found = [resumed_in(place, end, place.folder / f"to{index}") for index, end in enumerate(LAYOUTS)]
        rows.append(f"| {start} | " + " | ".join(f"{value:.0e}" if value else "0" for value in found) + " |")
    return rows
