"""Suites during training: what they log and keep, and that training does not notice them."""

import json

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from fvae_dist.cli import evaluate_command, train_command
from fvae_dist.evaluation.callback import SuiteEvaluation, plan_suites
from fvae_dist.training.callbacks import TensorBoardLogs
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.run import RecipeTrainer
from tests.evaluating import boolq, write_adapted, write_json
from tests.models import tiny_adapter
from tests.recipes import byte_tokenizer, make_recipe, write_recipe, write_records


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recipe(tmp_path):
    base, _ = write_adapted(tmp_path)
    write_records(tmp_path / "data.jsonl")
    data = write_json(tmp_path / "val.json", boolq("tft", group="a") + boolq("ff", group="b"))
    evaluation = {"every": 2, "best_metric": "groups/groups/nll", "suite_batch_size": 2}
    evaluation |= {"suites": {"groups": str(data), "commonsense": str(data)}, "max_new_tokens": 4}
    return make_recipe(tmp_path, base, evaluation=evaluation)


def train(tmp_path, recipe, name: str, with_suites: bool, steps: int = 4) -> RecipeTrainer:
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(base, tiny_adapter(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    ids = byte_tokenizer()("is it even?\ntrue")["input_ids"]
    arguments = SFTConfig(
        output_dir=str(tmp_path / name),
        use_cpu=True,
        bf16=False,
        max_steps=steps,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = RecipeTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids}] * 8),
        processing_class=byte_tokenizer(),
        base_fingerprint="x",
    )
    trainer.add_callback(TensorBoardLogs(trainer, tmp_path / name / "tensorboard", histograms=False))
    if with_suites:
        recipe.training.output_dir = str(tmp_path / name)
        tasks = plan_suites(recipe, trainer.processing_class, base.config)
        trainer.add_callback(SuiteEvaluation(trainer, recipe, tasks))
    trainer.train()
    return trainer


def adapter_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_suites_are_logged_and_the_best_adapter_is_kept(tmp_path, recipe, capfd):
    trainer = train(tmp_path, recipe, "with", with_suites=True)
    plain = train(tmp_path, recipe, "without", with_suites=False)
    for name, value in adapter_of(trainer).items():
        assert torch.equal(value, adapter_of(plain)[name]), f"{name}: the suites changed the training"
    rows = {row["step"]: row for row in trainer.state.log_history if "eval/groups/groups/worst_group" in row}
    assert [row["step"] for row in trainer.state.log_history if "loss/task" in row] == [1, 2, 3, 4]
    assert list(rows) == [2, 4] and "eval/commonsense/val/num_parse_failures" in rows[2]
    events = EventAccumulator(str(tmp_path / "with" / "tensorboard")).Reload()
    logged = {event.step: event.value for event in events.Scalars("eval/groups/groups/nll")}
    assert logged == {step: pytest.approx(row["eval/groups/groups/nll"]) for step, row in rows.items()}

    best = json.loads((tmp_path / "with" / "best" / "best.json").read_text())
    expected = min(rows.values(), key=lambda row: row["eval/groups/groups/nll"])
    assert best == {
        "step": expected["step"],
        "metric": "groups/groups/nll",
        "value": expected["eval/groups/groups/nll"],
    }
    # The command finds in the kept adapter what the callback saw in training.
    command = ["--model", tmp_path / "base", "--adapter", tmp_path / "with" / "best", "--out", tmp_path / "out"]
    command += ["--suite", "groups", "--data", f"groups={tmp_path / 'val.json'}", "--batch-size", "2"]
    assert evaluate_command([str(part) for part in command]) == 0, capfd.readouterr().err
    found = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["groups"]["groups"]
    assert found["calibration"]["nll"] == pytest.approx(best["value"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_metric": "groups/nll"}, "evaluation.best_metric: groups/nll is no metric of the suites"),
        ({"best_metric": "groups/groups/worst"}, "evaluation.best_metric: groups/groups/worst is no metric"),
        ({"suites": {"groups": "nowhere.json"}}, "evaluation.suites: --data groups: there is no nowhere.json"),
    ],
)
def test_bad_plans_are_found_before_training(tmp_path, recipe, changes, message):
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=changes)})
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "base").config
    with pytest.raises(RecipeError, match=message):
        plan_suites(recipe, byte_tokenizer(), config)


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"every": 5}, "evaluation.every: goes with evaluation.suites"),
        ({"suites": {"groups": "x"}}, "evaluation.every: goes with evaluation.suites"),
        ({"best_metric": "a/b/c"}, "evaluation.best_metric: needs evaluation.every"),
        ({"every": 5, "suites": {"grops": "x"}}, "grops"),
    ],
)
def test_contradictions_in_the_recipe_are_refused(tmp_path, evaluation, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(tmp_path, tmp_path, evaluation=evaluation)


def test_train_command_reads_the_suites_before_it_trains(tmp_path, recipe, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    values = recipe.model_dump(exclude_none=True)
    command = ["--config", str(write_recipe(tmp_path, values)), "--dry-run"]
    assert train_command(command) == 0
    capfd.readouterr()
    assert train_command([*command, "--set", "evaluation.suites.groups=nowhere.json"]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines == ["error: evaluation.suites: --data groups: there is no nowhere.json"]
