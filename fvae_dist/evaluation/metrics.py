"""Metrics as pure functions of arrays. N samples, K classes, M bins; every value is a fraction unless it says nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_RESAMPLES = 2000
NUM_BINS = 15  # Guo et al. 2017, Nixon et al. 2019
_BLOCK_DRAWS = 4_000_000  # resampled indices held at a time: 32 MB


def bootstrap_interval(
    values: ArrayLike, weights: ArrayLike | None = None, *, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, or of the ratio of two sums.

    Samples are drawn with replacement `NUM_RESAMPLES` times. Where all values are equal the interval has no width: with
    few samples that says little.

    Args:
        values: (N,), what is averaged.
        weights: (N,), > 0: the statistic is sum(values) / sum(weights); default: the mean.
        seed: of the resampling.
        level: of the interval.

    Returns:
        Lower and upper bound.

    Raises:
        ValueError: no sample.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    estimates = _resampled_ratios(values, weights, seed)
    return _percentiles(estimates, level)


def _resampled_ratios(values: ArrayLike, weights: ArrayLike | None, seed: int) -> NDArray[np.float64]:
    """sum(values) / sum(weights) of each resample, (NUM_RESAMPLES,)."""
    values_N = np.asarray(values, dtype=np.float64)
    weights_N = np.ones_like(values_N) if weights is None else np.asarray(weights, dtype=np.float64)
    num_samples = len(values_N)
    if num_samples == 0:
        raise ValueError("no sample to resample")
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK_DRAWS // num_samples)
    estimates = []
    for start in range(0, NUM_RESAMPLES, block):
        rows = generator.integers(num_samples, size=(min(block, NUM_RESAMPLES - start), num_samples))
        estimates.append(values_N[rows].sum(1) / weights_N[rows].sum(1))
    return np.concatenate(estimates)


def _percentiles(estimates: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def estimate(values: ArrayLike, weights: ArrayLike | None = None, *, seed: int = 0) -> dict[str, float]:
    """A mean (or ratio, see `bootstrap_interval`) with its 95 % interval: value, low, high."""
    values_N = np.asarray(values, dtype=np.float64)
    total = float(len(values_N)) if weights is None else float(np.asarray(weights, dtype=np.float64).sum())
    low, high = bootstrap_interval(values_N, weights, seed=seed)
    return {"value": float(values_N.sum()) / total, "low": low, "high": high}


# ---------------------------------------------------------------------------------------------------------- calibration


def calibration(
    probabilities: Sequence[ArrayLike], labels: Sequence[int], num_bins: int = NUM_BINS
) -> dict[str, float]:
    """How well class probabilities match how often they are right.

    ece: expected calibration error, the mean over samples of |accuracy - confidence| of their bin; equal-width bins of
        the confidence, which is the largest probability.
    mce: maximum calibration error, the largest of these differences.
    ace: adaptive calibration error: for each class the samples sorted by its probability, in bins of equal count;
        |frequency - probability| averaged over bins, then over classes. A class is asked only of samples that have it.
    nll: negative log-likelihood of the true class, nats per sample.

    Args:
        probabilities: N rows of (K_n,), each summing to 1; rows may differ in length (questions with 3 or 5 answers).
        labels: N indices of the true class.

    Raises:
        ValueError: no sample, or not one label for each row.

    Source: Guo et al. 2017 (arXiv 1706.04599); Nixon et al. 2019 (arXiv 1904.01685).
    """
    if not len(probabilities) or len(probabilities) != len(labels):
        raise ValueError(f"{len(probabilities)} rows of probabilities for {len(labels)} labels")
    rows = [np.asarray(row, dtype=np.float64) for row in probabilities]
    confidence_N = np.array([row.max() for row in rows])
    correct_N = np.array(
        [int(row.argmax()) == label for row, label in zip(rows, labels, strict=True)], dtype=np.float64
    )
    # Bins are (low, high] so that a confidence of 1 has one.
    bins_N = np.clip(np.ceil(confidence_N * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps, shares = [], []
    for index in np.unique(bins_N):
        inside = bins_N == index
        gaps.append(abs(correct_N[inside].mean() - confidence_N[inside].mean()))
        shares.append(inside.mean())
    true_N = np.array([row[label] for row, label in zip(rows, labels, strict=True)])
    return {
        "ece": float(np.dot(gaps, shares)),
        "mce": float(max(gaps)),
        "ace": _adaptive_error(rows, labels, num_bins),
        "nll": float(-np.log(np.maximum(true_N, np.finfo(np.float64).tiny)).mean()),
    }


def _adaptive_error(rows: list[NDArray[np.float64]], labels: Sequence[int], num_bins: int) -> float:
    per_class = []
    for index in range(max(len(row) for row in rows)):
        pairs = [(row[index], label == index) for row, label in zip(rows, labels, strict=True) if len(row) > index]
        pairs.sort(key=lambda pair: pair[0])
        parts = [part for part in np.array_split(np.array(pairs, dtype=np.float64), num_bins) if len(part)]
        per_class.append(float(np.mean([abs(part[:, 1].mean() - part[:, 0].mean()) for part in parts])))
    return float(np.mean(per_class))


# --------------------------------------------------------------------------------------------------------------- groups


def group_metrics(correct: ArrayLike, groups: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """Accuracy on average, per group and of the worst group, with 95 % bootstrap intervals.

    average: accuracy over all samples; balanced: the mean of the groups' accuracies; worst_group: the smallest of them,
    and worst_group_name; gap: average - worst_group; groups: per group accuracy and num_samples. Intervals of balanced,
    worst_group and gap resample inside each group, so that no resample lacks one.

    Args:
        correct: (N,), 1 where the prediction is right.
        groups: N names.
        seed: of the resampling.

    Raises:
        ValueError: no sample, or not one group for each.

    Source: Sagawa et al. 2020 (arXiv 1911.08731).
    """
    correct_N = np.asarray(correct, dtype=np.float64)
    groups_N = np.asarray(groups, dtype=str)
    if not len(correct_N) or len(correct_N) != len(groups_N):
        raise ValueError(f"{len(correct_N)} results for {len(groups_N)} groups")
    names = sorted(set(groups_N.tolist()))
    members = [correct_N[groups_N == name] for name in names]
    resampled_GR = np.stack([_resampled_ratios(part, None, seed + 1 + i) for i, part in enumerate(members)])
    shares_G = np.array([len(part) for part in members]) / len(correct_N)
    accuracy_G = np.array([part.mean() for part in members])
    worst_R = resampled_GR.min(0)
    worst = int(accuracy_G.argmin())
    average = estimate(correct_N, seed=seed)

    def with_interval(value: float, resampled_R: NDArray[np.float64]) -> dict[str, float]:
        low, high = _percentiles(resampled_R, 0.95)
        return {"value": float(value), "low": low, "high": high}

    return {
        "average": average,
        "balanced": with_interval(accuracy_G.mean(), resampled_GR.mean(0)),
        "worst_group": with_interval(accuracy_G[worst], worst_R),
        "worst_group_name": names[worst],
        "gap": with_interval(average["value"] - accuracy_G[worst], shares_G @ resampled_GR - worst_R),
        "groups": {
            name: {"accuracy": with_interval(accuracy_G[i], resampled_GR[i]), "num_samples": len(members[i])}
            for i, name in enumerate(names)
        },
    }
