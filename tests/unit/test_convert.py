"""Adapters of the reference code in (what it computes itself: tests/parity and, with FVAE_REFERENCE, the end of this
file), and the forms that adapters are exported in."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from fvae_dist import FVAELoraConfig, side_loss
from fvae_dist.adapter import FVAELinear
from fvae_dist.adapter.convert import export_adapter, load_official_adapter
from fvae_dist.adapter.export import written_aside
from fvae_dist.adapter.official import official_config
from tests.models import randomise, tiny_adapter, tiny_model
from tests.official import IDS, LINEAR, SETTINGS, TARGETS, logits, official_state_dict, trained, write_official
from tests.parity.reference import needs_reference, run_reference


def training_run(model):
    """Logits and side loss in training, for one fixed noise."""
    torch.manual_seed(5)
    model.train()
    with torch.no_grad(), side_loss.collect(model) as collected:
        output = model(IDS).logits
    model.eval()
    return output, collected.neg_elbo


def assert_same(model, expected):
    assert torch.equal(logits(model), logits(expected))
    for ours, theirs in zip(training_run(model), training_run(expected)):
        assert torch.equal(ours, theirs)


# ------------------------------------------------------------------------------------------------- reference's adapters


@pytest.mark.parametrize("name", ["", "default", "commonsense"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_state_dict_in_any_style_of_keys_gives_same_model(prefix, name):
    expected = trained()
    model = load_official_adapter(tiny_model("llama"), official_state_dict(expected, prefix, name), SETTINGS)
    assert_same(model, expected)


def test_folder_and_file_give_same_model(tmp_path):
    expected = trained()
    folder = write_official(tmp_path / "saved", expected)
    assert_same(load_official_adapter(tiny_model("llama"), folder), expected)
    assert_same(load_official_adapter(tiny_model("llama"), str(folder / "adapter_model.safetensors")), expected)
    alone = tmp_path / "alone.safetensors"
    (folder / "adapter_model.safetensors").rename(alone)
    assert_same(load_official_adapter(tiny_model("llama"), alone, SETTINGS), expected)
    with pytest.raises(ValueError, match="config is needed"):
        load_official_adapter(tiny_model("llama"), alone)


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder_layers": 0},
        {"encoder_layers": 3},
        {"encoder_shared_trunk": False, "encoder_layers": 2},
        {"decoder_layers": 0},
        {"decoder_layers": 0, "latent_fusion": "average"},
        {"latent_fusion": "average", "r": 1},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:2 z1_weight / r > kl_weight")
def test_shapes_say_all_but_the_weights(settings):
    expected = trained(**settings)
    given = {"lora_alpha": 16, "lambda_downstream": 1000.0}
    model = load_official_adapter(tiny_model("llama"), official_state_dict(expected), given)
    assert_same(model, expected)
    ours, theirs = model.peft_config["default"], expected.peft_config["default"]
    relevant = {"r", "latent_fusion", "encoder_layers", "decoder_layers", "encoder_shared_trunk"}
    assert all(getattr(ours, name) == getattr(theirs, name) for name in relevant)
    adapted = [f"model.layers.{index}.self_attn.{name}" for index in (0, 1) for name in TARGETS]
    assert ours.target_modules == set(adapted)


def test_state_dict_alone_asks_for_config_and_says_what_it_knows():
    with pytest.raises(ValueError, match=r"lora_alpha and the lambda_\* weights.*latent_dim = 4.*dec_hidden_layer = 8"):
        load_official_adapter(tiny_model("llama"), official_state_dict(trained()))


def test_own_configuration_is_taken_and_left_unchanged():
    expected = trained()
    config = tiny_adapter(target_modules=TARGETS, revision="abc")
    before = copy.deepcopy(config)
    model = load_official_adapter(tiny_model("llama"), official_state_dict(expected), config, adapter_name="official")
    assert torch.equal(logits(model), logits(expected))
    assert config == before
    assert list(model.peft_config) == ["official"] and model.peft_config["official"].revision == "abc"


@pytest.mark.parametrize("style", ["saved", "live"])
def test_modules_to_save_are_loaded(style, tmp_path):
    expected = trained(modules_to_save=["lm_head"])
    state_dict = official_state_dict(expected)
    if style == "live":
        key = "base_model.model.lm_head"
        state_dict[f"{key}.modules_to_save.default.weight"] = state_dict.pop(f"{key}.weight")
    model = load_official_adapter(tiny_model("llama"), state_dict, {**SETTINGS, "modules_to_save": ["lm_head"]})
    assert_same(model, expected)
    told_by_keys = load_official_adapter(tiny_model("llama"), state_dict, {"lora_alpha": 16})
    assert told_by_keys.peft_config["default"].modules_to_save == ["lm_head"]
    assert torch.equal(logits(told_by_keys), logits(expected))


def test_loaded_adapter_is_in_evaluation_and_can_be_trained():
    state_dict = official_state_dict(trained())
    before = {key: tensor.clone() for key, tensor in state_dict.items()}
    model = load_official_adapter(tiny_model("llama"), state_dict, {**SETTINGS, "inference_mode": True})
    assert not model.training and not model.peft_config["default"].inference_mode
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(parameters) == sum(".fvae_" in name for name, _ in model.named_parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model.train()
    with side_loss.collect(model) as collected:
        loss = model(IDS, labels=IDS).loss
    (loss + collected.neg_elbo).backward()
    optimizer.step()
    assert all(torch.equal(state_dict[key], tensor) for key, tensor in before.items())


def test_adapter_is_fp32_whatever_the_file_and_the_base():
    state_dict = {key: tensor.half() for key, tensor in official_state_dict(trained()).items()}
    model = load_official_adapter(tiny_model("llama", torch.bfloat16), state_dict, SETTINGS)
    assert {p.dtype for name, p in model.named_parameters() if ".fvae_" in name} == {torch.float32}
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert torch.equal(
        layer.fvae_lora_B["default"].weight, state_dict[next(k for k in state_dict if "lora_B" in k)].float()
    )


def test_base_without_weights_gets_an_adapter_with_values(tmp_path):
    expected = trained(modules_to_save=["lm_head"])
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    settings = {**SETTINGS, "modules_to_save": ["lm_head"]}
    model = load_official_adapter(base, official_state_dict(expected), settings)
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(tiny_model("llama"), tmp_path), expected)
    assert base.model.layers[0].mlp.up_proj.weight.is_meta


def test_one_of_several_adapters_is_taken_by_name():
    first, second = trained(seed=1), trained(seed=2)
    state_dict = official_state_dict(first, name="a") | official_state_dict(second, name="b")
    model = load_official_adapter(tiny_model("llama"), state_dict, SETTINGS, adapter_name="b")
    assert torch.equal(logits(model), logits(second))
    with pytest.raises(ValueError, match=r"several adapters \(a, b\)"):
        load_official_adapter(tiny_model("llama"), state_dict, SETTINGS)


def test_modules_that_transformers_renamed_are_found():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = AutoConfig.for_model("vit", image_size=8, patch_size=4, num_labels=3, **sizes)
    torch.manual_seed(0)
    base = AutoModelForImageClassification.from_config(config).eval()
    expected = trained(copy.deepcopy(base), target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    renamed = {
        key.replace("vit.layers.", "vit.encoder.layer.")
        .replace(".attention.q_proj.", ".attention.attention.query.")
        .replace(".attention.v_proj.", ".attention.attention.value."): tensor
        for key, tensor in official_state_dict(expected).items()
    }
    assert not renamed.keys() & {key for key in official_state_dict(expected) if "lora_" in key}
    settings = {**SETTINGS, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    model = load_official_adapter(base, renamed, settings)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(model, pixels), logits(expected, pixels))


def test_any_module_can_be_the_base():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    expected = trained(copy.deepcopy(base), target_modules=["2"])
    model = load_official_adapter(base, official_state_dict(expected), {"lora_alpha": 16})
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), expected(x))


# ------------------------------------------------------------------------------------------------ reference's settings


def test_settings_are_translated():
    settings = {
        "latent_dim": 3,
        "latent_fusion": "average",
        "enc_num_of_layer": 2,
        "enc_hidden_layer": [7, 7],
        "enc_dropout": 0.2,
        "encoder_use_common_hidden_layer": False,
        "dec_num_of_layer": 1,
        "dec_hidden_layer": 9,
        "dec_dropout": 0.3,
        "z2_latent_mean": 2.5,
        "z2_latent_std": 0.5,
        "lambda_downstream": 10,
        "lambda_reconstruction": 0.25,
        "lambda_z2_l2": 0.5,
        "lambda_z1_l2": 0.75,
        "lambda_kl_z1": 2,
        "lora_alpha": 5,
        "target_modules": ["a"],
        "layers_to_transform": 0,
        "layers_pattern": "h",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "revision": "main",
    }
    assert official_config(settings) == FVAELoraConfig(
        r=3,
        latent_fusion="average",
        encoder_layers=2,
        encoder_hidden=7,
        encoder_dropout=0.2,
        encoder_shared_trunk=False,
        decoder_layers=1,
        decoder_hidden=9,
        decoder_dropout=0.3,
        z2_prior_mean=2.5,
        z2_prior_std=0.5,
        task_weight=10,
        reconstruction_weight=0.25,
        z2_weight=0.5,
        z1_weight=0.75,
        kl_weight=2,
        lora_alpha=5,
        target_modules=["a"],
        layers_to_transform=0,
        layers_pattern="h",
        task_type="CAUSAL_LM",
        base_model_name_or_path="base",
        revision="main",
    )


def test_settings_left_out_have_the_defaults_of_the_reference():
    config = official_config({"lora_alpha": 8})
    assert (config.r, config.encoder_layers, config.encoder_hidden, config.decoder_hidden) == (128, 3, 1024, 1024)
    assert (config.task_weight, config.kl_weight, config.z2_prior_mean) == (1, 1, 1.5)


def test_settings_without_effect_in_the_reference_have_none():
    idle = {"r": 64, "lora_dropout": 0.5, "use_dora": True, "use_rslora": True, "scalar_decoder_std": True}
    ignored = {**idle, "enc_l2_reg": 1, "rank_pattern": {"q": 2}, "runtime_config": {"x": 1}, "later_switch": None}
    assert official_config({**SETTINGS, **ignored}) == official_config(SETTINGS)
    whole = {"target_modules": ".*q_proj", "layers_to_transform": [1], "layers_pattern": "layers"}
    assert official_config({**SETTINGS, **whole}).layers_to_transform is None


@pytest.mark.parametrize("alpha", [0, -1])
def test_lora_alpha_not_above_zero_means_the_latent_dimension(alpha):
    assert official_config({**SETTINGS, "lora_alpha": alpha}).lora_alpha == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("force_classical_vae", True),
        ("force_classical_ae", True),
        ("force_test_vae", True),
        ("force_minhyp", True),
        ("num_of_z_sampled", 2),
        ("enc_hidden_layer", [8, 9]),
        ("dec_hidden_layer", [8, 9]),
        ("dec_hidden_layer", [8]),
        ("encoder_nn_type", "cnn"),
        ("decoder_nn_type", "cnn"),
        ("bias", "all"),
        ("layer_replication", [[0, 1]]),
        ("lambda_new", 2),
        ("lora_alpha", None),
    ],
)
def test_settings_without_counterpart_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        official_config({**SETTINGS, name: value})


def test_bad_value_of_a_setting_is_refused():
    with pytest.raises(ValueError, match="settings of the reference define no adapter here: r must be"):
        official_config({**SETTINGS, "latent_dim": "4"})


def test_negative_scales_count_by_their_size():
    expected = trained()
    negative = {key: -t if key.endswith("scale_tril") else t for key, t in official_state_dict(expected).items()}
    model = load_official_adapter(tiny_model("llama"), negative, SETTINGS)
    assert_same(model, expected)


# -------------------------------------------------------------------------------------------------------------- refused


def refused(match, state_dict, config=SETTINGS, base=None):
    base = tiny_model("llama") if base is None else base
    before = {name: (type(module), module.training) for name, module in base.named_modules()}
    weights = {name: (p.clone(), p.requires_grad) for name, p in base.named_parameters()}
    with pytest.raises(ValueError, match=match) as caught:
        load_official_adapter(base, state_dict, config)
    assert {name: (type(module), module.training) for name, module in base.named_modules()} == before
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, weights[name][0]) and parameter.requires_grad == weights[name][1]
    return str(caught.value)


def test_missing_keys_are_listed_and_the_base_is_left_as_it_was():
    state_dict = official_state_dict(trained())
    gone = next(key for key in state_dict if key.endswith("lora_B"))
    del state_dict[gone]
    refused(rf"1 missing: {gone.removeprefix('base_model.model.')}$", state_dict)
    no_second_layer = {key: tensor for key, tensor in official_state_dict(trained()).items() if ".layers.1." not in key}
    message = refused(r"\d+ missing: .* and \d+ more$", no_second_layer)
    assert message.count(",") == 9 and len(message) < 1500


def test_unknown_keys_are_listed():
    state_dict = official_state_dict(trained())
    extra = {"base_model.model.lm_head.weight": torch.zeros(64, 32), "stray": torch.zeros(1)}
    refused("2 unknown: lm_head.weight, stray$", {**state_dict, **extra})
    moved = {key.replace("q_proj", "o_proj"): tensor for key, tensor in state_dict.items()}
    refused("missing: .*q_proj.*; .* unknown: .*o_proj", moved)


def test_wrong_shapes_are_listed():
    state_dict = official_state_dict(trained())
    refused(r"of another shape: .*\(8, 32\) instead of \(9, 32\)", state_dict, {**SETTINGS, "enc_hidden_layer": 9})
    wider = tiny_model("llama", hidden_size=40)
    refused(r"\(8, 32\) instead of \(8, 40\)", state_dict, base=wider)


def test_targets_that_the_base_lacks_are_named():
    refused("'nowhere' matches no module", official_state_dict(trained()), {**SETTINGS, "target_modules": ["nowhere"]})


def test_a_failed_load_leaves_modules_to_save_alone():
    state_dict = official_state_dict(trained(modules_to_save=["lm_head"]))
    del state_dict["base_model.model.lm_head.weight"]
    refused("1 missing: lm_head.weight", state_dict, {**SETTINGS, "modules_to_save": ["lm_head"]})


def test_layers_that_disagree_cannot_be_inferred():
    state_dict = official_state_dict(trained())
    other = official_state_dict(trained(r=2))
    state_dict |= {key: tensor for key, tensor in other.items() if ".layers.1." in key}
    refused("the layers differ", state_dict, {"lora_alpha": 16})


def test_what_is_no_adapter_of_the_reference_is_refused():
    refused("no tensor has a name", {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)})
    refused("no tensor has a name", {})
    with pytest.raises(ValueError, match="pass the base model"):
        load_official_adapter(trained(), official_state_dict(trained()), SETTINGS)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.pt", "model.ckpt"])
def test_pickles_are_refused_unread(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    path = tmp_path if name == "adapter_model.bin" else tmp_path / name
    with pytest.raises(ValueError, match=rf"{name}.*nothing is unpickled.*safetensors"):
        load_official_adapter(tiny_model("llama"), path, SETTINGS)


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder = write_official(tmp_path / "saved", trained(), peft_type="LORA")
    base = tiny_model("llama")
    with pytest.raises(ValueError, match=r"adapter_config.json: peft_type is 'LORA'"):
        load_official_adapter(base, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json: "):
        load_official_adapter(base, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: "):
        load_official_adapter(base, folder, SETTINGS)
    with pytest.raises(ValueError, match=r"there is no file .*nowhere"):
        load_official_adapter(base, tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------------------- exports

EXPORTS = {
    "llama": ("llama", {**LINEAR, "task_type": "CAUSAL_LM"}),
    "qwen2_one_layer": ("qwen2", {**LINEAR, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "gpt2": ("gpt2", {**LINEAR, "target_modules": ["c_attn"]}),
    "head": ("llama", {**LINEAR, "modules_to_save": ["lm_head"]}),
}
PLAIN_PEFT = """
import sys
from pathlib import Path
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder = Path(sys.argv[1])
ids = torch.load(folder / "ids.pt", weights_only=True)
results = {}
for adapter in folder.glob("*/lora*"):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapter.parent / "base"), adapter).eval()
    with torch.no_grad():
        results[str(adapter.relative_to(folder))] = model(ids).logits
save_file(results, folder / "logits")
assert not [name for name in sys.modules if name.startswith("fvae")]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """For each of EXPORTS its logits here, and of its LoRA forms (from model and from folder) those in plain PEFT."""
    folder = tmp_path_factory.mktemp("exports")
    torch.save(IDS, folder / "ids.pt")
    expected = {}
    for name, (architecture, settings) in EXPORTS.items():
        tiny_model(architecture).save_pretrained(folder / name / "base")
        base = AutoModelForCausalLM.from_pretrained(folder / name / "base")
        model = trained(base, **settings)
        model.save_pretrained(folder / name / "saved")
        assert export_adapter(model, folder / name / "lora") == folder / name / "lora"
        export_adapter(folder / name / "saved", folder / name / "lora_of_folder")
        expected[name] = logits(model)
    command = [sys.executable, "-c", PLAIN_PEFT, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return folder, expected, load_file(folder / "logits")


@pytest.mark.parametrize("name", EXPORTS)
def test_lora_form_gives_same_outputs_in_plain_peft(name, exported):
    folder, expected, found = exported
    scale = expected[name].abs().max().item()
    for form in ("lora", "lora_of_folder"):
        torch.testing.assert_close(found[f"{name}/{form}"], expected[name], rtol=0, atol=1e-6 * max(1.0, scale))
    base = AutoModelForCausalLM.from_pretrained(folder / name / "base")
    assert not torch.allclose(expected[name], logits(base), atol=1e-3)


@pytest.mark.parametrize("name", EXPORTS)
def test_lora_form_keeps_the_configuration(name, exported):
    folder = exported[0] / name
    saved = json.loads((folder / "saved" / "adapter_config.json").read_text())
    same = ("task_type", "base_model_name_or_path", "modules_to_save", "layers_to_transform", "layers_pattern", "r")
    for form in ("lora", "lora_of_folder"):
        lora = json.loads((folder / form / "adapter_config.json").read_text())
        assert {key: lora[key] for key in same} == {key: saved[key] for key in same}
        assert set(lora["target_modules"]) == set(saved["target_modules"])
        assert lora["auto_mapping"] == saved["auto_mapping"]
        assert lora["peft_type"] == "LORA" and lora["lora_bias"] and lora["inference_mode"]
    assert json.loads((folder / "lora" / "adapter_config.json").read_text())["fan_in_fan_out"] == (name == "gpt2")


def test_lora_form_has_a_bias_only_if_needed(tmp_path):
    model = trained(**LINEAR)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("encoder1.mean.bias"):
                parameter.zero_()
    export_adapter(model, tmp_path / "lora")
    assert not any(key.endswith(".bias") for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    lora = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), logits(model), rtol=1e-5, atol=1e-6)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"encoder_shared_trunk": False}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_inference_form_gives_same_outputs_with_fewer_tensors(settings, tmp_path):
    model = trained(**settings)
    model.save_pretrained(tmp_path / "saved")
    export_adapter(model, tmp_path / "of_model", format="inference")
    export_adapter(tmp_path / "saved", tmp_path / "of_folder", format="inference")
    kept = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("of_model", "of_folder")}
    assert kept["of_model"].keys() == kept["of_folder"].keys()
    allowed = (".fvae_vae.encoder1.", ".fvae_lora_B.", ".lm_head.")
    assert all(any(part in key for part in allowed) for key in kept["of_model"])
    for name in kept:
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["inference_only"] is True
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name)), logits(model))
    assert not model.peft_config["default"].inference_only


def test_one_of_several_adapters_is_exported(tmp_path):
    model = trained(**LINEAR)
    model.add_adapter("other", tiny_adapter(target_modules=TARGETS, **LINEAR))
    randomise(model, seed=2)
    model.set_adapter("other")
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    sources = {"active": (model, None), "named": (model, "other"), "folder": (tmp_path / "saved", "other")}
    for form in ("lora", "inference"):
        for kind, (source, name) in sources.items():
            out = export_adapter(source, tmp_path / form / kind, form, adapter_name=name)
            loaded = PeftModel.from_pretrained(tiny_model("llama"), out)
            torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no adapter 'third', only default, other"):
        export_adapter(model, tmp_path / "no", adapter_name="third")


@pytest.mark.parametrize(("architecture", "targets"), [("qwen2", TARGETS), ("gpt2", ["c_attn"])])
def test_merged_form_is_the_model(architecture, targets, tmp_path):
    model = trained(tiny_model(architecture), target_modules=targets, **LINEAR)
    export_adapter(model, tmp_path / "merged", format="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)
    assert isinstance(model.get_base_model().get_submodule("lm_head"), nn.Linear)
    assert any(isinstance(module, FVAELinear) and not module.merged for module in model.modules())


def test_merged_form_never_loses_a_bias(tmp_path):
    model = trained(**LINEAR)
    with pytest.raises(ValueError, match=r"q_proj has no bias.*Use format 'lora'"):
        export_adapter(model, tmp_path / "merged", format="merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["lora", "merged"])
def test_non_linear_encoder_has_no_linear_form(form, tmp_path):
    model = trained()
    with pytest.raises(ValueError, match=r"encoder_layers = 0.*not linear.*Use format 'inference'"):
        export_adapter(model, tmp_path / "out", format=form)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="encoder_layers = 0"):
        export_adapter(tmp_path / "saved", tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


def test_bad_exports_are_refused_and_write_nothing(tmp_path):
    model = trained(**LINEAR)
    model.save_pretrained(tmp_path / "saved")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cases = [
        ("format must be one of lora, inference, merged, got 'onnx'", model, "out", "onnx"),
        ("is the adapter that is exported", tmp_path / "saved", "saved", "lora"),
        ("is the adapter that is exported", tmp_path / "saved", "saved/../saved", "inference"),
        ("is no saved adapter", tmp_path / "nowhere", "out", "lora"),
        ("needs the base model", tmp_path / "saved", "out", "merged"),
        ("is a file, not a folder", model, "saved/adapter_config.json", "lora"),
        ("is a file, not a folder", model, "saved/adapter_config.json/out", "lora"),
    ]
    for message, source, out, form in cases:
        with pytest.raises(ValueError, match=message):
            export_adapter(source, tmp_path / out, form)
    lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=TARGETS))
    lora.save_pretrained(tmp_path / "lora")
    for source in (lora, tmp_path / "lora"):
        with pytest.raises(ValueError, match="is no FVAE-LoRA adapter but LORA"):
            export_adapter(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_incomplete_adapter_is_not_exported(tmp_path):
    trained(**LINEAR).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if not key.endswith("mean.bias")}, file)
    with pytest.raises(ValueError, match=r"not complete: .*mean.bias"):
        export_adapter(tmp_path / "saved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_appear_only_once_all_are_written(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(RuntimeError, match="disk"), written_aside(out) as folder:
        (folder / "half").write_text("half")
        raise RuntimeError("disk")
    assert list(tmp_path.iterdir()) == []
    with written_aside(out) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a").write_text("new")
        assert not out.exists()
    (out / "kept").write_text("old")
    with written_aside(out) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a").write_text("newer")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "kept", "new", "out", "part"]
    assert (out / "part" / "a").read_text() == "newer"


# ------------------------------------------------------------------------------------------- the reference code itself


REFERENCE_SETTINGS = {
    "published": {"enc_num_of_layer": 1},
    "linear_average": {"enc_num_of_layer": 0, "enc_hidden_layer": 32, "latent_fusion": "average", "lora_alpha": 0},
    "separate_head": {
        "enc_num_of_layer": 2,
        "encoder_use_common_hidden_layer": False,
        "modules_to_save": ["lm_head"],
        "lambda_kl_z1": 3.0,
        "lora_dropout": 0.5,
        "use_rslora": True,
    },
}


@pytest.fixture(scope="module")
def saved_by_reference(tmp_path_factory):
    """The reference's adapters on a tiny model: folders that it saved, and what it computed with them."""
    folder = tmp_path_factory.mktemp("reference")
    tiny_model("llama").save_pretrained(folder / "base")
    jobs = {}
    for name, changes in REFERENCE_SETTINGS.items():
        settings = {**SETTINGS, "enc_dropout": 0.0, "dec_dropout": 0.0, **changes}
        del settings["peft_type"], settings["r"]
        job = {"kind": "adapter", "base": str(folder / "base"), "folder": str(folder / name), "settings": settings}
        jobs[name] = (job, {"ids": IDS})
    return folder, run_reference(folder, jobs)


@needs_reference
@pytest.mark.parametrize("name", REFERENCE_SETTINGS)
def test_adapter_saved_by_reference_computes_the_same(name, saved_by_reference, monkeypatch):
    folder, results = saved_by_reference
    expected = results[name]
    model = load_official_adapter(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / name)
    config = model.peft_config["default"]
    torch.testing.assert_close(logits(model), expected["logits"], rtol=1e-6, atol=1e-6)
    draws = iter(expected["noise"])
    monkeypatch.setattr(torch, "randn_like", lambda like: next(draws).reshape(like.shape))
    model.train()
    with torch.no_grad(), side_loss.collect(model) as collected:
        outputs = model(input_ids=IDS, labels=IDS)
    torch.testing.assert_close(outputs.logits, expected["train_logits"], rtol=1e-6, atol=1e-6)
    total = config.task_weight * outputs.loss + collected.neg_elbo
    torch.testing.assert_close(total, expected["total"].squeeze(), rtol=1e-6, atol=0)
