"""A classifier by the real command on two CPU ranks under ZeRO-3, beside one process without DeepSpeed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fvae_dist.cli import evaluate_command
from fvae_dist.training import run
from fvae_dist.training.recipe import Recipe
from tests.distributed.test_evaluation_ranks import run_two_ranks
from tests.distributed.test_full_two_ranks import ROOT, on_two_ranks
from tests.evaluating import records_of
from tests.methods import one_process, train, write_base
from tests.recipes import recipe_values, write_recipe, write_records

TEXTS = ("b", "q", "bbb", "qq", "bbbbb", "qqqq", "bb")  # steps of four: an epoch ends with three and a filler
pytestmark = pytest.mark.distributed


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def logged(folder: Path, key: str) -> list[float]:
    return [row[key] for row in json.loads((folder / "metrics.json").read_text())["history"]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero3_trains_the_same_classifier_and_resumes_bit_for_bit(tmp_path, monkeypatch, dtype):
    one_process(monkeypatch)
    base = write_base(tmp_path)
    data = write_records(tmp_path / "texts.jsonl", [{"text": t, "label": int("b" in t)} for t in TEXTS])
    source = {"path": str(data), "format": "classification"}
    values = recipe_values(
        tmp_path,
        base,
        model={"task": "classification", "random_weights": False, "dtype": dtype},
        data={"train": [source], "eval": [source]},
        logging={"steps": 1, "tensorboard": False},
        evaluation={"at_end": True},
        training={
            "output_dir": str(tmp_path / "alone"),
            "use_cpu": True,
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "save_strategy": "steps",
            "save_steps": 2,
            "use_liger_kernel": False,
        },
    )
    train(run.prepare(Recipe.model_validate(values)))
    values["training"] |= {"gradient_accumulation_steps": 1, "deepspeed": str(ROOT / "ds_configs" / "zero3.json")}
    for name, arguments in (("whole", ()), ("resumed", ("--resume", str(tmp_path / "whole" / "checkpoint-2")))):
        values["training"]["output_dir"] = str(tmp_path / name)
        on_two_ranks(write_recipe(tmp_path, values), *arguments)
    found, resumed, expected = (adapter_of(tmp_path / name) for name in ("whole", "resumed", "alone"))
    assert set(found) == set(expected) and found["base_model.model.score.weight"].shape == (2, 32)
    assert all(value.dtype == torch.float32 and torch.equal(value, resumed[name]) for name, value in found.items())
    assert json.loads((tmp_path / "whole" / "adapter" / "labels.json").read_text()) == ["0", "1"]
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for key in ("loss/task", "loss/neg_elbo"):
        one = logged(tmp_path / "alone", key)
        assert logged(tmp_path / "whole", key) == pytest.approx(one, rel=tolerance), key
    if dtype == "float32":
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
        evaluate_alone_and_sharded(tmp_path, base)


def evaluate_alone_and_sharded(folder: Path, base: Path) -> None:
    data = write_records(folder / "set.jsonl", [{"text": t, "label": int("b" in t), "group": t[0]} for t in TEXTS])
    command = ["--model", str(base), "--adapter", str(folder / "whole" / "adapter"), "--suite", "groups"]
    command += ["--data", f"groups={data}", "--batch-size", "2", "--out"]
    assert evaluate_command([*command, str(folder / "one")]) == 0
    run_two_ranks([[*command, str(folder / "two")]], folder)
    one, two = (records_of(folder / name / "groups" / "groups.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 7
    for ours, theirs in zip(one, two, strict=True):
        assert ours.pop("probabilities") == pytest.approx(theirs.pop("probabilities"), rel=1e-5)
        assert ours == theirs
