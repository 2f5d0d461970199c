"""The evaluate command in this process, on models that say a fixed thing or are random."""

import json
from pathlib import Path

import pytest

from fvae_dist.cli import evaluate_command
from tests.evaluating import write_adapted, write_speaker


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """true/ and garbage/ say just that; base/ and adapter/ are random."""
    folder = tmp_path_factory.mktemp("models")
    write_speaker(folder / "true", "true")
    write_speaker(folder / "garbage", "zz")
    write_adapted(folder)
    return folder


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def evaluate(tmp_path, capfd, one_process):
    """evaluate(model, suite, data, *arguments): run the command, which must succeed; returns results["suites"]."""

    def evaluate(model: Path, suite: str, data: Path, *arguments: str, out: str = "out"):
        command = ["--model", model, "--suite", suite, "--data", f"{suite}={data}", "--out", tmp_path / out, *arguments]
        assert evaluate_command([str(argument) for argument in command]) == 0, capfd.readouterr().err
        assert capfd.readouterr().out == (tmp_path / out / "results.md").read_text()
        return json.loads((tmp_path / out / "results.json").read_text())["suites"]

    return evaluate


@pytest.fixture
def refused(tmp_path, capfd, one_process):
    """refused(*arguments): the one line that the command prints; it must write no result."""

    def refused(*arguments) -> str:
        capfd.readouterr()
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*") if path.is_file()}
        assert evaluate_command([*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        captured = capfd.readouterr()
        lines = [line for line in captured.err.splitlines() if line and "Loading weights" not in line]
        assert captured.out == "" and len(lines) == 1 and lines[0].startswith("error: "), captured.err
        assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*") if path.is_file()} == before
        return lines[0].removeprefix("error: ")

    return refused
