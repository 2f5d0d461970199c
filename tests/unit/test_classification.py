"""A recipe of sequence classification on CPU: what is trained and saved, exact resume, groups, refusals."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fvae_dist.cli import evaluate_command, train_command
from fvae_dist.evaluation.groups import groups_tasks
from fvae_dist.evaluation.spurious import main as make_spurious
from fvae_dist.evaluation.tasks import Options
from fvae_dist.training import run
from fvae_dist.training.batches import COUNTED, drop_fillers, token_mask_of
from fvae_dist.training.classification import row_loss
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.recipe_file import load_recipe
from tests.evaluating import records_of
from tests.methods import one_process, train, write_base
from tests.recipes import byte_tokenizer, recipe_values, write_recipe, write_records

# A letter decides.
TEXTS = [("b", "good"), ("q", "bad"), ("bbb", "good"), ("qq", "bad"), ("bb", "good"), ("qqqq", "bad")]
SOURCE = {"format": "classification"}
TRAINING = {
    "use_cpu": True,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "save_strategy": "no",
    "stall_timeout_s": 0,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classification")
    write_base(folder)
    write_records(folder / "texts.jsonl", [{"text": text, "label": label} for text, label in TEXTS])
    groups = [{"text": text * 2, "label": label, "group": f"length {len(text) % 2}"} for text, label in TEXTS]
    write_records(folder / "groups.jsonl", groups)
    return folder


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    one_process(monkeypatch)


def recipe_file(folder, out, **sections):
    """A recipe of the texts; `sections` as of tests.recipes."""
    source = {**SOURCE, "path": str(folder / "texts.jsonl")}
    values = recipe_values(
        folder,
        folder / "base",
        model={"task": "classification", "random_weights": False, **sections.pop("model", {})},
        data={"train": [source], "eval": [source], **sections.pop("data", {})},
        training={**TRAINING, "output_dir": str(out / "run"), **sections.pop("training", {})},
        logging={"steps": 1, "tensorboard": False},
        **sections,
    )
    out.mkdir(exist_ok=True)
    return str(write_recipe(out, values))


def trained(folder, out, *callbacks, resume=None, **sections):
    return train(run.prepare(load_recipe(recipe_file(folder, out, **sections), []), resume), *callbacks)


def evaluated(folder, adapter, data, out):
    arguments = ["--model", str(folder / "base"), "--adapter", str(adapter), "--suite", "groups"]
    assert evaluate_command([*arguments, "--data", f"groups={data}", "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text())["suites"]["groups"]["groups"]


def test_a_word_that_decides_is_learned_and_evaluated(folder, tmp_path):
    evaluation = {"every": 10, "suites": {"groups": str(folder / "groups.jsonl")}, "at_start": True, "at_end": True}
    evaluation |= {"best_metric": "groups/groups/worst_group"}
    recipe = recipe_file(folder, tmp_path, training={"max_steps": 20}, evaluation=evaluation)
    assert train_command(["--config", recipe]) == 0
    adapter = tmp_path / "run" / "adapter"
    numbers = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert all(row["loss/neg_elbo"] > 0 for row in numbers["history"]) and len(numbers["history"]) == 20
    assert numbers["eval_end"]["loss"] < 0.3 < numbers["eval_start"]["loss"]
    assert json.loads((adapter / "labels.json").read_text()) == ["bad", "good"]
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].shape == (2, 32)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    card = (adapter / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "id2label={0: 'bad', 1: 'good'}" in card
    assert json.loads((tmp_path / "run" / "best" / "labels.json").read_text()) == ["bad", "good"]
    result = evaluated(folder, adapter, folder / "groups.jsonl", tmp_path / "out")
    assert result["accuracy"]["value"] > 0.8 and result["calibration"]["nll"] < math.log(2)
    assert result["groups"].keys() >= {"average", "balanced", "worst_group", "gap", "worst_group_name"}


def test_saved_adapter_is_the_trained_model_in_plain_peft(folder, tmp_path):
    model = trained(folder, tmp_path).model.eval()
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", id2label={0: "bad", 1: "good"})
    loaded = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
    row = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")("bq", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**row).logits, model(**row).logits)
    assert model.config.id2label == {0: "bad", 1: "good"} and model.config.label2id == {"bad": 0, "good": 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_is_trained_in_fp32(folder, tmp_path, dtype):
    trainer = trained(folder, tmp_path, model={"dtype": dtype})
    head = trainer.model.get_base_model().score
    assert head.weight.dtype == torch.float32 and head.weight.requires_grad
    assert not torch.equal(head.weight, head.original_module.weight)
    assert trainer.model.get_base_model().model.embed_tokens.weight.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("layout", [(2, 2), (1, 4)])
def test_task_loss_is_the_mean_over_the_rows_of_the_step(folder, tmp_path, layout):
    """Whatever the micro-batches; the epoch's last step has two rows, not four."""
    size, accumulation = layout
    training = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
    one = {"per_device_train_batch_size": size * accumulation, "gradient_accumulation_steps": 1, "max_steps": 2}
    runs = [trained(folder, tmp_path / str(i), training=values) for i, values in enumerate((training, one))]
    found, expected = ([row for row in run.state.log_history if "loss/task" in row] for run in runs)
    for key in ("loss/task", "loss/neg_elbo", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-5), key
    weights = [{name: p for name, p in run.model.named_parameters() if p.requires_grad} for run in runs]
    for name, parameter in weights[0].items():
        torch.testing.assert_close(parameter, weights[1][name], rtol=0, atol=1e-5)


def test_fillers_count_for_nothing():
    ids = torch.arange(12).view(4, 3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}
    batch[COUNTED] = token_mask_of(batch)
    drop_fillers(batch, 3)
    assert batch["labels"].tolist() == [0, 1, 1, -100] and batch[COUNTED].sum() == 9
    logits = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    outputs = type("Outputs", (), {"logits": logits})
    expected = torch.nn.functional.cross_entropy(logits[:3], batch["labels"][:3])
    torch.testing.assert_close(row_loss(outputs, batch["labels"], 3), expected)
    torch.testing.assert_close(row_loss(outputs, batch["labels"]), expected)
    drop_fillers(batch, 0)
    assert row_loss(outputs, batch["labels"], 3) == 0
    with pytest.raises(ValueError, match=r"labels of shape \(4,\) are no tokens'"):
        token_mask_of(batch, "labelled")


def test_resume_is_exact_and_knows_its_labels(folder, tmp_path):
    def settings(name, steps):
        return {"save_strategy": "steps", "save_steps": 2, "max_steps": steps, "output_dir": str(tmp_path / name)}

    whole = trained(folder, tmp_path, training=settings("whole", 4))
    trained(folder, tmp_path, training=settings("parts", 2))
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    assert json.loads((checkpoint / "labels.json").read_text()) == ["bad", "good"]
    resumed = trained(folder, tmp_path, resume="auto", training=settings("parts", 4))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    other = write_records(tmp_path / "other.jsonl", [{"text": "b", "label": 1}, {"text": "q", "label": 0}])
    with pytest.raises(RecipeError, match=r"was trained on the labels \['bad', 'good'\], the data has \['0', '1'\]"):
        trained(
            folder,
            tmp_path,
            resume=str(checkpoint),
            training=settings("parts", 6),
            data={"train": [{**SOURCE, "path": str(other)}], "eval": []},
        )


def test_labels_are_numbered_over_train_and_eval(folder, tmp_path):
    """Numbers in their order; a class that only data.eval has is known too."""
    numbers = write_records(tmp_path / "train.jsonl", [{"x": f"text {i}", "y": i} for i in (10, 2, 10)])
    more = write_records(tmp_path / "eval.jsonl", [{"x": "another", "y": "7"}])
    source = {**SOURCE, "columns": {"text": "x", "label": "y"}}
    data = {"train": [{**source, "path": str(numbers)}], "eval": [{**source, "path": str(more)}]}
    prepared = run.prepare(load_recipe(recipe_file(folder, tmp_path, data=data), []), dry_run=True)
    assert prepared.data.classes == ["2", "7", "10"] and prepared.config.num_labels == 3
    assert prepared.data.report["train"]["labels"] == {"2": 1, "7": 0, "10": 2}
    assert prepared.data.train["labels"] == [[2], [0], [2]] and prepared.data.eval["labels"] == [[1]]
    assert prepared.data.train[0]["input_ids"] == byte_tokenizer()("text 10")["input_ids"]


def test_long_texts_are_cut_alike_in_training_and_evaluation(folder, tmp_path):
    records = [{"text": "abcdefgh", "label": label, "group": "g"} for label in ("no", "yes")]
    path = str(write_records(tmp_path / "long.jsonl", records))
    data = {"train": [{**SOURCE, "path": path}], "eval": [], "max_length": 4}
    prepared = run.prepare(load_recipe(recipe_file(folder, tmp_path, data=data), []), dry_run=True)
    assert prepared.data.report["train"]["num_truncated"] == 2
    (task,) = groups_tasks(byte_tokenizer(), Options({"groups": path}, max_length=4), 2, ["no", "yes"])
    assert task.samples[0].rows[0].ids == prepared.data.train[0]["input_ids"] == byte_tokenizer()("abc")["input_ids"]
    assert task.samples[0].facts["num_cut_tokens"] == 5
    recipe = recipe_file(folder, tmp_path, data={**data, "overlong": "drop"})
    assert train_command(["--config", recipe]) == 2


def test_dry_run_shows_text_and_label(folder, tmp_path, capsys):
    assert train_command(["--config", recipe_file(folder, tmp_path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "<s>b ⟦good⟧" in shown and "unknown: classification is not planned" in shown


def test_spurious_suite_is_trained_and_evaluated(folder, tmp_path):
    """The generator's classification form is both training data and suite."""
    data = write_records(tmp_path / "all.jsonl", [{"text": f"{t} {i}", "label": k} for i in range(6) for t, k in TEXTS])
    out = tmp_path / "suite"
    command = ["--data", str(data), "--cue", "word", "--out", str(out), "--form", "classification"]
    assert make_spurious(command) == 0
    source = {**SOURCE, "path": str(out / "train.jsonl")}
    trained(folder, tmp_path, data={"train": [source], "eval": [], "groups": "group"}, training={"max_steps": 2})
    result = evaluated(folder, tmp_path / "run" / "adapter", out / "test.jsonl", tmp_path / "out")
    assert set(result["groups"]["groups"]) == {f"{k}|{w}" for k in ("bad", "good") for w in ("indeed", "perhaps")}
    assert {row["answer"] for row in records_of(tmp_path / "out" / "groups" / "groups.jsonl")} == {"bad", "good"}


def test_plain_lora_is_a_classifier_too(folder, tmp_path):
    values = yaml.safe_load(Path(recipe_file(folder, tmp_path)).read_text())
    values["adapter"] = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    trainer = train(run.prepare(load_recipe(str(write_recipe(tmp_path, values)), []), None))
    assert trainer.model.get_base_model().score.weight.requires_grad


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"packing": True}}, "data.packing: true: goes not with model.task classification"),
        ({"data": {"overlong": "split"}}, "data.overlong: split: goes not with"),
        ({"training": {"side_loss_tokens": "labelled"}}, "training.side_loss_tokens: labelled: goes not with"),
        ({"training": {"head": "fused"}}, "training.head: fused: goes not with"),
        ({"training": {"use_liger_kernel": True}}, "training.use_liger_kernel: true: goes not with"),
        ({"training": {"tiled_mlp": True}}, "training.tiled_mlp: true: goes not with"),
        ({"training": {"activation_offload": True}}, "training.activation_offload: true: goes not with"),
        ({"training": {"recompute": "selective"}}, "training.recompute: selective: goes not with"),
        ({"adapter": {"peft_type": "ADALORA"}}, "adapter.peft_type: ADALORA: goes not with"),
        ({"adapter": {"peft_type": "LORA", "init_lora_weights": "eva"}}, "adapter.init_lora_weights: eva: goes not"),
        ({"adapter": {"task_type": "CAUSAL_LM"}}, "adapter.task_type: must be SEQ_CLS, got 'CAUSAL_LM'"),
        ({"model": {"task": "causal_lm"}}, "data: format classification of "),
    ],
)
def test_what_goes_not_with_classification_is_refused(folder, tmp_path, capsys, sections, message):
    assert train_command(["--config", recipe_file(folder, tmp_path, **sections)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a", "label": "x"}, {"text": "b"}], 'bad.jsonl:2: missing column "label"'),
        ([{"text": "a", "label": 1.5}], 'bad.jsonl:1: column "label" must be text, not float'),
        ([{"text": "a", "label": " "}], 'bad.jsonl:1: column "label" is empty'),
        ([{"text": "", "label": 1}], 'bad.jsonl:1: column "text" is empty'),
        ([{"text": "a", "label": "x"}] * 2, "data.train: every record has the label 'x': nothing to learn"),
    ],
)
def test_bad_records_are_named(folder, tmp_path, capsys, records, message):
    path = write_records(tmp_path / "bad.jsonl", records)
    recipe = recipe_file(folder, tmp_path, data={"train": [{**SOURCE, "path": str(path)}], "eval": []})
    assert train_command(["--config", recipe]) == 2
    assert message in capsys.readouterr().err


def test_prompt_learning_is_refused(folder, tmp_path, capsys):
    values = yaml.safe_load(Path(recipe_file(folder, tmp_path)).read_text())
    values["adapter"] = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    assert train_command(["--config", str(write_recipe(tmp_path, values))]) == 2
    assert "the head would read the padding of shorter texts" in capsys.readouterr().err


def test_unknown_labels_and_a_broken_label_file_are_refused(folder, tmp_path, capsys):
    trained(folder, tmp_path)
    adapter = tmp_path / "run" / "adapter"
    data = write_records(tmp_path / "set.jsonl", [{"text": "b", "label": "great", "group": "g"}])
    command = ["--model", str(folder / "base"), "--adapter", str(adapter), "--suite", "groups"]
    command += ["--data", f"groups={data}", "--out", str(tmp_path / "out")]
    assert evaluate_command(command) == 2
    assert "set.jsonl:1: label 'great' is none of the classifier's: bad, good" in capsys.readouterr().err
    for content, message in (
        ('["a", "a"]', "must be a list of two or more different texts"),
        ("{", "cannot be read"),
        ('["a", "b", "c"]', "names 3 classes, the head has 2"),
    ):
        (adapter / "labels.json").write_text(content)
        assert evaluate_command(command) == 2
        assert message in capsys.readouterr().err
