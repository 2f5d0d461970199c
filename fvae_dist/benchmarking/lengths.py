"""Which lengths are tried: upward, and between the longest that fits and the shortest that does not by halves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fvae_dist.benchmarking.timing import OUT_OF_MEMORY

Row = dict[str, Any]  # `tokens`, and `ms` where it fits, else `note`


@dataclass
class Bounds:
    """What is known of one variant, in tokens.

    Attributes:
        fits: the longest that fits; 0: none has yet.
        too_long: the shortest that ran out of memory; None: none has yet.
        failed: the length that ended otherwise (an error, a time limit), and how; nothing further is tried then.
    """

    fits: int = 0
    too_long: int | None = None
    failed: str = ""

    def add(self, row: Row) -> None:
        """Take in what a run has shown."""
        tokens = row["tokens"]
        if "ms" in row:
            self.fits = max(self.fits, tokens)
        elif row["note"] == OUT_OF_MEMORY:
            self.too_long = min(tokens, self.too_long or tokens)
        else:
            self.failed = f"{tokens:,}: {row['note']}"

    def is_worth(self, tokens: int) -> bool:
        """Whether this length may fit."""
        return not self.failed and (self.too_long is None or tokens < self.too_long)

    def middle(self, resolution: int) -> int | None:
        """The next length between the bounds, whole steps of `resolution` above the lower; None: they are near enough.

        Without a length that fits the lower one is 0.
        """
        if self.failed or self.too_long is None or self.too_long - self.fits <= resolution:
            return None
        steps = (self.too_long - self.fits) // 2 // resolution
        return self.fits + max(1, steps) * resolution

    def __str__(self) -> str:
        fits = f"{self.fits:,}" if self.fits else "none"
        if self.failed:
            return f"{fits} ({self.failed})"
        return f"{fits} ({'the longest tried' if self.too_long is None else f'{self.too_long:,} does not'})"


def doubled(first: int, last: int) -> list[int]:
    """`first`, twice that and so on, up to `last`."""
    lengths = [first]
    while 2 * lengths[-1] <= last:
        lengths.append(2 * lengths[-1])
    return lengths


def walk(
    lengths: Collection[int],
    bounds: Mapping[str, Bounds],
    resolution: int,
    measure: Callable[[str, int], Row],
    done: Collection[tuple[str, int]] = (),
) -> Iterator[Row]:
    """Yield a row for every variant of `bounds` at every length that it may fit, shortest first; then bisect.

    Args:
        bounds: by variant, from rows of an earlier start; kept up to date.
        measure: runs (variant, length) and returns its row.
        done: (variant, length) of the rows that `bounds` already know.
    """
    for tokens in sorted(set(lengths)):
        for name, bound in bounds.items():
            if (name, tokens) not in done and bound.is_worth(tokens):
                row = measure(name, tokens)
                bound.add(row)
                yield row
    for name, bound in bounds.items():
        while (middle := bound.middle(resolution)) is not None:
            row = measure(name, middle)
            bound.add(row)
            yield row
