"""The evaluate command on real tiny models: what it counts, what it keeps, and what it refuses."""

import json
from pathlib import Path

import pytest

from fvae_dist.cli import evaluate_command
from tests.evaluating import boolq, write_adapted, write_json, write_speaker


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """true/ and garbage/ say just that; base/ and adapter/ are random."""
    folder = tmp_path_factory.mktemp("models")
    write_speaker(folder / "true", "true")
    write_speaker(folder / "garbage", "zz")
    write_adapted(folder)
    return folder


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def evaluate(tmp_path, capfd):
    """evaluate(model, suite, data, *arguments): run the command, which must succeed; returns results["suites"]."""

    def evaluate(model: Path, suite: str, data: Path, *arguments: str, out: str = "out"):
        command = ["--model", model, "--suite", suite, "--data", f"{suite}={data}", "--out", tmp_path / out, *arguments]
        assert evaluate_command([str(argument) for argument in command]) == 0, capfd.readouterr().err
        assert capfd.readouterr().out == (tmp_path / out / "results.md").read_text()
        return json.loads((tmp_path / out / "results.json").read_text())["suites"]

    return evaluate


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------- right, wrong, garbage


@pytest.mark.parametrize(
    ("says", "answers", "accuracy", "failures"),
    [("true", "ttttt", 1.0, 0), ("true", "fffff", 0.0, 0), ("true", "ttftf", 0.6, 0), ("garbage", "ttttt", 0.0, 5)],
)
def test_what_the_model_always_says_is_what_it_gets(evaluate, models, tmp_path, says, answers, accuracy, failures):
    folder = write_json(tmp_path / "sets" / "boolq.test.json", boolq(answers)).parent
    result = evaluate(models / says, "commonsense", folder, "--batch-size", "2")["commonsense"]["boolq"]
    assert result["accuracy"]["value"] == accuracy and result["num_parse_failures"] == failures
    assert result["num_samples"] == 5
    for record, letter in zip(records_of(tmp_path / "out" / "commonsense" / "boolq.jsonl"), answers, strict=True):
        assert record["prediction"] == (None if failures else "true")
        assert record["correct"] is (letter == "t" and not failures)
        assert record["output"] == ("z" * 32 if failures else "true")
