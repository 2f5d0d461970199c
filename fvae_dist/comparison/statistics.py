"""What is said of a few seeds: mean, spread, and a paired difference with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

# 97.5 % quantiles of Student's t, 1 to 30 degrees of freedom. Beyond, the last one: a little too wide.
# Source: Abramowitz and Stegun, Handbook of Mathematical Functions, table 26.10.
_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Spread(NamedTuple):
    """Mean and sample standard deviation (n - 1); None of a single value."""

    mean: float
    deviation: float | None
    num_seeds: int


class Difference(NamedTuple):
    """Mean of paired differences; its 95 % t interval, None where a single pair says nothing about it."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation over seeds.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("no value")
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Spread(float(np.mean(values)), deviation, len(values))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """ours - theirs of the seeds that both have; None where there is none.

    The interval is Student's over the differences, mean +- t(n - 1) s / sqrt(n): it takes them to be normal, and is the
    uncertainty from the seed alone, not from the choice of test samples. A bootstrap of three seeds is too narrow.
    """
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    mean, deviation, count = spread([ours[seed] - theirs[seed] for seed in seeds])
    if deviation is None:
        return Difference(mean, None, None, count)
    half = _T_975[min(count - 1, len(_T_975)) - 1] * deviation / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count)


def best_learning_rate(
    values: Mapping[tuple[float, int], float],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    smaller_is_better: bool,
) -> float | None:
    """The learning rate whose mean over `seeds` is best; of equal ones the first.

    Args:
        values: validation metric of (learning rate, seed). A learning rate that lacks a seed, or has a value that
            is not finite, is not taken: its mean would be over the lucky seeds.
    """
    means = {}
    for learning_rate in learning_rates:
        found = [values.get((learning_rate, seed), math.nan) for seed in seeds]
        if all(math.isfinite(value) for value in found):
            means[learning_rate] = float(np.mean(found))
    if not means:
        return None
    return min(means, key=means.__getitem__) if smaller_is_better else max(means, key=means.__getitem__)
