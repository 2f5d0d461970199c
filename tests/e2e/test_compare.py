"""The compare command: real trainings and evaluations of three methods on a tiny model."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.comparing import write_comparison, write_inputs

ROOT = Path(__file__).parents[2]


def compare(path: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "launch/compare.py", "--config", str(path), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_three_methods_are_trained_tested_and_not_run_again(tmp_path):
    write_inputs(tmp_path)
    path = write_comparison(tmp_path)
    first = compare(path)
    assert first.returncode == 0, first.stderr
    out = tmp_path / "out"
    rows = {row["method"]: row for row in csv.DictReader((out / "comparison.csv").read_text().splitlines())}
    assert list(rows) == ["fvae", "lora", "pissa"]
    for method, row in rows.items():
        folder = out / "trials" / method / "lr0.01-seed0"
        result = json.loads((folder / "result.json").read_text())
        trained = json.loads((folder / "train" / "metrics.json").read_text())
        assert trained["steps"] == 3
        # Saved and loaded again, the adapter is what was trained; PiSSA changes the base when it is attached.
        assert result["value"] == pytest.approx(trained["eval_end"]["loss"], rel=1e-4)
        assert 0 <= float(row["test_mean"]) <= 1 and row["worst_group_mean"] != "" and row["test_sd"] == ""
        assert float(row["step_s"]) > 0 and float(row["tokens_per_s_per_gpu"]) > 0 and float(row["peak_gib"]) > 0
    # Two layers of q (32 to 32) and v (32 to 16): A and B of rank 4; FVAE's: encoder 1's trunk and mean, and B.
    assert (
        rows["lora"]["trainable_parameters"] == rows["lora"]["inference_parameters"] == str(2 * 4 * (32 + 32 + 32 + 16))
    )
    assert int(rows["fvae"]["inference_parameters"]) < int(rows["fvae"]["trainable_parameters"])
    for name in ("comparison.md", "comparison.png", "comparison.html"):
        assert (out / name).stat().st_size > 0
    before = {path: path.stat().st_mtime_ns for path in (out / "trials").rglob("*") if path.is_file()}
    second = compare(path)
    assert second.returncode == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in (out / "trials").rglob("*") if path.is_file()} == before
    assert second.stdout == first.stdout


def test_a_failed_trial_is_told_and_tried_again(tmp_path):
    """Its data is missing at first; the failure is kept, and another run goes on from it."""
    write_inputs(tmp_path)
    path = write_comparison(tmp_path, methods={"lora": {"peft_type": "LORA", "r": 2}})
    (tmp_path / "data.jsonl").rename(tmp_path / "away.jsonl")
    result = compare(path, "--trial", "0")
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: 0: train lora learning_rate=0.01 seed=0: training: exit code 2: error: ")
    assert "data.jsonl" in line and compare(path, "--list").stdout.splitlines()[0].endswith("\tfailed")
