"""Metrics against values computed by hand."""

import math

import numpy as np
import pytest

from fvae_dist.evaluation.metrics import bootstrap_interval, calibration, estimate, group_metrics


def test_estimate_is_the_mean_inside_its_interval():
    values = [1.0] * 30 + [0.0] * 10
    result = estimate(values, seed=3)
    assert result["value"] == 0.75 and result["low"] < 0.75 < result["high"]
    assert result == estimate(values, seed=3)
    measured = np.random.default_rng(0).normal(size=20)
    assert estimate(measured, seed=3) != estimate(measured, seed=4)


def test_interval_has_the_width_of_the_normal_approximation():
    """Of 2,000 draws with p = 0.5, +- 1.96 sqrt(p (1 - p) / N); the bootstrap's own noise is some 3 % of the width."""
    low, high = bootstrap_interval([0.0, 1.0] * 1000)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 2000), rel=0.1)


def test_ratio_weighs_samples_by_their_tokens():
    result = estimate([2.0, 30.0], [1.0, 9.0])
    assert result["value"] == 3.2
    assert result["low"] == 2.0 and result["high"] == pytest.approx(30 / 9)  # the two extreme resamples


def test_equal_values_have_no_width():
    assert estimate([1.0, 1.0, 1.0]) == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_interval_in_blocks_equals_in_one(monkeypatch):
    values = np.arange(50.0)
    whole = bootstrap_interval(values)
    monkeypatch.setattr("fvae_dist.evaluation.metrics._BLOCK_DRAWS", 700)
    assert bootstrap_interval(values) == whole


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="0 rows"):
        calibration([], [])
    with pytest.raises(ValueError, match="1 results for 0 groups"):
        group_metrics([1], [])


def test_calibration_by_hand():
    """Two bins of confidence: (0.5, 1]: four samples, confidences 0.6 0.6 0.8 1.0, three right; (0, 0.5]: none."""
    probabilities = [[0.6, 0.4], [0.4, 0.6], [0.2, 0.8], [1.0, 0.0]]
    result = calibration(probabilities, [0, 0, 1, 0], num_bins=2)
    assert result["ece"] == result["mce"] == pytest.approx(abs(0.75 - 0.75))
    assert result["nll"] == pytest.approx(-(math.log(0.6) + math.log(0.4) + math.log(0.8) + 0) / 4)
    # Class 0: probabilities 0.2 0.4 | 0.6 1.0, it is the label of 0 1 | 1 1; class 1: 0 0.4 | 0.6 0.8, label 0 0 | 0 1.
    assert result["ace"] == pytest.approx(np.mean([abs(0.5 - 0.3), abs(1 - 0.8), abs(0 - 0.2), abs(0.5 - 0.7)]))


def test_calibration_weighs_bins_by_their_samples():
    """15 bins: confidence 0.95 in the last one (3 samples, 2 right), 0.55 in the ninth (1 sample, wrong)."""
    result = calibration([[0.95, 0.05]] * 3 + [[0.55, 0.45]], [0, 0, 1, 1])
    gaps = 0.95 - 2 / 3, 0.55
    assert result["ece"] == pytest.approx(0.75 * gaps[0] + 0.25 * gaps[1])
    assert result["mce"] == pytest.approx(gaps[1])


def test_calibration_takes_rows_of_different_length():
    result = calibration([[0.5, 0.5], [0.25, 0.25, 0.5]], [0, 2], num_bins=1)
    assert result["ece"] == pytest.approx(0.5)  # both right (the first of equals counts), confidence 0.5
    classes = [abs(1 / 2 - 0.375), abs(0 - 0.375), abs(1 - 0.5)]  # the third class is asked of the second row only
    assert result["ace"] == pytest.approx(np.mean(classes))


def test_certain_and_right_is_perfect_and_wrong_is_finite():
    assert calibration([[1.0, 0.0]], [0]) == {"ece": 0.0, "mce": 0.0, "ace": 0.0, "nll": 0.0}
    assert calibration([[1.0, 0.0]], [1])["nll"] > 700


def test_groups_by_hand():
    correct = [1, 1, 1, 0, 1, 0, 1, 1]
    groups = ["a", "a", "a", "a", "b", "b", "c", "c"]
    result = group_metrics(correct, groups)
    assert {name: entry["accuracy"]["value"] for name, entry in result["groups"].items()} == {
        "a": 0.75,
        "b": 0.5,
        "c": 1.0,
    }
    assert [entry["num_samples"] for entry in result["groups"].values()] == [4, 2, 2]
    assert result["average"]["value"] == 0.75 and result["balanced"]["value"] == 0.75
    assert result["worst_group"]["value"] == 0.5 and result["worst_group_name"] == "b"
    assert result["gap"]["value"] == 0.25
    for entry in (result["worst_group"], result["gap"], result["balanced"], result["average"]):
        assert entry["low"] <= entry["value"] <= entry["high"]


def test_group_intervals_never_lose_a_small_group():
    """The one sample of group b is wrong in every resample, so the worst group is exactly 0."""
    result = group_metrics([1] * 99 + [0], ["a"] * 99 + ["b"])
    assert result["worst_group"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert result["gap"] == {"value": 0.99, "low": 0.99, "high": 0.99}
