"""save_pretrained(..., inference_only=True): encoder 1 and B alone."""

import inspect
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fvae_dist import FVAELoraConfig, FVAETrainerMixin, side_loss
from fvae_dist.adapter import FVAELinear
from fvae_dist.adapter.peft_extensions import extend_peft_model
from tests.adapted import IDS, add_trained, fvae_layers, logits, outputs_of, trainable_names, trained
from tests.models import ARCHITECTURES, tiny_adapter, tiny_model

FILE = "adapter_model.safetensors"
REASON = "neither encoder 2 nor a decoder, so it cannot be trained"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pruned adapter of the Llama model."""
    path = tmp_path_factory.mktemp("pruned")
    trained().save_pretrained(path, inference_only=True)
    return path


def load(name, path, **settings) -> PeftModel:
    """Load an adapter; no warning is allowed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return PeftModel.from_pretrained(tiny_model(name), path, **settings)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("settings", [{}, {"encoder_shared_trunk": False}, {"encoder_layers": 0}], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pruned_adapter_gives_identical_outputs(name, settings, low_cpu_mem_usage, tmp_path):
    model = trained(name, **settings)
    model.save_pretrained(tmp_path, inference_only=True)
    saved = load_file(tmp_path / FILE)
    own = {key.replace(".default", ""): p for key, p in model.named_parameters() if ".fvae_" in key}
    assert saved.keys() == {key for key in own if ".encoder1." in key or ".fvae_lora_B." in key}
    assert any(".encoder1.logvar." in key for key in saved)
    assert all(torch.equal(value, own[key]) for key, value in saved.items())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_only"] is True
    loaded = load(name, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(module.training for module in loaded.modules()) and trainable_names(loaded) == set()
    assert torch.equal(logits(loaded), logits(model))
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def test_llama_3_8b_shrinks_from_47_to_7_million():
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    counts = []
    for inference_only in (False, True):
        with torch.device("meta"):
            base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, vocab_size=128256, **sizes))
            model = get_peft_model(base, FVAELoraConfig(inference_only=inference_only, inference_mode=inference_only))
        counts.append(sum(p.numel() for name, p in model.named_parameters() if ".fvae_" in name))
    assert [round(count / 1e6, 1) for count in counts] == [47.5, 6.9]


def test_saving_changes_nothing_about_the_model(tmp_path):
    model = trained()
    config, expected = model.peft_config["default"], logits(model)
    before = vars(config).copy()
    model.save_pretrained(tmp_path / "pruned", inference_only=True)
    assert model.peft_config["default"] is config and vars(config) == before and not config.inference_only
    with pytest.raises(ValueError, match="should be a directory"):
        model.save_pretrained(tmp_path / "pruned" / FILE, inference_only=True)
    assert model.peft_config["default"] is config and model.base_model.peft_config is model.base_model.model.peft_config
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits(load("llama", tmp_path / "full", is_trainable=True)), expected)
    assert len(load_file(tmp_path / "full" / FILE)) > 2 * len(load_file(tmp_path / "pruned" / FILE))


def test_given_state_dict_is_what_is_saved(tmp_path):
    """As under ZeRO-3, where the model's own parameters are empty."""
    model = trained()
    expected, whole = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path, state_dict=whole, inference_only=True)
    assert torch.equal(logits(load("llama", tmp_path)), expected)


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_selected_adapters(tmp_path, safe_serialization):
    model = add_trained(add_trained(trained(), "one", r=2), "two", seed=3)
    expected = outputs_of(model, ["default", "one", "two"])
    model.save_pretrained(tmp_path, safe_serialization, ["one", "two"], inference_only=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["one", "two"]
    for name in ("one", "two"):
        loaded = load("llama", tmp_path / name)
        assert loaded.peft_config["default"].inference_only and torch.equal(logits(loaded), expected[name])
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["three"], inference_only=True)
    model.save_pretrained(tmp_path / "all", inference_only=True)
    assert {path.parent.name for path in (tmp_path / "all").rglob("adapter_config.json")} == {"all", "one", "two"}


@pytest.mark.parametrize("adapter_name", ["encoder2", "decoder", "fvae_vae"])
def test_adapter_name_is_not_taken_for_a_part_of_the_vae(adapter_name, tmp_path):
    model = trained(adapter_name=adapter_name)
    model.save_pretrained(tmp_path, inference_only=True)
    assert torch.equal(logits(load("llama", tmp_path / adapter_name)), logits(model))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_modules_to_save_go_along_and_stay_frozen(tmp_path):
    model = trained("gpt2", modules_to_save=["lm_head"], model_settings={"tie_word_embeddings": False})
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path, inference_only=True)
    loaded = PeftModel.from_pretrained(tiny_model("gpt2", tie_word_embeddings=False), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    loaded.set_adapter("default")
    assert trainable_names(loaded) == set()
    with loaded.disable_adapter():
        assert trainable_names(loaded) == set()
    assert trainable_names(loaded) == set()


def test_pruned_adapter_stays_pruned_when_saved_again(folder, tmp_path):
    model = load("llama", folder)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / FILE).keys() == load_file(folder / FILE).keys()
    assert torch.equal(logits(load("llama", tmp_path)), logits(model))


def test_pruned_beside_full_adapter(folder):
    model = trained(r=3)
    full = logits(model)
    trainable = trainable_names(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = model.load_adapter(folder, "pruned")
    assert result.missing_keys == []
    assert torch.equal(logits(model), full) and trainable_names(model) == trainable
    model.set_adapter("pruned")
    assert torch.equal(logits(model), logits(load("llama", folder))) and trainable_names(model) == set()
    with model.disable_adapter():
        pass
    assert trainable_names(model) == set()
    with pytest.raises(ValueError, match=REASON):
        model.set_requires_grad("pruned")
    model.set_requires_grad("pruned", False)
    model.base_model.set_adapter(["default", "pruned"])
    assert trainable_names(model) == trainable
    model.set_adapter("default")
    assert trainable_names(model) == trainable
    with side_loss.collect(model.train()) as collected:
        model(IDS)
    assert len(collected.layer_names) == len(fvae_layers(model))


def test_deleting_the_pruned_adapter_leaves_no_trace(folder):
    model = trained(r=3)
    expected = logits(model)
    model.load_adapter(folder, "pruned")
    model.set_adapter("pruned")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("pruned")
    model.add_adapter("pruned", tiny_adapter())
    model.set_adapter("pruned")
    assert {name.split(".fvae_")[1].split(".")[1] for name in trainable_names(model)} == {"pruned"}
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


def test_layer_by_itself_keeps_its_pruned_adapter_frozen():
    """Where no tuner watches, as in transformers' own use of PEFT layers."""

    def training():
        return {name.split(".")[1] for name in trainable_names(layer) if name.startswith("fvae_")}

    layer = FVAELinear(nn.Linear(6, 5), "full", tiny_adapter())
    layer.update_layer("pruned", tiny_adapter(inference_only=True))
    layer.set_adapter(["full", "pruned"])
    assert training() == {"full"}
    layer.set_requires_grad("pruned", True)
    assert training() == {"full"}
    layer.rename_adapter("pruned", "new")
    layer.set_adapter(["new"])
    assert training() == set()
    layer.update_layer("new", tiny_adapter())
    assert training() == {"new"}


REFUSALS = {
    "from_pretrained": lambda model, path: PeftModel.from_pretrained(model, path, is_trainable=True),
    "get_peft_model": lambda model, path: get_peft_model(model, tiny_adapter(inference_only=True)),
}


@pytest.mark.parametrize("how", REFUSALS)
def test_training_a_pruned_adapter_is_refused(how, folder):
    base = tiny_model("llama")
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=REASON):
        REFUSALS[how](base, folder)
    assert [name for name, _ in base.named_modules()] == modules


def test_adding_a_pruned_adapter_to_train_is_refused(folder):
    model = trained()
    for add in (
        lambda: model.add_adapter("other", tiny_adapter(inference_only=True)),
        lambda: model.load_adapter(folder, "other", is_trainable=True),
    ):
        with pytest.raises(ValueError, match=REASON):
            add()
        assert list(model.peft_config) == ["default"]
        assert not any("other" in layer.fvae_vae for layer in fvae_layers(model).values())


def test_forward_in_training_mode_is_refused(folder):
    model = load("llama", folder).train()
    with pytest.raises(
        ValueError, match="inference_only=True: encoder 2 and decoder are missing, so it cannot be trained"
    ):
        model(IDS)
    model.eval()(IDS)


def test_trainer_refuses_a_pruned_adapter(folder, tmp_path):
    class Mixed(FVAETrainerMixin, Trainer):
        pass

    data = [{"input_ids": ids, "labels": ids} for ids in IDS]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    with pytest.raises(ValueError, match="cannot be trained"):
        Mixed(model=load("llama", folder), args=arguments, train_dataset=data).train()


def test_other_methods_are_refused_and_otherwise_left_alone(tmp_path):
    model = get_peft_model(tiny_model("llama"), LoraConfig())
    with pytest.raises(ValueError, match=r"inference_only=True is for FVAE_LORA adapters; 'default' is a LORA adapter"):
        model.save_pretrained(tmp_path / "no", inference_only=True)
    assert not (tmp_path / "no").exists()
    for name, settings in {"plain": {}, "false": {"inference_only": False}}.items():
        model.save_pretrained(tmp_path / name, **settings)
        assert torch.equal(logits(load("llama", tmp_path / name)), logits(model))
        assert "inference_only" not in json.loads((tmp_path / name / "adapter_config.json").read_text())


def test_peft_is_extended_once():
    before = PeftModel.save_pretrained, PeftModel.rename_adapter
    extend_peft_model()
    assert (PeftModel.save_pretrained, PeftModel.rename_adapter) == before
    assert (
        PeftModel.save_pretrained.__name__ == "save_pretrained" and "adapter model" in PeftModel.save_pretrained.__doc__
    )
    *_, last, rest = inspect.signature(PeftModel.save_pretrained).parameters.values()
    assert (last.name, last.default, rest.kind) == ("inference_only", False, rest.VAR_KEYWORD)
