"""Model, tokenizer and adapter: what is refused before a weight is loaded, and what is counted."""

import json

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaForCausalLM

from fvae_dist import FVAELoraConfig
from fvae_dist.training.modeling import (
    attach_adapter,
    build_peft_config,
    check_lengths,
    load_base_model,
    load_config,
    load_tokenizer,
    plan_model,
)
from fvae_dist.training.recipe import ModelSection, RecipeError
from tests.recipes import make_model_folder, make_recipe

PEFT_TYPES = sorted(str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


def plan(folder, **sections):
    recipe = make_recipe(folder, folder, **sections)
    return plan_model(recipe, load_config(recipe.model))


# ----------------------------------------------------------------------------------------------------- model folders


def refusal_of_folder(path) -> str:
    with pytest.raises(RecipeError) as caught:
        plan(path)
    message = str(caught.value)
    assert message.startswith("model.name_or_path: ")
    assert "\n" not in message
    return message


def test_missing_folder_is_named(tmp_path):
    assert "there is no folder" in refusal_of_folder(tmp_path / "nowhere")


def test_folder_without_config_is_named(tmp_path):
    assert "holds no config.json" in refusal_of_folder(tmp_path)
    (tmp_path / "file").touch()
    assert "holds no config.json" in refusal_of_folder(tmp_path / "file")


@pytest.mark.parametrize(
    "contents",
    [
        *("", "{", "[]", "5", "null", "{}"),
        '{"model_type": "nothing"}',
        '{"model_type": 5}',
        '{"model_type": "llama", "hidden_size": "x"}',
        '{"model_type": "llama", "hidden_size": -8}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "t5"}',
    ],
)
def test_config_that_makes_no_causal_model_is_one_line(tmp_path, contents):
    (tmp_path / "config.json").write_text(contents)
    refusal_of_folder(tmp_path)


def test_config_that_is_no_text_is_one_line(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\x00")
    refusal_of_folder(tmp_path)


def test_hub_id_offline_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=r"^model\.name_or_path: cannot load nobody/nothing: [^\n]*$"):
        load_config(ModelSection(name_or_path="nobody/nothing"))


# --------------------------------------------------------------------------------------------- tokenizer and lengths


def test_tokenizer_gets_a_padding_token(folder, tmp_path):
    make_model_folder(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(ModelSection(name_or_path=str(tmp_path))).pad_token == "</s>"
    assert load_tokenizer(ModelSection(name_or_path=str(folder))).pad_token == "<pad>"


@pytest.mark.parametrize("contents", ["", "{", "[]", '{"version": "1.0"}'])
def test_broken_tokenizer_names_its_key(folder, tmp_path, contents):
    make_model_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(contents)
    with pytest.raises(RecipeError, match=r"^model\.tokenizer: cannot load a tokenizer from [^\n]*$"):
        load_tokenizer(ModelSection(name_or_path=str(folder), tokenizer=str(tmp_path)))


def test_lengths_must_fit_the_model(folder, tmp_path):
    recipe = make_recipe(folder, folder, data={"max_length": 512})
    config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
    check_lengths(recipe, config, tokenizer)
    recipe.data.max_length = 513
    with pytest.raises(RecipeError, match=r"^data\.max_length: 513 is longer than the 512 positions"):
        check_lengths(recipe, config, tokenizer)
    recipe.data.max_length = 8
    config.vocab_size = len(tokenizer) - 1
    with pytest.raises(RecipeError, match=r"^model\.tokenizer: 259 tokens do not fit the vocabulary of 258"):
        check_lengths(recipe, config, tokenizer)


# ------------------------------------------------------------------------------------------------------------ adapter


def test_adapter_section_defaults_to_fvae_lora():
    config = build_peft_config({"r": 4})
    assert isinstance(config, FVAELoraConfig)
    assert (config.r, config.task_type) == (4, "CAUSAL_LM")


@pytest.mark.parametrize("peft_type", PEFT_TYPES)
def test_unknown_adapter_key_names_the_nearest(peft_type):
    with pytest.raises(RecipeError, match=r"^adapter\.inference_mod: unknown key; did you mean inference_mode\?$"):
        build_peft_config({"peft_type": peft_type, "inference_mod": False})


@pytest.mark.parametrize("peft_type", PEFT_TYPES)
def test_types_of_every_method_can_be_checked(peft_type):
    """The check must hold for whatever PEFT annotates: a wrong type is a RecipeError, never a crash."""
    with pytest.raises(RecipeError, match=r"^adapter\.inference_mode: must be bool, got 'no'$"):
        build_peft_config({"peft_type": peft_type, "inference_mode": "no"})


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"peft_type": "LOAR"}, "adapter.peft_type: unknown type 'LOAR'; did you mean LORA?"),
        ({"peft_type": "lora"}, "adapter.peft_type: unknown type 'lora'; did you mean LORA?"),
        ({"peft_type": None}, "adapter.peft_type: unknown type 'None'"),
        ({"peft_type": ["LORA"]}, "adapter.peft_type: unknown type"),
        ({"peft_type": "LORA", "lora_rank": 8}, "adapter.lora_rank: unknown key"),
        ({"peft_type": "LORA", "r": 0}, "adapter.r: must be an integer > 0, got 0"),
        ({"peft_type": "LORA", "r": -4}, "adapter.r: must be an integer > 0, got -4"),
        ({"peft_type": "LORA", "r": "8"}, "adapter.r: must be an integer > 0, got '8'"),
        ({"peft_type": "LORA", "r": 8.0}, "adapter.r: must be an integer > 0, got 8.0"),
        ({"peft_type": "LORA", "r": True}, "adapter.r: must be an integer > 0, got True"),
        ({"peft_type": "LORA", "r": 10**30}, "adapter.r: must be an integer > 0"),
        ({"peft_type": "LORA", "lora_alpha": "16"}, "adapter.lora_alpha: must be int, got '16'"),
        ({"peft_type": "LORA", "lora_alpha": None}, "adapter.lora_alpha: must be int, got None"),
        ({"peft_type": "LORA", "lora_alpha": float("nan")}, "adapter.lora_alpha: must be int, got nan"),
        ({"peft_type": "LORA", "lora_dropout": float("inf")}, "adapter.lora_dropout: must be finite, got inf"),
        ({"peft_type": "LORA", "modules_to_save": "lm_head"}, "adapter.modules_to_save: must be "),
        ({"peft_type": "LORA", "target_modules": 5}, "adapter.target_modules: must be "),
        ({"peft_type": "LORA", "task_type": "SEQ_CLS"}, "adapter.task_type: must be CAUSAL_LM, got 'SEQ_CLS'"),
        ({"r": 0}, "adapter.r: must be an integer > 0, got 0"),
        ({"encoder_dropout": 2}, "adapter.encoder_dropout must lie in [0, 1), got 2"),
        ({"objective": "offical"}, "adapter.objective must be one of official, "),
        ({"layers_pattern": "layers"}, "adapter.layers_pattern needs layers_to_transform"),
    ],
)
def test_adapter_errors_name_their_key(adapter, message):
    with pytest.raises(RecipeError) as caught:
        build_peft_config(adapter)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "adapter",
    [
        {"peft_type": "LORA", "use_dora": True},
        {"peft_type": "LORA", "lora_alpha": 0.5, "lora_dropout": 0},
        {"peft_type": "LORA", "init_lora_weights": "pissa_niter_2"},
        {"peft_type": "LORA", "layer_replication": [[0, 1], [0, 1]]},
        {"peft_type": "LORA", "rank_pattern": {"q_proj": 2}},
        {"peft_type": "OFT", "r": 0, "oft_block_size": 8},
        {"peft_type": "IA3", "feedforward_modules": []},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "exclude_modules": "lm_head"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
)
def test_what_peft_takes_is_taken(folder, adapter):
    recipe = make_recipe(folder, folder)
    recipe.adapter = {"target_modules": ["q_proj", "v_proj"], **adapter}
    assert plan_model(recipe, load_config(recipe.model)).trainable_parameters > 0


@pytest.mark.parametrize("peft_type", ["FVAE_LORA", "LORA"])
@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_modules": ["nope"]}, "adapter.target_modules: "),
        ({"target_modules": "["}, "adapter: '[' is no regular expression: "),
        ({"exclude_modules": ["q_proj", "v_proj"]}, "adapter: No modules were targeted"),
        ({"layers_to_transform": [99]}, "adapter."),
        ({"modules_to_save": ["nope"]}, "adapter.modules_to_save: 'nope' matches no module"),
        ({"inference_mode": True}, "adapter: nothing would be trained"),
    ],
)
def test_adapter_that_does_not_fit_the_model_is_one_line(folder, peft_type, adapter, message):
    recipe = make_recipe(folder, folder)
    recipe.adapter = {"peft_type": peft_type, "target_modules": ["q_proj", "v_proj"], **adapter}
    with pytest.raises(RecipeError) as caught:
        plan_model(recipe, load_config(recipe.model))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_one_wrong_target_among_right_ones_is_refused(folder):
    with pytest.raises(
        RecipeError, match=r"^adapter\.target_modules: 'nope' matches no module .*could match: .*q_proj"
    ):
        plan(folder, adapter={"target_modules": ["q_proj", "nope"]})


# --------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("tied", [False, True])
def test_plan_counts_what_the_loaded_model_has(tmp_path, tied):
    folder = make_model_folder(tmp_path, tie_word_embeddings=tied)
    recipe = make_recipe(folder, folder)
    config = load_config(recipe.model)
    counted = plan_model(recipe, config)
    base = LlamaForCausalLM(config)
    assert counted.base_parameters == sum(p.numel() for p in base.parameters())  # a tied matrix is one parameter
    assert counted.embedding_parameters == (0 if tied else 320 * 32)
    assert sorted(counted.base_sizes) == sorted(p.numel() for p in base.parameters())
    model = attach_adapter(base, recipe.adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert counted.trainable_parameters == sum(p.numel() for p in trained)
    assert sorted(counted.trainable_sizes) == sorted(p.numel() for p in trained)
    assert len(counted.adapted_layers) == 4
    assert all(name.endswith(("q_proj", "v_proj")) for name in counted.adapted_layers)


def test_inference_needs_encoder_mean_and_b_only(folder):
    r, hidden = 4, 32
    counted = plan(folder, adapter={"target_modules": ["q_proj"], "r": r, "encoder_layers": 0})
    mean_head = hidden * r + r
    assert counted.inference_parameters == 2 * (mean_head + r * hidden)
    assert counted.inference_parameters < counted.trainable_parameters


def test_baselines_train_what_they_infer_with(folder):
    recipe = make_recipe(folder, folder)
    recipe.adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    counted = plan_model(recipe, load_config(recipe.model))
    assert counted.trainable_parameters == counted.inference_parameters == 2 * 2 * (32 + 32)


# ------------------------------------------------------------------------------------------------------------ loading


def test_random_weights_are_the_same_every_time_and_frozen(folder):
    recipe = make_recipe(folder, folder)
    first, second = (load_base_model(recipe, load_config(recipe.model), "sdpa") for _ in range(2))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not a.requires_grad
    recipe.training.seed += 1
    third = load_base_model(recipe, load_config(recipe.model), "sdpa")
    assert not torch.equal(first.lm_head.weight, third.lm_head.weight)


def test_folder_without_weights_is_one_line(folder):
    recipe = make_recipe(folder, folder, model={"random_weights": False})
    with pytest.raises(RecipeError, match=r"^model\.name_or_path: cannot load [^\n]*$"):
        load_base_model(recipe, load_config(recipe.model), "sdpa")


def test_saved_weights_are_loaded_in_the_recipes_dtype(tmp_path):
    folder = make_model_folder(tmp_path)
    recipe = make_recipe(folder, folder)
    model = load_base_model(recipe, load_config(recipe.model), "sdpa")
    model.save_pretrained(folder)
    recipe = make_recipe(folder, folder, model={"random_weights": False, "dtype": "bfloat16"})
    loaded = load_base_model(recipe, load_config(recipe.model), "sdpa")
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert b.dtype == torch.bfloat16, name
        assert torch.equal(a.to(torch.bfloat16), b), name
