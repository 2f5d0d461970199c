"""Measured times: medians and spread, alone and in pairs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


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


def paired_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of measurements taken in the same round: what drifts from round to round cancels."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def paired_difference(values: Sequence[float], others: Sequence[float]) -> float:
    """Median of the differences of measurements taken in the same round."""
    return statistics.median(a - b for a, b in zip(values, others, strict=True))
