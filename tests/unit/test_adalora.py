"""AdaLoRA trained from a recipe on CPU: schedule, ranks, orthogonality, saved adapter, exact resume, refusals."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from fvae_dist.evaluation.loading import _attach
from fvae_dist.training.adalora import orthogonality_loss
from fvae_dist.training.recipe import RecipeError
from tests.methods import fresh_base, logits, one_process, prepare, train, write_base

ADAPTER = {"peft_type": "ADALORA", "init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 2, "beta1": 0.5, "beta2": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adalora")
    write_base(folder)
    return folder


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    one_process(monkeypatch)


class Ranks(TrainerCallback):
    """How many singular values are not zero, after every step."""

    def __init__(self):
        self.counts = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.counts.append(sum(int(p.count_nonzero()) for name, p in model.named_parameters() if ".lora_E." in name))


def test_schedule_is_the_runs(folder, tmp_path):
    epochs = {"num_train_epochs": 4.0, "per_device_train_batch_size": 2, "max_steps": -1, "output_dir": str(tmp_path)}
    prepared = prepare(folder, ADAPTER, **epochs)
    assert prepared.recipe.adapter["total_step"] == 8  # three records: two steps an epoch
    prepared.lock.close()
    with pytest.raises(RecipeError, match=r"^adapter.total_step: 9 contradicts the 8 optimizer steps of this run"):
        prepare(folder, {**ADAPTER, "total_step": 9}, **epochs)


@pytest.mark.parametrize(
    ("changes", "training", "message"),
    [
        ({"target_r": 4}, {}, r"^adapter.target_r: must be greater than 0 and less than init_r, got 4 and 4$"),
        ({"tinit": 2}, {}, r"^adapter.tinit, adapter.tfinal: 2 and 2 leave none of the 4 steps"),
        ({}, {"deepspeed": "ds_configs/zero2.json"}, r"^adapter.peft_type: ADALORA .* use training.deepspeed: null$"),
    ],
)
def test_what_would_not_be_adalora_is_refused(folder, tmp_path, changes, training, message):
    with pytest.raises(RecipeError, match=message):
        prepare(folder, {**ADAPTER, **changes}, output_dir=str(tmp_path), **training)


def test_ranks_move_and_are_saved(folder, tmp_path):
    ranks = Ranks()
    trainer = train(prepare(folder, ADAPTER, output_dir=str(tmp_path), max_steps=6), ranks)
    # Four layers of rank 4; one step without, then a falling budget to four of sixteen, kept for the last two steps.
    assert ranks.counts[0] == 16 and ranks.counts[-3:] == [4, 4, 4]
    assert sorted(ranks.counts, reverse=True) == ranks.counts and len(set(ranks.counts)) > 2
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for name, t in saved.items() if name.endswith("lora_E")) == 4
    pattern = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(sum(mask) for mask in pattern.values()) == 4
    loaded = PeftModel.from_pretrained(fresh_base(folder), tmp_path / "adapter")
    trained = logits(trainer.model)
    assert not torch.equal(trained, logits(fresh_base(folder)))
    torch.testing.assert_close(logits(loaded), trained)


def test_evaluation_reads_what_was_saved_around_a_bf16_base(folder, tmp_path):
    train(prepare(folder, ADAPTER, dtype="bfloat16", output_dir=str(tmp_path)))
    loaded = _attach(fresh_base(folder, "bfloat16"), tmp_path / "adapter")
    for name, value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(loaded.get_parameter(name.removeprefix("base_model.model.") + ".default"), value), name


@pytest.mark.parametrize("accumulation", [1, 3])
def test_orthogonality_is_in_the_loss_once_a_step(folder, tmp_path, accumulation):
    """Its gradient too: with one weight the steps are those of plain task loss, with another they are not."""
    logs = {}
    for weight in (0.0, 0.5):
        settings = {"output_dir": str(tmp_path / str(weight)), "gradient_accumulation_steps": accumulation}
        trainer = train(prepare(folder, {**ADAPTER, "orth_reg_weight": weight}, max_steps=4, **settings))
        logs[weight] = [row for row in trainer.state.log_history if "loss/task" in row]
    assert all(row["loss/total"] == pytest.approx(row["loss/task"], rel=1e-6) for row in logs[0.0])
    # N(0, 0.02) is nearly nothing beside the identity of rank 4, whose norm is 2.
    assert logs[0.5][0]["loss/total"] - logs[0.5][0]["loss/task"] == pytest.approx(0.5 * 2, rel=0.05)
    assert logs[0.5][0]["loss"] == pytest.approx(logs[0.5][0]["loss/total"], rel=1e-4)
    assert logs[0.5][0]["grad_norm"] > 1.01 * logs[0.0][0]["grad_norm"]


def test_orthogonality_is_pefts(folder, tmp_path):
    model = train(prepare(folder, ADAPTER, output_dir=str(tmp_path), max_steps=4)).model.base_model
    ids = torch.arange(3, 40)[None]
    plain = torch.nn.functional.cross_entropy(model.model(input_ids=ids).logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss - plain, orthogonality_loss(model))


@pytest.mark.parametrize("at", [2, 5])  # while ranks move, and after the last of them
def test_resume_is_exact(folder, tmp_path, at):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == at

    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole = train(prepare(folder, ADAPTER, output_dir=str(tmp_path / "whole"), **settings))
    train(prepare(folder, ADAPTER, output_dir=str(tmp_path / "parts"), **settings), Stop())
    checkpoint = tmp_path / "parts" / f"checkpoint-{at}"
    # A checkpoint is an adapter of its own, with all of its ranks.
    PeftModel.from_pretrained(fresh_base(folder), checkpoint)
    resumed = train(prepare(folder, ADAPTER, output_dir=str(tmp_path / "parts"), resume=str(checkpoint), **settings))
    for (name, expected), value in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        one, other = ((tmp_path / part / "adapter" / name).read_bytes() for part in ("whole", "parts"))
        assert one == other
    with pytest.raises(RecipeError, match=r"^--resume: AdaLoRA's ranks follow a schedule of 7 steps, this run has 9$"):
        train(
            prepare(
                folder,
                ADAPTER,
                output_dir=str(tmp_path / "parts"),
                resume=str(checkpoint),
                **settings | {"max_steps": 9},
            )
        )
