"""The GPU table and the constants: found by name, or said what is meant; every constant says where it comes from."""

import tomllib
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fvae_dist.planning import hardware
from fvae_dist.planning.hardware import PlanError, constants, detect_gpu, find_gpu, gpu_names

ROOT = Path(__file__).parents[2]


def test_every_gpu_can_be_used():
    assert {"a100-80", "h100-80", "h200-141"} <= set(gpu_names())
    for name in gpu_names():
        gpu = find_gpu(name)
        assert 0 < gpu.matmul_flops < gpu.peak_flops
        assert 0 < gpu.network_bytes < 1e12 and 0 < gpu.in_node_bytes < 1e12
        for kind in ("flash_attention_2", "sdpa"):
            for length in (128, 4096, 8192, 40_000, 10**6):
                assert 0 < gpu.attention_flops(kind, length) < gpu.peak_flops


def test_measured_rates_replace_the_data_sheet():
    gpu, sheet = find_gpu("h200"), find_gpu("h100-80")
    assert gpu.is_measured and not sheet.is_measured
    assert gpu.matmul_flops == pytest.approx(790e12)
    assert sheet.matmul_flops == pytest.approx(989e12 * 0.8)
    # Measured: flash-attn 302 and 342, cuDNN 513 TFLOP/s.
    assert gpu.attention_flops("flash_attention_2", 8192) == pytest.approx(302e12, rel=0.01)
    assert gpu.attention_flops("flash_attention_2", 65536) == pytest.approx(342e12, rel=0.01)
    assert gpu.attention_flops("sdpa", 8192) == pytest.approx(513e12, rel=0.01)


def test_attention_is_interpolated_between_lengths():
    gpu = find_gpu("h200")
    rates = [gpu.attention_flops("flash_attention_2", length) for length in (1024, 4096, 8192, 16384, 32768)]
    assert rates == sorted(rates) and len(set(rates)) == len(rates)


@pytest.mark.parametrize("name", ["h200", "H200-141", " h200-141 "])
def test_memory_size_may_be_left_out(name):
    assert find_gpu(name).name == "h200-141"


@pytest.mark.parametrize(
    ("name", "message"), [("h100-8O", "did you mean h100-80?"), ("h100", "is one of h100-80"), ("", "unknown GPU ''")]
)
def test_unknown_gpu_names_the_nearest(name, message):
    with pytest.raises(PlanError, match=message.replace("?", r"\?")):
        find_gpu(name)


def test_network_can_be_stated():
    assert find_gpu("h100-80", 800).network_bytes == pytest.approx(2 * find_gpu("h100-80").network_bytes)


def test_every_constant_says_where_it_comes_from():
    kinds = {entry.kind for entry in constants().values()}
    assert kinds == {"measured", "fitted", "source", "assumed"}
    assert all(entry.source and entry.unit and entry.value > 0 for entry in constants().values())


def test_tables_are_part_of_the_package():
    """Found as an installed package finds them, and named to setuptools so that a wheel holds them."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fvae_dist"]
    tables = [path for path in resources.files("fvae_dist.planning").iterdir() if path.name.endswith(".json")]
    assert {path.name for path in tables} == {"calibration.json", "gpus.json"}
    assert all(any(fnmatch(f"planning/{path.name}", pattern) for pattern in patterns) for path in tables)


def test_detection(monkeypatch):
    def device(name):
        return SimpleNamespace(name=name, total_memory=140 * 2**30)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device("NVIDIA H200"))
    gpu, number = detect_gpu()
    assert (gpu.name, gpu.memory_gib, number) == ("h200-141", 140, 4)
    for name, expected in (
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA H100 PCIe", "h100-pcie-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s-48"),
        ("NVIDIA L4", "l4-24"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, name=name: device(name))
        assert detect_gpu()[0].name == expected
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device("Quadro K600"))
    with pytest.raises(PlanError, match="'Quadro K600' is not in"):
        detect_gpu()


def test_detection_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match="no CUDA device here"):
        hardware.detect_gpu()
