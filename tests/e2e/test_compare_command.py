"""The compare command: real trainings and evaluations of three methods on a tiny model, each a process of its own."""

import csv
import json
from pathlib import Path

import pytest

from fvae_dist.cli import compare_command
from tests.comparing import LORA, write_comparison, write_inputs


@pytest.fixture
def compare(capfd, monkeypatch):
    """compare(path, *arguments) -> exit code, stdout, stderr."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def compare(path: Path, *arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = compare_command(["--config", str(path), *arguments])
        return code, *capfd.readouterr()

    return compare


def test_three_methods_are_trained_tested_two_at_once_and_not_run_again(compare, tmp_path):
    write_inputs(tmp_path)
    path = write_comparison(tmp_path)
    code, printed, errors = compare(path, "--jobs", "2")
    assert code == 0, errors
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
    # Two layers of q (32 to 32) and v (32 to 16), A and B of rank 4; of FVAE-LoRA less is used than is trained.
    assert rows["lora"]["trainable_parameters"] == rows["lora"]["inference_parameters"] == str(2 * 4 * (64 + 48))
    assert int(rows["fvae"]["inference_parameters"]) < int(rows["fvae"]["trainable_parameters"])
    for name in ("comparison.md", "comparison.png", "comparison.html"):
        assert (out / name).stat().st_size > 0
    assert "how many at once: fvae (2), lora (2), pissa (2)." in printed
    before = {file: file.stat().st_mtime_ns for file in (out / "trials").rglob("*") if file.is_file()}
    assert compare(path)[:2] == (0, printed)
    assert {file: file.stat().st_mtime_ns for file in (out / "trials").rglob("*") if file.is_file()} == before


def test_ranks_that_move_and_a_model_without_adapter(compare, tmp_path):
    write_inputs(tmp_path)
    methods = {"adalora": {"peft_type": "ADALORA", "init_r": 4, "target_r": 2}, "full": {"peft_type": "FULL"}}
    code, _, errors = compare(write_comparison(tmp_path, methods=methods, learning_rates=[1e-3]))
    assert code == 0, errors
    out = tmp_path / "out"
    rows = {row["method"]: row for row in csv.DictReader((out / "comparison.csv").read_text().splitlines())}
    for method in methods:
        folder = out / "trials" / method / "lr0.001-seed0"
        trained = json.loads((folder / "train" / "metrics.json").read_text())
        result = json.loads((folder / "result.json").read_text())
        assert result["value"] == pytest.approx(trained["eval_end"]["loss"], rel=1e-4)
    counts = {name: (int(row["trainable_parameters"]), int(row["inference_parameters"])) for name, row in rows.items()}
    assert counts["adalora"][0] == 2 * 4 * (64 + 48) + 4 * 4  # as LoRA's above, and four singular values a layer
    assert counts["adalora"][1] < 0.7 * counts["adalora"][0]
    assert counts["full"][0] == counts["full"][1] > 10_000


def test_a_failed_trial_is_told_and_kept(compare, tmp_path):
    write_inputs(tmp_path)
    path = write_comparison(tmp_path, methods={"lora": LORA})
    (tmp_path / "data.jsonl").unlink()
    code, printed, errors = compare(path)  # the one trial fails, and with it its test
    assert code == 1 and "| lora |  | 0 |" in printed
    first, second = [line for line in errors.splitlines() if line.startswith("failed: ")]
    assert first.startswith("failed: 0: train lora learning_rate=0.01 seed=0: training: exit code 2: error: ")
    assert "data.jsonl" in first and second.startswith("failed: 1: test lora seed=0: nothing to test")
    assert compare(path, "--list")[1].splitlines()[0].endswith("\tfailed")
