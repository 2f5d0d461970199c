"""launch/benchmark.py on toys: what it reports and writes, and what it refuses. Nothing here asserts a time."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fvae_dist.cli import main

ROOT = Path(__file__).parents[2]
ADAPTER = ["--r", "4", "--encoder-hidden", "4", "--decoder-layers", "1", "--decoder-hidden", "8"]
QUICK = ["--rounds", "2", "--warm-up", "1", "--dtype", "float32"]
LAYER = ["layer", "--dim", "24", "--out-dim", "16", "--tokens", "8", "9", *ADAPTER, *QUICK]
STEP = ["step", "--shape", "tiny", "--tokens", "16", *ADAPTER, *QUICK]
MEASURED = {"ms", "ms_low", "ms_high", "floor_ms", "x_floor", "tflops"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def benchmark(capsys, folder: Path, *arguments: str) -> dict:
    """Run the command, which must succeed; returns what it wrote as JSON."""
    assert main(["benchmark", *arguments, "--output", str(folder)]) == 0
    text = capsys.readouterr().out
    assert (folder / "benchmark.md").read_text() == text
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / "benchmark.json").read_text())
    assert len((folder / "benchmark.csv").read_text().splitlines()) == len(found["rows"]) + 1
    assert {"torch", "transformers", "peft", "deepspeed", "liger-kernel", "triton"} <= set(found["versions"])
    assert found["device"] and found["date"] and all(value > 0 for value in found["ceilings"].values())
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == len(found["rows"]) + 2 and len({line.replace("\\|", "").count("|") for line in table}) == 1
    for row in found["rows"]:
        numbers = [value for value in row.values() if isinstance(value, (int, float))]
        assert all(math.isfinite(value) for value in numbers)
        assert (
            "note" in row or found["command"] == "floor" or (set(row) >= MEASURED and min(row["ms"], row["tflops"]) > 0)
        )
    return found


def refused(capsys, *arguments: str) -> str:
    """The one line that the command prints."""
    capsys.readouterr()
    assert main(["benchmark", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    return captured.err.removeprefix("error: ").rstrip("\n")


def test_layer(tmp_path, capsys):
    found = benchmark(capsys, tmp_path, *LAYER)
    assert found["command"] == "layer" and found["config"]["dim"] == 24 and found["dtype"] == "float32"
    rows = {(row["tokens"], row["variant"]): row for row in found["rows"]}
    assert list(rows) == [(tokens, name) for tokens in (8, 9) for name in ("base", "lora", "torch", "fused")]
    for tokens in (8, 9):
        assert rows[tokens, "lora"]["ratio_to_lora"] == 1.0
        assert rows[tokens, "torch"]["ratio_to_lora"] > 0 and "above_base_ms" in rows[tokens, "torch"]
        assert rows[tokens, "torch"]["floor_ms"] > rows[tokens, "lora"]["floor_ms"] > rows[tokens, "base"]["floor_ms"]
        assert rows[tokens, "base"]["adapter_floor_ms"] is None


def test_floor(tmp_path, capsys):
    found = benchmark(capsys, tmp_path, "--floor", *LAYER[1:])
    assert found["command"] == "floor"
    rows = {(row["tokens"], row["label"], row["phase"]): row for row in found["rows"]}
    assert len(rows) == 2 * 3 * 5
    for of in ("frozen base", "LoRA adapter", "FVAE adapter"):
        parts = {phase: row for (tokens, label, phase), row in rows.items() if (tokens, label) == (8, of)}
        for key in ("mib", "gflop", "floor_us"):
            once = parts["forward"][key] + parts["backward"][key]
            assert parts["sum without recompute"][key] == pytest.approx(once)
            assert parts["sum with recompute"][key] == pytest.approx(once + parts["recompute"][key])
            assert parts["forward"][key] > 0
    assert main(["benchmark", *LAYER, "--floor"]) == 0
    assert "Floor of one layer, 24 x 16" in capsys.readouterr().out


def test_step(tmp_path, capsys):
    names = ["base", "lora", "torch", "torch +terms"]
    arguments = ["--recompute", "full", "none", "--telemetry", "--variants", *names[:3]]
    found = benchmark(capsys, tmp_path, *STEP, *arguments)
    assert [(row["recompute"], row["variant"]) for row in found["rows"]] == [
        (recompute, name) for recompute in ("full", "none") for name in names
    ]
    rows = {(row["recompute"], row["variant"]): row for row in found["rows"]}
    for recompute in ("full", "none"):
        assert all(rows[recompute, name]["tokens_per_s"] > 0 for name in names)
        assert all(rows[recompute, name]["mfu"] > 0 for name in names)
        assert rows[recompute, "torch +terms"]["ratio_to_silent"] > 0
    assert rows["full", "torch"]["floor_ms"] > rows["none", "torch"]["floor_ms"]
    (fused,) = benchmark(capsys, tmp_path / "fused", *STEP, "--variants", "fused", "--rounds", "1")["rows"]
    assert fused["variant"] == "fused"
    (of_all,) = benchmark(capsys, tmp_path / "all", *STEP, "--variants", "torch", "--targets", "all-linear")["rows"]
    operations = [row["ms"] * row["tflops"] for row in (rows["full", "torch"], fused, of_all)]
    assert operations[0] == pytest.approx(operations[1]) and operations[2] > 1.01 * operations[0]


def test_attention(tmp_path, capsys):
    sizes = ["--heads", "4", "--kv-heads", "2", "--head-dim", "8"]
    backends = ["sdpa-math", "flash_attention_2"]
    found = benchmark(capsys, tmp_path, "attention", "--tokens", "8", *sizes, *QUICK, "--backends", *backends)
    assert [row["variant"] for row in found["rows"]] == backends
    assert "ms" in found["rows"][0]


@pytest.mark.distributed
def test_context_goes_on_where_it_was(tmp_path, capfd):
    command = ["context", "--shape", "tiny", "--tokens", "32", "--steps", "2", "--warm-up", "1", "--dtype", "float32"]
    command += ["--attention-tflops", "0.1", *ADAPTER]
    (lora,) = benchmark(capfd, tmp_path, *command, "--variants", "lora")["rows"]
    found = benchmark(capfd, tmp_path, *command, "--variants", "lora", "torch")
    assert found["rows"][0] == lora and [row["variant"] for row in found["rows"]] == ["lora", "torch"]
    for row in found["rows"]:
        assert min(row[key] for key in ("tokens_per_s", "mfu", "attention_share", "peak_gib", "host_peak_gib")) > 0
    assert found["rows"][1]["ratio_to_lora"] == found["rows"][1]["ms"] / lora["ms"]
    assert found["largest"]["torch"] == {"fits": 32, "too_long": None, "failed": ""}
    assert refused(capfd, *command, "--r", "8", "--output", str(tmp_path)) == (
        f"{tmp_path}/benchmark.json: rows of other settings: r 4, now 8; take another --output"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required: {layer,step,attention,context} (see --help)"),
        (["layers"], "argument {layer,step,attention,context}: invalid choice: 'layers'"),
        (["layer", "--tokens", "1"], "argument --tokens: must be a number >= 2, got 1"),
        (["layer", "--dropout", "1"], "--dropout must lie in [0, 1), got 1.0"),
        (["layer", "--variants", "dora"], "argument --variants: invalid choice: 'dora'"),
        (["layer", "--variants", "reference"], "--variants reference needs --reference PATH"),
        (["layer", "--reference", "nowhere"], "--reference: nowhere is no clone of idiap/FVAE-LoRA"),
        (["layer", "--output", "/dev/null/x"], "--output /dev/null/x: not a directory"),
        (["step", "--floor"], "unrecognized arguments: --floor"),
        (["step", "--compare", "trl"], "--compare goes with --gpus"),
        (["step", "--gpus", "1", "--variants", "base"], "--variants base trains nothing"),
        (["step", "--gpus", "1", "--reference", "x"], "--reference does not go with --gpus"),
        (["step", "--variants", "reference"], "--variants reference needs --reference PATH"),
        (["step", "--targets", "all-linear", "q_proj"], "--targets: all-linear stands alone"),
        (["context", "--steps", "2"], "--steps 2 must be more than --warm-up 2"),
        (["context", "--from", "9", "--to", "8"], "--to 8 is less than --from 9"),
        (["context", "--gpus", "3", "--sequence-parallel", "2"], "--gpus 3 is no multiple of --sequence-parallel 2"),
        (["context", "--attention-tflops", "0"], "--attention-tflops must be > 0, got 0.0"),
        (["context", "--variants", "base"], "argument --variants: invalid choice: 'base'"),
        (["context", "--output", "/dev/null/x"], "--output /dev/null/x: not a directory"),
        (["attention", "--heads", "5", "--kv-heads", "2"], "--heads 5 is no multiple of --kv-heads 2"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, line):
    assert refused(capsys, *arguments).startswith(line)


def test_what_needs_a_gpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert refused(capsys, *STEP, "--liger") == "--liger: Liger's kernels need a GPU"
    line = refused(capsys, *STEP, "--attention", "flash_attention_2")
    assert line.startswith("--attention: flash_attention_2 cannot run here: no CUDA device here")


def test_launcher_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(capsys, *STEP).startswith("start it without a launcher")


def test_script_runs():
    command = [sys.executable, str(ROOT / "launch" / "benchmark.py"), "layer", "--rounds", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=180, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: argument --rounds: must be a number >= 1, got 0 (see --help)\n"
