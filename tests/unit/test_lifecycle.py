"""Adding, deleting and renaming adapters."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fvae_dist import side_loss
from tests.adapted import IDS, add_trained, fvae_layers, logits, outputs_of, trainable_names, trained
from tests.models import tiny_adapter, tiny_model

TWO = ["llama", "gpt2"]
UNTIED = {"tie_word_embeddings": False}
HEAD = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
DELETED = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")


def adapters_that_train(model) -> set[str]:
    return {name.split(".fvae_")[1].split(".")[1] for name in trainable_names(model) if ".fvae_" in name}


def assert_active(model, *names):
    """PeftModel, tuner and layers agree on what is active."""
    assert model.active_adapters == list(names) and model.active_adapter == names[0]
    assert model.get_model_status().active_adapters == list(names)


# ----------------------------------------------------------------------------------------------------- adding, deleting


@DELETED
@pytest.mark.parametrize("name", TWO)
def test_adapters_come_and_go(name, tmp_path):
    base = logits(tiny_model(name))
    trained(name, r=3).save_pretrained(tmp_path)
    model = add_trained(trained(name), "added", encoder_layers=2)
    model.load_adapter(tmp_path, "loaded")
    expected = outputs_of(model, ["default", "added", "loaded"])
    assert len({float(value.sum()) for value in expected.values()}) == 3

    model.delete_adapter("added")  # inactive
    assert_active(model, "default")
    assert adapters_that_train(model) == {"default"} and torch.equal(logits(model), expected["default"])
    model.delete_adapter("default")  # active
    assert_active(model, "loaded")
    assert torch.equal(logits(model), expected["loaded"])
    assert list(model.peft_config) == ["loaded"] and not [n for n, _ in model.named_parameters() if ".default." in n]
    add_trained(model, "added", encoder_layers=2)  # the name is free again
    assert torch.equal(logits(model), expected["loaded"])
    assert torch.equal(outputs_of(model, ["added"])["added"], expected["added"])
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    for unknown in (lambda: model.delete_adapter("default"), lambda: model.set_adapter("default")):
        with pytest.raises(ValueError, match="default"):
            unknown()
    with pytest.raises(ValueError, match="'added' already exists"):
        model.add_adapter("added", tiny_adapter())


@DELETED
def test_layers_agree_on_the_adapter_after_a_deleted_one():
    """Left to themselves the layers of q would choose `second`, those of k `third`."""
    model = trained(target_modules=["q_proj", "k_proj"], adapter_name="first")
    add_trained(model, "third", target_modules=["k_proj"])
    add_trained(model, "second", target_modules=["q_proj"])
    expected = outputs_of(model, ["first", "second", "third"])
    model.delete_adapter("first")
    assert_active(model, "second")
    assert torch.equal(logits(model), expected["second"]) and adapters_that_train(model) == {"second"}
    model.set_adapter("third")
    assert torch.equal(logits(model), expected["third"])


@DELETED
def test_first_layer_without_an_adapter_left_does_not_decide():
    model = trained(target_modules=["q_proj"], adapter_name="first")
    add_trained(model, "second", target_modules=["v_proj"])
    expected = outputs_of(model, ["first", "second"])
    model.delete_adapter("first")
    assert_active(model, "second")
    assert torch.equal(logits(model), expected["second"])


def test_other_active_adapters_stay_active():
    model = add_trained(add_trained(trained(), "second"), "third", seed=3)
    model.base_model.set_adapter(["default", "third"])
    both = logits(model)
    model.delete_adapter("second")
    assert torch.equal(logits(model), both) and adapters_that_train(model) == {"default", "third"}
    model.delete_adapter("default")
    assert_active(model, "third")


def test_deleting_an_inactive_adapter_lets_nothing_train():
    model = add_trained(trained(), "other")
    model.set_adapter("default", inference_mode=True)
    model.delete_adapter("other")
    assert trainable_names(model) == set()


@HEAD
@DELETED
@pytest.mark.parametrize("others_head", [True, False])
def test_deleting_an_adapter_with_modules_to_save(others_head):
    model = trained("gpt2", modules_to_save=["lm_head"], model_settings=UNTIED)
    add_trained(model, "other", modules_to_save=["lm_head"] if others_head else None)
    with torch.no_grad():
        for factor, head in enumerate(model.get_base_model().lm_head.modules_to_save.values(), start=2):
            head.weight.mul_(factor)
    expected = outputs_of(model, ["default", "other"])
    model.delete_adapter("default")
    assert_active_but_for_heads(model, "other")
    assert torch.equal(logits(model), expected["other"])
    assert any("lm_head" in name for name in trainable_names(model)) == others_head


def assert_active_but_for_heads(model, name):
    assert model.active_adapter == name and model.active_adapters == [name]
    assert all(layer.active_adapters == [name] for layer in fvae_layers(model).values())


# ------------------------------------------------------------------------------------------------------------- renaming


@HEAD
@pytest.mark.parametrize("renamed", ["default", "other"])
@pytest.mark.parametrize("name", TWO)
def test_rename(name, renamed, tmp_path):
    model = trained(name, modules_to_save=["lm_head"], model_settings=UNTIED, encoder_layers=0)
    add_trained(model, "other", modules_to_save=["lm_head"], encoder_layers=0, r=2)
    with torch.no_grad():
        for factor, head in enumerate(model.get_base_model().lm_head.modules_to_save.values(), start=2):
            head.weight.mul_(factor)
    expected = outputs_of(model, ["default", "other"])
    parameters = dict(model.named_parameters())
    trainable = trainable_names(model)
    new = {"default": "default", "other": "other", renamed: "new name"}

    model.rename_adapter(renamed, "new name")
    assert list(model.peft_config) == list(new.values()) and model.base_model.model.peft_config is model.peft_config
    assert_active(model, new["default"])
    assert torch.equal(logits(model), expected["default"])
    for old_key, (key, parameter) in zip(parameters, model.named_parameters(), strict=True):
        assert key == old_key.replace(f".{renamed}.", ".new name.") and parameter is parameters[old_key]
        assert parameter.requires_grad == (old_key in trainable)
    for old in ("default", "other"):
        model.set_adapter(new[old])
        assert torch.equal(logits(model), expected[old]) and adapters_that_train(model) == {new[old]}
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model), expected[old])
    model.save_pretrained(tmp_path, selected_adapters=["new name"])
    loaded = PeftModel.from_pretrained(tiny_model(name, **UNTIED), tmp_path / "new name")
    assert torch.equal(logits(loaded), expected[renamed])
    mixed = logits(model, IDS, adapter_names=[new["other"], new["default"]])
    torch.testing.assert_close(mixed, torch.stack([expected["other"][0], expected["default"][1]]))
    add_trained(model, renamed, seed=4)
    model.set_adapter("new name")
    assert torch.equal(logits(model), expected[renamed])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.delete_adapter("new name")
    assert not [key for key in model.state_dict() if ".new name." in key]


def test_rename_there_and_back_is_as_before():
    model = add_trained(trained(), "other")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.rename_adapter("default", "mine")
    model.rename_adapter("mine", "default")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert_active(model, "default")


def test_an_adapter_by_itself_may_have_the_name_of_a_part():
    model = trained(adapter_name="decoder")
    expected = logits(model)
    for name in ("new", "encoder1"):
        model.rename_adapter(model.active_adapter, name)
        assert torch.equal(logits(model), expected)


def test_rename_while_merged_and_while_several_are_active():
    model = add_trained(trained(encoder_layers=0), "other", encoder_layers=0)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    model.merge_adapter()
    model.rename_adapter("other", "new")
    assert model.get_model_status().merged_adapters == ["default", "new"]
    assert model.base_model.active_adapters == ["default", "new"]
    torch.testing.assert_close(logits(model), expected)
    with pytest.raises(ValueError, match=r"\['new'\] while they are merged"):
        model.delete_adapter("new")
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def test_rename_where_some_layers_lack_the_adapter():
    model = add_trained(trained(target_modules=["q_proj"]), "other", target_modules=["k_proj"])
    expected = outputs_of(model, ["default", "other"])
    model.rename_adapter("default", "new")
    assert_active(model, "new")
    assert torch.equal(logits(model), expected["default"])
    assert torch.equal(outputs_of(model, ["other"])["other"], expected["other"])


def test_renamed_pruned_adapter_still_does_not_train(tmp_path):
    trained().save_pretrained(tmp_path, inference_only=True)
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    model.rename_adapter("default", "pruned")
    model.set_adapter("pruned")
    assert trainable_names(model) == set()


def test_renamed_adapter_trains():
    model = trained(encoder_dropout=0.0, decoder_dropout=0.0)
    model.rename_adapter("default", "new")
    with side_loss.collect(model.train()) as collected:
        loss = model(IDS, labels=IDS).loss
    (loss + collected.neg_elbo).backward()
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("typo", "new", "'typo' does not exist; there are 'default', 'other'"),
        ("default", "other", "'other' already exists"),
        ("default", "default", "'default' already exists"),
        ("default", "a.b", "'a.b' cannot be the name of an adapter: module name can't contain"),
        ("default", "", "'' cannot be the name of an adapter"),
        ("default", "keys", "'keys' cannot be the name of an adapter"),
        ("default", 1, "1 cannot be the name of an adapter"),
        ("default", "weight", "adapter name 'weight' is part of a parameter's name"),
        ("other", "encoder1", "adapter name 'encoder1' is part of a parameter's name"),
        ("default", "__base__", "adapter name '__base__' means no adapter"),
    ],
    ids=str,
)
def test_bad_rename_is_refused_and_changes_nothing(old, new, message):
    model = add_trained(trained(), "other")
    keys, expected = list(model.state_dict()), logits(model)
    with pytest.raises(ValueError, match=message):
        model.rename_adapter(old, new)
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["default", "other"]
    assert_active(model, "default")
    assert torch.equal(logits(model), expected)


def test_name_of_no_adapter_is_refused():
    with pytest.raises(ValueError, match="'__base__' means no adapter"):
        trained(adapter_name="__base__")
    model = trained()
    with pytest.raises(ValueError, match="'__base__' means no adapter"):
        model.add_adapter("__base__", tiny_adapter())


def test_only_adapters_of_this_method_can_be_renamed():
    model = get_peft_model(tiny_model("llama"), LoraConfig())
    with pytest.raises(ValueError, match="adapters of type LORA cannot be renamed"):
        model.rename_adapter("default", "new")
