import dataclasses
import re
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from fvae_dist import FVAELoraConfig, side_loss
from tests.models import randomise, tiny_model, token_ids

# METHOD.md, "Objective" and "One adapted linear layer".
DEFAULTS = {
    "r": 16,
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "modules_to_save": None,
    "bias": "none",
    "encoder_layers": 1,
    "encoder_hidden": 16,
    "encoder_dropout": 0.1,
    "encoder_shared_trunk": True,
    "initial_logvar": 0.0,
    "decoder_layers": 3,
    "decoder_hidden": 128,
    "decoder_dropout": 0.1,
    "latent_fusion": "concat",
    "z2_prior_mean": 1.5,
    "z2_prior_std": 1.0,
    "objective": "official",
    "task_weight": 1000.0,
    "reconstruction_weight": 1.0,
    "kl_weight": 1.0,
    "z1_weight": 1.0,
    "z2_weight": 1.0,
    "factorization_weight": 0.1,
    "side_loss_reduction": "mean",
    "detach_input": False,
    "kernel": "auto",
}
SIZES = {"r": 0, "encoder_hidden": 0, "decoder_hidden": 0, "encoder_layers": -1, "decoder_layers": -1}
CHOICES = ("latent_fusion", "objective", "side_loss_reduction", "kernel", "bias")
DROPOUTS = ("encoder_dropout", "decoder_dropout")
POSITIVE = ("lora_alpha", "z2_prior_std", "task_weight")
NOT_NEGATIVE = ("reconstruction_weight", "kl_weight", "z1_weight", "z2_weight", "factorization_weight")
NAN, INF = float("nan"), float("inf")
INVALID = [
    *((name, value) for name, below in SIZES.items() for value in (below, 1.5, "2", True, None)),
    *((name, value) for name in CHOICES for value in ("other", None, 1)),
    *(
        (name, value)
        for name in ("encoder_shared_trunk", "detach_input", "inference_only")
        for value in (1, "true", None)
    ),
    *((name, value) for name in DROPOUTS for value in (-0.1, 1, NAN, "0.1", None, True)),
    *((name, value) for name in POSITIVE for value in (0, -1.0, NAN, INF, "1", None, True)),
    *((name, value) for name in NOT_NEGATIVE for value in (-1e-9, NAN, INF, "1", None, True)),
    *(("z2_prior_mean", value) for value in (NAN, INF, "1", None)),
    *(("initial_logvar", value) for value in (-20.5, 21, NAN, INF, "0", None, True)),
]
CHANGED = {
    "r": 3,
    "lora_alpha": 7.5,
    "target_modules": ["q_proj", "o_proj"],
    "exclude_modules": ["k_proj"],
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "modules_to_save": ["lm_head"],
    "encoder_shared_trunk": False,
    "decoder_dropout": 0.25,
    "latent_fusion": "average",
    "kl_weight": 10.0,
    "side_loss_reduction": "sum",
    "kernel": "torch",
    "encoder_layers": 2,
    "initial_logvar": -4.0,
    "detach_input": True,
    "z2_prior_mean": -0.5,
    "z2_prior_std": 0.75,
    "reconstruction_weight": 0.1,
    "z1_weight": 2.0,
    "z2_weight": 3.0,
    "factorization_weight": 0.5,
}
OBJECTIVES = ("official", "paper", "vae2lat", "beta_vae2lat")
NO_FLOOR = "no floor in z1 but for the task and the reconstruction"
# Weights that do not enter an objective, METHOD.md, "Objective".
UNUSED = {
    "official": {"factorization_weight"},
    "paper": {"z1_weight", "z2_weight"},
    "vae2lat": {"reconstruction_weight", "kl_weight", "z1_weight", "z2_weight", "factorization_weight"},
    "beta_vae2lat": {"z1_weight", "z2_weight", "factorization_weight"},
}


def warnings_of(**settings) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FVAELoraConfig(**settings)
    return [str(warning.message) for warning in caught]


def test_defaults_are_those_of_the_published_runs():
    config = FVAELoraConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.peft_type == "FVAE_LORA"


def test_scaling_is_alpha_over_r():
    assert FVAELoraConfig(r=8, lora_alpha=4).scaling == 4 / (8 + 1e-5)


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_invalid_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"^{name} "):
        FVAELoraConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
    ],
)
def test_combination_that_peft_would_ignore_is_refused(settings, name):
    with pytest.raises(ValueError, match=rf"^{name} "):
        FVAELoraConfig(**settings)


def test_misspelt_field_is_refused():
    with pytest.raises(TypeError, match="encoder_hiden"):
        FVAELoraConfig(encoder_hiden=3)


@pytest.mark.parametrize(("delta", "beta"), [(1.01, 1.0), (1e-9, 0.0), (11, 10)])
def test_factorisation_beyond_the_kl_term_is_refused_with_the_reason(delta, beta):
    with pytest.raises(ValueError, match=rf"^factorization_weight {delta:g} > kl_weight {beta:g}: .*{NO_FLOOR}"):
        FVAELoraConfig(objective="paper", factorization_weight=delta, kl_weight=beta)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"objective": "paper", "factorization_weight": 1.0}, f"factorization_weight 1 = kl_weight 1: .*{NO_FLOOR}"),
        ({"objective": "paper", "factorization_weight": 0.999}, None),
        ({"objective": "paper", "factorization_weight": 0, "kl_weight": 0}, None),
        ({"z1_weight": 8.01}, f"2 z1_weight / r > kl_weight 1: .*{NO_FLOOR}"),
        ({"z1_weight": 8}, None),
        ({"r": 1}, f"2 z1_weight / r > kl_weight 1: .*{NO_FLOOR}"),
        ({"r": 1, "kl_weight": 2}, None),
        ({"kl_weight": 0.124}, f"2 z1_weight / r > kl_weight 0.124: .*{NO_FLOOR}"),
        ({"objective": "vae2lat", "r": 1}, None),
        ({"objective": "beta_vae2lat", "kl_weight": 0}, None),
    ],
    ids=str,
)
def test_objective_without_a_floor_warns(settings, expected):
    found = warnings_of(**settings)
    assert len(found) == (expected is not None)
    if expected:
        assert re.search(expected, found[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weight_that_the_objective_does_not_use_warns(objective):
    assert warnings_of(objective=objective) == []
    warned = set()
    for name in NOT_NEGATIVE:
        for message in warnings_of(objective=objective, **{name: 0.75}):
            assert re.fullmatch(rf"objective '{objective}' does not use {name}", message)
            warned.add(name)
    assert warned == UNUSED[objective]


def test_warning_points_at_the_caller():
    with pytest.warns(UserWarning, match="does not use") as caught:
        FVAELoraConfig(objective="vae2lat", z1_weight=2.0)
    assert caught[0].filename == __file__


def test_every_field_has_help():
    own = {field.name for field in dataclasses.fields(FVAELoraConfig)} - {
        f.name for f in dataclasses.fields(PeftConfig)
    }
    described = {field.name for field in dataclasses.fields(FVAELoraConfig) if field.metadata.get("help")}
    assert own >= set(DEFAULTS) and own <= described


@pytest.mark.filterwarnings("ignore:objective")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_config_survives_saving(tmp_path, objective):
    config = FVAELoraConfig(**CHANGED, objective=objective, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    for loaded in (PeftConfig.from_pretrained(tmp_path), FVAELoraConfig.from_pretrained(tmp_path)):
        assert type(loaded) is FVAELoraConfig
        expected = {**config.to_dict(), "inference_mode": loaded.inference_mode}
        assert loaded.to_dict() == expected
        assert {name: getattr(loaded, name) for name in CHANGED} == {
            **CHANGED,
            "target_modules": {"q_proj", "o_proj"},
            "exclude_modules": {"k_proj"},
        }
        assert loaded.objective == objective


@pytest.mark.filterwarnings("ignore:objective")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_adapter_saved_with_its_settings_comes_back_with_them(tmp_path, objective):
    settings = {name: value for name, value in CHANGED.items() if name not in ("modules_to_save", "exclude_modules")}
    config = FVAELoraConfig(**settings, objective=objective, task_type="CAUSAL_LM")
    model = randomise(get_peft_model(tiny_model("llama"), config))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].to_dict() == config.to_dict()
    side_losses = []
    for of in (model, loaded):
        torch.manual_seed(0)
        with side_loss.collect(of.train()) as collected:
            of(token_ids())
        side_losses.append(collected.neg_elbo.item())
    assert side_losses[0] == side_losses[1]


def test_key_of_a_later_version_is_dropped_with_a_warning(tmp_path):
    FVAELoraConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{"field_of_the_future": 1,', 1))
    with pytest.warns(UserWarning, match="field_of_the_future"):
        assert PeftConfig.from_pretrained(tmp_path).r == 3


def test_saved_value_is_checked_again(tmp_path):
    FVAELoraConfig(r=3).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"r": 3', '"r": -3'))
    with pytest.raises(ValueError, match=r"^r "):
        PeftConfig.from_pretrained(tmp_path)


def test_llama_3_8b_has_the_published_number_of_parameters():
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(LlamaConfig(intermediate_size=14336, vocab_size=128256, **shape))
        model = get_peft_model(base, FVAELoraConfig(target_modules=["q_proj", "v_proj"]))
    encoder = (4096 * 16 + 16) + 2 * (16 * 16 + 16)
    decoder = (32 * 128 + 128) + 2 * (128 * 128 + 128) + (128 * 4096 + 4096) + 4096
    up = 16 * (4096 + 1024)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 32 * (2 * (2 * encoder + decoder) + up)
    assert total - trainable == 8_030_261_248
    used = [p.numel() for name, p in model.named_parameters() if ".encoder1." in name or "lora_B" in name]
    kept = sum(used) - 32 * 2 * (16 * 16 + 16)  # evaluation needs no log-variance head either
    assert round(trainable / 1e6, 1) == 47.5
    assert 6.8e6 <= kept <= sum(used) <= 6.9e6
