"""The layer against numbers that the reference code produced (float64; data/ holds them, see its index.json)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fvae_dist import FVAELoraConfig, side_loss
from fvae_dist.adapter import FVAELinear
from tests.models import LayerModel

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "index.json").read_text())
RTOL = 1e-9
ENCODERS = "fvae.views_conditionalGaussianEncoders_list"
DECODER = "fvae.views_conditionalGaussianDecoders"


def config_of(case: dict) -> FVAELoraConfig:
    return FVAELoraConfig(
        r=case["latent_dim"],
        lora_alpha=case["lora_alpha"],
        latent_fusion=case["latent_fusion"],
        encoder_layers=case["enc_num_of_layer"],
        encoder_hidden=case["enc_hidden_layer"],
        encoder_dropout=case["enc_dropout"],
        encoder_shared_trunk=case["encoder_use_common_hidden_layer"],
        decoder_layers=case["dec_num_of_layer"],
        decoder_hidden=case["dec_hidden_layer"],
        decoder_dropout=case["dec_dropout"],
        z2_prior_mean=case["z2_latent_mean"],
        z2_prior_std=case["z2_latent_std"],
        task_weight=case["lambda_downstream"],
        reconstruction_weight=case["lambda_reconstruction"],
        z2_weight=case["lambda_z2_l2"],
        z1_weight=case["lambda_z1_l2"],
        kl_weight=case["lambda_kl_z1"],
    )


def reference_name(name: str) -> str:
    """The reference's name of one of our parameters."""
    if name == "fvae_lora_B.default.weight":
        return "lora_B"
    name = name.removeprefix("fvae_vae.default.")
    for ours, theirs in {
        "encoder1.": f"{ENCODERS}.0.",
        "encoder2.": f"{ENCODERS}.1.",
        "decoder.layers.linears.": f"{DECODER}.layers.",
        "decoder.output.": f"{DECODER}.output_layer.",
        "decoder.scale": f"{DECODER}.scale_tril",
        "logvar_trunk.linears.": "layers_logvar.",
    }.items():
        name = name.replace(ours, theirs)
    return name


def build(case: dict, tensors: dict[str, torch.Tensor]) -> LayerModel:
    linear = nn.Linear(case["in_features"], case["out_features"], bias=False)
    layer = FVAELinear(linear, "default", config_of(case)).double()
    trunk = "trunk.linears." if case["encoder_use_common_hidden_layer"] else "mean_trunk."
    with torch.no_grad():
        linear.weight.copy_(tensors["in/W"])
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer"):
                parameter.copy_(tensors["in/" + _key(name, trunk)])
    return LayerModel(layer)


def _key(name: str, trunk: str) -> str:
    theirs = reference_name(name)
    return theirs.replace("trunk.linears.", "layers." if trunk == "trunk.linears." else "layers_mean.")


@pytest.mark.parametrize("name", sorted(CASES))
def test_layer_matches_reference_terms_and_gradients(name, monkeypatch):
    case, tensors = CASES[name], load_file(DATA / f"{name}.safetensors")
    model = build(case, tensors)
    noise = iter([tensors["in/eps1"], tensors["in/eps2"]])
    monkeypatch.setattr(torch, "randn_like", lambda like: next(noise))
    x = tensors["in/x"].clone().requires_grad_(True)

    model.train()
    with side_loss.collect(model) as collected:
        y = model(x)
    task = y.square().mean()
    total = case["lambda_downstream"] * task + collected.neg_elbo
    total.backward()

    expected = {key.removeprefix("out/"): value for key, value in tensors.items() if key.startswith("out/")}
    torch.testing.assert_close(y, expected["y"], rtol=RTOL, atol=0)
    torch.testing.assert_close(task, expected["task"].squeeze(), rtol=RTOL, atol=0)
    torch.testing.assert_close(total, expected["total"].squeeze(), rtol=RTOL, atol=0)
    for term in ("nll", "kl_z1", "z1_sq", "z2_sq", "neg_elbo"):
        torch.testing.assert_close(collected.terms[term], expected[term], rtol=RTOL, atol=0)
    trunk = "trunk.linears." if case["encoder_use_common_hidden_layer"] else "mean_trunk."
    seen = {"grad/x"}
    torch.testing.assert_close(x.grad, tensors["grad/x"], rtol=RTOL, atol=1e-15)
    for parameter_name, parameter in model.layer.named_parameters():
        if not parameter_name.startswith("base_layer"):
            key = "grad/" + _key(parameter_name, trunk)
            seen.add(key)
            torch.testing.assert_close(parameter.grad, tensors[key], rtol=RTOL, atol=1e-12, msg=key)
    assert seen == {key for key in tensors if key.startswith("grad/")}


@pytest.mark.parametrize("name", sorted(CASES))
def test_layer_matches_reference_in_evaluation(name):
    case, tensors = CASES[name], load_file(DATA / f"{name}.safetensors")
    y = build(case, tensors).eval()(tensors["in/x"])
    torch.testing.assert_close(y, tensors["out/y_eval"], rtol=RTOL, atol=0)
