"""EVA and LoRA-GA trained from a recipe on CPU: the pass over data, what is saved, exact resume, refusals."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from fvae_dist.comparison.measured import measured_in
from fvae_dist.training.recipe import RecipeError
from tests.methods import fresh_base, logits, one_process, prepare, train, write_base

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
EVA = {**LORA, "init_lora_weights": "eva"}
LORA_GA = {**LORA, "init_lora_weights": "lora_ga"}
KINDS = pytest.mark.parametrize("adapter", [EVA, LORA_GA], ids=["eva", "lora_ga"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("from_data")
    write_base(folder)
    return folder


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    one_process(monkeypatch)


class AtStart(TrainerCallback):
    """The adapter's tensors and the logits before the first step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.logits = logits(model)
        model.train()


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def started(folder, out, adapter, **training):
    start = AtStart()
    trainer = train(prepare(folder, adapter, output_dir=str(out), **training), start)
    return start, trainer


def inputs_of_layers(folder):
    """What q and v of each layer read at the labelled positions of the training records."""
    model, found = fresh_base(folder).eval(), {}
    data = prepare(folder, LORA, out="unused").data.train
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(
            lambda _, x, __, index=index: found.setdefault(index, []).append(x[0])
        )
    for row in data:
        model(input_ids=torch.tensor([row["input_ids"]]))
    labelled = torch.cat([torch.tensor(row["labels"]) != -100 for row in data])
    return {index: torch.cat([x[0] for x in rows])[labelled].detach() for index, rows in found.items()}


def test_eva_starts_from_the_principal_directions_of_the_inputs(folder, tmp_path):
    start, _ = started(folder, tmp_path, {**EVA, "eva_config": {"rho": 1.0}})
    inputs = inputs_of_layers(folder)
    for name, value in start.tensors.items():
        if ".lora_B." in name:
            assert not value.any()
            continue
        assert value.dtype == torch.float32 and value.shape[0] == 4
        x = inputs[int(name.split(".layers.")[1].split(".")[0])]
        directions = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:4]
        overlap = torch.linalg.svdvals(value @ directions.T)  # of two orthonormal bases: cosines of their angles
        assert overlap.min() > 0.98, name
    torch.testing.assert_close(start.logits, logits(fresh_base(folder)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eva_moves_ranks_between_layers_and_keeps_their_number(folder, tmp_path, dtype):
    adapter = {**EVA, "target_modules": ["q_proj", "o_proj", "down_proj"], "eva_config": {"rho": 2.0}}
    start, trainer = started(folder, tmp_path, adapter, dtype=dtype)
    directions = [value for name, value in start.tensors.items() if ".lora_A." in name]
    ranks = [len(value) for value in directions]
    assert sum(ranks) == 24 and max(ranks) > 4
    for value in directions:  # not rounded to the base's dtype where a layer was made anew
        torch.testing.assert_close(value @ value.T, torch.eye(len(value)), rtol=0, atol=1e-5)
    loaded = PeftModel.from_pretrained(fresh_base(folder, dtype), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(trainer.model))


def test_lora_ga_starts_from_the_gradient_and_changes_nothing(folder, tmp_path):
    start, _ = started(folder, tmp_path, LORA_GA, per_device_train_batch_size=1)
    torch.testing.assert_close(start.logits, logits(fresh_base(folder)))
    model = fresh_base(folder)
    for row in prepare(folder, LORA, out="unused").data.train:
        model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    a, b = (start.tensors[f"{prefix}.lora_{part}.default.weight"] for part in "AB")
    assert torch.linalg.svdvals(a @ vh[:4].T).min() > 0.98
    b = b / b.norm(dim=0)
    assert torch.linalg.svdvals(b.T @ u[:, 4:8]).min() > 0.9


def test_lora_ga_is_saved_as_plain_lora_of_the_base_as_it_was(folder, tmp_path):
    start, trainer = started(folder, tmp_path, LORA_GA)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 8, 16)
    loaded = PeftModel.from_pretrained(fresh_base(folder), tmp_path / "adapter")
    assert not torch.allclose(logits(trainer.model), start.logits, atol=1e-3)
    torch.testing.assert_close(logits(loaded), logits(trainer.model))


@pytest.mark.parametrize(("adapter", "share"), [(EVA, 1), (LORA_GA, 2)], ids=["eva", "lora_ga"])
def test_parameters_are_counted_as_they_are_saved(folder, tmp_path, adapter, share):
    """EVA moves ranks to layers of another size; LoRA-GA is twice its rank where it is used."""
    prepared = prepare(folder, adapter, output_dir=str(tmp_path))
    trainer = train(prepared)
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    counts = measured_in(prepared.recipe.model_dump(), tmp_path)
    assert (counts["trainable_parameters"], counts["inference_parameters"]) == (trained, share * trained)


@KINDS
def test_the_pass_is_decided_by_the_seed(folder, tmp_path, adapter):
    one, same, other = (
        started(folder, tmp_path / n, adapter, seed=s)[0].tensors for n, s in (("a", 1), ("b", 1), ("c", 2))
    )
    assert set(one) == set(same) and all(torch.equal(value, same[name]) for name, value in one.items())
    assert any(name not in other or not torch.equal(value, other[name]) for name, value in one.items())


@KINDS
def test_resume_is_exact_and_makes_no_pass(folder, tmp_path, adapter, monkeypatch):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = train(prepare(folder, adapter, output_dir=str(tmp_path / "whole"), **settings))
    parts = {**settings, "output_dir": str(tmp_path / "parts")}
    train(prepare(folder, adapter, **parts), StopAt(2))
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    PeftModel.from_pretrained(fresh_base(folder), checkpoint)
    for name in ("get_eva_state_dict", "attach_by_gradient"):
        monkeypatch.setattr(f"fvae_dist.training.from_data.{name}", lambda *a, **k: pytest.fail("a pass was made"))
    resumed = train(prepare(folder, adapter, resume=str(checkpoint), **parts))
    weights = resumed.model.state_dict()
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(weights[name], expected), name
    one, other = (load_file(tmp_path / part / "adapter" / "adapter_model.safetensors") for part in ("whole", "parts"))
    assert set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())
    with pytest.raises(RecipeError, match=r"checkpoint-2: its adapter is not this recipe's: "):
        train(prepare(folder, {**adapter, "r": 2}, resume=str(checkpoint), **parts))


@pytest.mark.parametrize(
    ("adapter", "training", "message"),
    [
        (EVA, {"deepspeed": "ds_configs/zero3.json"}, "eva needs whole weights before training, and ZeRO-3 has none"),
        (LORA_GA, {"deepspeed": "ds_configs/zero3.json"}, "lora_ga needs whole weights before training"),
        ({**LORA, "init_lora_weights": "corda"}, {}, "corda needs a pass over data .*: it would be plain LoRA"),
        ({**LORA_GA, "use_dora": True}, {}, "lora_ga: changes the base weights"),
        ({**EVA, "eva_config": {"rhoo": 1.0}}, {}, r"^adapter.eva_config.rhoo: unknown key; did you mean rho\?"),
        ({**EVA, "eva_config": {"rho": "1"}}, {}, r"^adapter.eva_config.rho: must be float, got '1'"),
        ({**EVA, "eva_config": {"rho": 0.5}}, {}, "^adapter"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_loaded(folder, tmp_path, adapter, training, message):
    with pytest.raises(RecipeError, match=message) as caught:
        prepare(folder, adapter, output_dir=str(tmp_path), **training)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "message"), [({**EVA, "r": 20}, "eva: "), ({**LORA_GA, "r": 12}, "^adapter.r: 12 is too")]
)
def test_too_large_a_rank_is_told(folder, tmp_path, adapter, message):
    with pytest.raises(RecipeError, match=message):
        train(prepare(folder, adapter, output_dir=str(tmp_path)))
