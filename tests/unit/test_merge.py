"""Merging adapters with a linear encoder into the base weights, and unmerging them."""

import copy
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fvae_dist import side_loss
from fvae_dist.adapter import FVAELinear
from tests.adapted import IDS, add_trained, assert_same_weights, base_weights, fvae_layers, logits, outputs_of, trained
from tests.models import ARCHITECTURES, randomise, tiny_adapter, tiny_model

D_IN, D_OUT = 6, 5
EXACT = {"rtol": 1e-5, "atol": 1e-5}


def linear(name="llama", **settings) -> PeftModel:
    return trained(name, **{"encoder_layers": 0, **settings})


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in ARCHITECTURES),
        *((name, {"target_modules": "all-linear"}) for name in ARCHITECTURES),
        ("llama", {"encoder_shared_trunk": False, "r": 3, "lora_alpha": 3.0}),
    ],
    ids=str,
)
def test_merge_and_unmerge_are_exact(name, settings, safe_merge):
    model = linear(name, **settings)
    expected, base, weights = logits(model), logits(tiny_model(name)), base_weights(model)
    model.merge_adapter(safe_merge=safe_merge)
    assert all(layer.merged for layer in fvae_layers(model).values())
    torch.testing.assert_close(logits(model), expected, **EXACT)
    assert not torch.allclose(expected, base, **EXACT), "the update is too small to show"
    model.unmerge_adapter()
    assert_same_weights(base_weights(model), weights)
    assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore:Merging gave")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merge_and_unload_gives_a_plain_model(name):
    model = linear(name)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert type(merged) is type(tiny_model(name)) and not hasattr(merged, "peft_config")
    assert not [name for name, _ in merged.named_modules() if "fvae" in name or "base_layer" in name]
    torch.testing.assert_close(logits(merged), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "base",
    [nn.Linear(D_IN, D_OUT), nn.Linear(D_IN, D_OUT, bias=False), Conv1D(D_OUT, D_IN), nn.Linear(4, 4), Conv1D(4, 4)],
    ids=["linear", "no_bias", "conv1d", "square_linear", "square_conv1d"],
)
def test_merged_layer(base, dtype):
    base = copy.deepcopy(base).to(dtype).eval()
    torch.manual_seed(0)
    layer = randomise(FVAELinear(base, "default", tiny_adapter(encoder_layers=0)))
    features = layer.in_features
    x = torch.randn(7, features).to(dtype)
    weight, bias = base.weight, base.bias
    exact = copy.deepcopy(layer).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):  # must not make the delta a bf16 product
        layer.merge(safe_merge=True)
    tolerance = EXACT if dtype.itemsize >= 4 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(layer(x), exact.to(dtype), **tolerance)
    assert base.weight.dtype == base.bias.dtype == dtype and not torch.allclose(base.weight, weight)
    layer.unmerge()
    assert base.weight is weight and base.bias is bias


def test_delta_is_computed_in_fp32_whatever_the_base():
    """bf16(W + fp32 delta): a bf16 delta would be off by more than the last rounding."""
    torch.manual_seed(0)
    base = nn.Linear(64, 64, bias=False).bfloat16()
    layer = randomise(FVAELinear(base, "default", tiny_adapter(encoder_layers=0)))
    vae, up = layer.fvae_vae["default"], layer.fvae_lora_B["default"].weight
    delta = layer.scaling["default"] * up.double() @ vae.encoder1.mean.weight.double()
    expected = (base.weight.double() + delta).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        layer.merge()
    assert (base.weight == expected).float().mean() > 0.999


def test_several_adapters_merge_and_unmerge_together():
    model = add_trained(add_trained(linear(), "one", encoder_layers=0, r=2), "two", seed=3, encoder_layers=0)
    weights = base_weights(model)
    separate = outputs_of(model, ["default", "one", "two"])
    model.base_model.set_adapter(["default", "one"])
    both = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, **EXACT)
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), both, **EXACT)
    model.unmerge_adapter()
    assert_same_weights(base_weights(model), weights)
    model.merge_adapter(adapter_names=["two"])
    torch.testing.assert_close(logits(model), separate["two"], **EXACT)
    with pytest.warns(UserWarning, match="additionally merging one"):
        model.merge_adapter(adapter_names=["one", "two"])
    assert {tuple(layer.merged_adapters) for layer in fvae_layers(model).values()} == {("two", "one")}
    assert not torch.allclose(logits(model), separate["two"], **EXACT)
    model.unmerge_adapter()
    assert_same_weights(base_weights(model), weights)


@pytest.mark.filterwarnings("ignore:Merging gave")
def test_merge_and_unload_of_chosen_adapters():
    model = add_trained(linear(target_modules=["q_proj"]), "other", encoder_layers=0, target_modules=["k_proj"])
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    expected = outputs_of(model, ["default", "other"])
    for names in (["default"], ["other"], ["default", "other"]):
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=names)
        torch.testing.assert_close(logits(merged), expected[names[0]] if len(names) == 1 else both, **EXACT)


def test_cast_while_merged_comes_back_cast():
    model = linear()
    model.merge_adapter()
    model.bfloat16().unmerge_adapter()
    assert_same_weights(base_weights(model), base_weights(linear().bfloat16()))


def test_deepcopy_of_a_merged_model_unmerges_by_itself():
    model = linear()
    weights, expected = base_weights(model), logits(model)
    model.merge_adapter()
    merged = base_weights(model)
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert_same_weights(base_weights(twin), weights)
    assert_same_weights(base_weights(model), merged)
    torch.testing.assert_close(logits(model), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:Input and output embeddings")
def test_tied_embedding_is_left_alone():
    model = linear("gpt2", target_modules=["lm_head"])
    embedding = model.get_input_embeddings().weight
    before, expected = embedding.clone(), logits(model)
    model.merge_adapter()
    assert torch.equal(embedding, before)
    torch.testing.assert_close(logits(model), expected, **EXACT)
    model.unmerge_adapter()
    assert model.get_output_embeddings().base_layer.weight is embedding
    with pytest.warns(UserWarning, match="Merging gave 1 layers"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(merged), expected, **EXACT)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.filterwarnings("ignore:Merging gave")
def test_modules_to_save_are_kept():
    model = linear("gpt2", modules_to_save=["lm_head"], model_settings={"tie_word_embeddings": False})
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(2)
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, **EXACT)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, **EXACT)


def test_offloaded_base():
    expected = logits(linear())
    base = tiny_model("llama")
    cpu_offload(base, execution_device=torch.device("cpu"))
    torch.manual_seed(0)
    model = randomise(get_peft_model(base, tiny_adapter(encoder_layers=0))).eval()
    assert all(layer.base_layer.weight.is_meta for layer in fvae_layers(model).values())
    torch.testing.assert_close(logits(model), expected, **EXACT)
    model.merge_adapter(safe_merge=True)
    assert all(layer.merged for layer in fvae_layers(model).values())
    torch.testing.assert_close(logits(model), expected, **EXACT)
    model.unmerge_adapter()
    assert all(layer.base_layer.weight.is_meta for layer in fvae_layers(model).values())
    torch.testing.assert_close(logits(model), expected, **EXACT)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tiny_model("llama")), **EXACT)
    torch.testing.assert_close(logits(model), expected, **EXACT)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("default")
    torch.testing.assert_close(logits(model), expected, **EXACT)


# ----------------------------------------------------------------------------------------------------------------- bias


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_bias_is_made_and_told(name, tmp_path):
    model = linear(name, target_modules=["q_proj", "o_proj"])
    expected = logits(model)
    without = 4 if name == "llama" else 2
    with pytest.warns(
        UserWarning, match=rf"Merging gave {without} layers that had no bias one \(model\.layers\.0\.self_attn"
    ):
        merged = model.merge_and_unload()
    assert merged.model.layers[0].self_attn.o_proj.bias.any()
    if name == "llama":
        merged.config.attention_bias = True  # what the warning says
        merged.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, **EXACT)


def test_no_bias_is_made_of_zeros():
    model = linear()
    with torch.no_grad():
        for layer in fvae_layers(model).values():
            layer.fvae_vae["default"].encoder1.mean.bias.zero_()
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    assert merged.model.layers[0].self_attn.q_proj.bias is None
    torch.testing.assert_close(logits(merged), expected, **EXACT)


def test_bias_of_an_earlier_merge_is_told_too():
    model = linear()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Merging gave 4 layers"):
        merged = model.unload()
    assert merged.model.layers[0].self_attn.q_proj.bias is not None


# -------------------------------------------------------------------------------------------- what PEFT's LoRA does too


def test_merged_layers_neither_sample_nor_report():
    model = linear()
    model.merge_adapter()
    expected = logits(model)
    with side_loss.collect(model.train()) as collected:
        assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(ValueError):
        _ = collected.neg_elbo


def test_disabling_unmerges():
    model = linear()
    expected, base, weights = logits(model), logits(tiny_model("llama")), base_weights(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert_same_weights(base_weights(model), weights)
    assert torch.equal(logits(model), expected)


def test_setting_an_adapter_unmerges():
    model = add_trained(linear(), "other", encoder_layers=0)
    expected, weights = outputs_of(model, ["default", "other"]), base_weights(model)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    assert_same_weights(base_weights(model), weights)
    assert torch.equal(logits(model), expected["other"])


def test_deleting_a_merged_adapter_is_refused():
    model = linear()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge them first"):
        model.delete_adapter("default")


def test_unmerging_what_is_not_merged_is_a_warning():
    for model in (linear(), trained()):
        with pytest.warns(UserWarning, match="Already unmerged"):
            model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        next(iter(fvae_layers(linear()).values())).unmerge()


def test_merging_again_is_no_reason_to_refuse():
    model = linear()
    model.merge_adapter()
    with torch.no_grad():
        for layer in fvae_layers(model).values():
            layer.fvae_lora_B["default"].weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(safe_merge=True)


def test_frozen_stays_frozen():
    model = linear()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.merge_adapter()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
