"""MFU of training an adapter on a frozen base."""

import pytest
import torch

from fvae_dist.training.throughput import PEAK_TFLOPS, peak_tflops, utilisation


def test_utilisation_counts_four_operations_a_parameter_and_token():
    # 1e9 parameters, 1000 tokens/s: 4e12 operations a second on a device of 100e12.
    mfu, hfu = utilisation(1000, 10**9, 100, recomputed=False)
    assert mfu == hfu == pytest.approx(0.04)


def test_recomputation_counts_for_hfu_only():
    mfu, hfu = utilisation(1000, 10**9, 100, recomputed=True)
    assert (mfu, hfu) == (pytest.approx(0.04), pytest.approx(0.06))


def test_weights_that_are_trained_have_gradients_too():
    mfu, hfu = utilisation(tokens_per_s=1000, matmul_parameters=10**9, peak=100.0, recomputed=True, trained=True)
    assert (mfu, hfu) == (pytest.approx(0.06), pytest.approx(0.08))


def test_stated_peak_comes_first():
    assert peak_tflops(123.0) == 123.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("Voodoo 3", None),
    ],
)
def test_peak_is_known_from_the_device_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_tflops(None) == peak
    assert peak is None or peak in PEAK_TFLOPS.values()


def test_no_device_no_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_tflops(None) is None
