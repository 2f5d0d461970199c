"""The harness's tasks on the adapted model: offline, on a task of our own."""

import json
import sys

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fvae_dist.cli import evaluate_command
from tests.evaluating import write_adapted
from tests.recipes import byte_tokenizer, write_records


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command line for the task `colours`, of three questions with two answers."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    base, adapter = write_adapted(tmp_path)
    records = [{"text": text, "gold": gold} for text, gold in (("grass is", 0), ("blood is very", 1), ("a leaf is", 0))]
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(write_records(tmp_path / "colours.jsonl", records))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_target": "gold",
        "doc_to_choice": ["green", "red"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(yaml.safe_dump(task))
    paths = {"--model": base, "--adapter": adapter, "--out": tmp_path / "out", "--lm-eval-tasks": tmp_path / "tasks"}
    return [str(part) for pair in paths.items() for part in pair] + ["--suite", "lm_eval:colours"]


def test_task_of_the_harness_sees_the_adapted_model(command, tmp_path, capfd):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    assert evaluate_command(command) == 0, capfd.readouterr().err
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["lm_eval"]["colours"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    correct = []
    for line in (tmp_path / "out" / "lm_eval" / "colours.jsonl").read_text().splitlines():
        row = json.loads(line)
        likelihoods = [log_likelihood(model, row["doc"]["text"], f" {answer}") for answer in ("green", "red")]
        for (kept, _), expected in zip(row["filtered_resps"], likelihoods, strict=True):
            assert float(kept) == pytest.approx(expected, rel=1e-4)
        correct.append(float(likelihoods[row["doc"]["gold"]] == max(likelihoods)))
    assert metrics["acc"]["value"] == sum(correct) / 3 and metrics["num_samples"] == 3
    assert metrics["acc"]["low"] <= metrics["acc"]["value"] <= metrics["acc"]["high"]


def log_likelihood(model, prompt: str, answer: str) -> float:
    tokenizer = byte_tokenizer()
    start = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([start + tokenizer(answer, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        log_TV = model(ids).logits[0].log_softmax(-1)
    return sum(float(log_TV[t - 1, ids[0, t]]) for t in range(len(start), ids.shape[1]))


def test_unknown_task_is_one_line(command, capfd):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    assert evaluate_command([*command[:-1], "lm_eval:colours,nosuchtask"]) == 2
    assert "error: --suite lm_eval:nosuchtask: the harness knows no such task" in capfd.readouterr().err


def test_without_the_harness_the_install_line_is_named(command, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert evaluate_command(command) == 2
    assert "is not installed: pip install 'fvae-dist[eval]'" in capfd.readouterr().err
