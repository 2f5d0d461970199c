"""Measured times: medians and spread, alone and in pairs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread_of(values: Sequence[float]) -> Spread:
    """Median and quartiles of measurements (of one: itself).

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("no measurements")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(statistics.median(values), low, high)


def add_times(row: dict[str, Any], ms: Sequence[float]) -> float:
    """Put median, quartiles and multiple of the floor into a row that has `floor_ms`; returns the median in seconds."""
    spread = spread_of(ms)
    row |= {"ms": spread.median, "ms_low": spread.low, "ms_high": spread.high}
    row["x_floor"] = spread.median / row["floor_ms"]
    return spread.median / 1e3


def paired_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of measurements taken in the same round: what drifts from round to round cancels."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def paired_difference(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of the differences of measurements taken in the same round."""
    return statistics.median(a - b for a, b in zip(values, others, strict=True))
