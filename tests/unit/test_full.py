"""Full fine-tuning from a recipe on CPU: what is trained and in which dtype, what is saved, exact resume, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.saving import SaveError
from tests.methods import fresh_base, logits, one_process, prepare, train, write_base

FULL = {"peft_type": "FULL"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    write_base(folder)
    return folder


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    one_process(monkeypatch)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_every_weight_is_trained_and_the_saved_model_loads_alone(folder, tmp_path):
    trainer = train(prepare(folder, FULL, output_dir=str(tmp_path), learning_rate=1e-3))
    before = fresh_base(folder).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32 and not torch.equal(value, before[name]), name
    assert torch.equal(logits(loaded), logits(trainer.model))
    assert not (tmp_path / "adapter").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token == "<pad>"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "library_name: transformers" in card and "fine-tuned in full" in card
    losses = [row["loss/task"] for row in trainer.state.log_history if "loss/task" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 4


def test_bf16_is_the_dtype_of_products_and_not_of_weights(folder, tmp_path):
    seen = []

    class Products(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *call: seen.append(call[2].dtype))

    trainer = train(prepare(folder, FULL, dtype="bfloat16", output_dir=str(tmp_path), max_steps=1), Products())
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    moments = trainer.optimizer.optimizer.state.values()
    assert {state["exp_avg"].dtype for state in moments} == {torch.float32}


def test_resume_is_exact(folder, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = train(prepare(folder, FULL, output_dir=str(tmp_path / "whole"), **settings))
    parts = {**settings, "output_dir": str(tmp_path / "parts")}
    train(prepare(folder, FULL, **parts), StopAt(2))
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    AutoModelForCausalLM.from_pretrained(checkpoint)
    resumed = train(prepare(folder, FULL, resume="auto", **parts))
    assert resumed.state.global_step == 4
    weights = resumed.model.state_dict()
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(weights[name], expected), name
    one, other = (load_file(tmp_path / part / "model" / "model.safetensors") for part in ("whole", "parts"))
    assert set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())
    with pytest.raises(RecipeError, match=r"checkpoint-2: holds no adapter_model.safetensors: of a run with another"):
        train(prepare(folder, {"peft_type": "LORA", "r": 4}, resume=str(checkpoint), **parts))


@pytest.mark.parametrize(
    ("adapter", "training", "message"),
    [
        ({**FULL, "r": 4}, {}, "^adapter.r: goes not with peft_type FULL"),
        (FULL, {"deepspeed": "ds_configs/zero2.json"}, r"^adapter.peft_type: FULL needs zero_optimization.stage 3"),
        (FULL, {"resident_weights": True}, "^training.resident_weights: true is about frozen weights"),
        (FULL, {"dtype": "float16"}, "^model.dtype: float16 underflows in full fine-tuning"),
    ],
)
def test_what_cannot_be_done_is_refused(folder, tmp_path, adapter, training, message):
    with pytest.raises(RecipeError, match=message):
        prepare(folder, adapter, output_dir=str(tmp_path), **training)


def test_weights_that_are_not_finite_are_not_saved(folder, tmp_path):
    class Spoil(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            model.lm_head.weight.data[0, 0] = torch.inf

    with pytest.raises(SaveError, match=r"lm_head\.weight is not finite"):
        train(prepare(folder, FULL, output_dir=str(tmp_path)), Spoil())
    assert not (tmp_path / "model" / "model.safetensors").exists()
