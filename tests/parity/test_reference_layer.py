"""The layer against numbers of the reference code, in float64: recorded ones (data/, see its index.json) and, with
FVAE_REFERENCE set, what the reference computes now for settings of every kind."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fvae_dist import side_loss
from fvae_dist.adapter.convert import load_official_adapter
from tests.models import LayerModel
from tests.parity.cases import DATA, RECORDED, build_layer, fill, grid, keys, random_tensors, settings_of
from tests.parity.reference import needs_reference, run_reference

# Settings that the reference takes, whose objective has no floor.
pytestmark = pytest.mark.filterwarnings("ignore:2 z1_weight / r > kl_weight")
RTOL = 1e-9
GRID = grid()


def check_training(case, tensors, monkeypatch):
    """y, every term, the total and all gradients equal the reference's in `tensors` (in/, out/, grad/)."""
    given, expected, grads = (
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for prefix in ("in/", "out/", "grad/")
    )
    model = LayerModel(fill(build_layer(case), given)).train()
    noise = iter([given["eps1"], given["eps2"]])
    monkeypatch.setattr(torch, "randn_like", lambda like: next(noise))
    x = given["x"].clone().requires_grad_(True)
    with side_loss.collect(model) as collected:
        y = model(x)
    task = y.square().mean()
    total = case["lambda_downstream"] * task + collected.neg_elbo
    total.backward()

    torch.testing.assert_close(y, expected["y"], rtol=RTOL, atol=0)
    torch.testing.assert_close(task, expected["task"].squeeze(), rtol=RTOL, atol=0)
    torch.testing.assert_close(total, expected["total"].squeeze(), rtol=RTOL, atol=0)
    for term in ("nll", "kl_z1", "z1_sq", "z2_sq", "neg_elbo"):
        torch.testing.assert_close(collected.terms[term], expected[term], rtol=RTOL, atol=0)
    torch.testing.assert_close(x.grad, grads.pop("x"), rtol=RTOL, atol=1e-15)
    ours = {key: parameter.grad for key, parameter in keys(model.layer).items()}
    assert set(ours) == set(grads)
    for key, grad in ours.items():
        torch.testing.assert_close(grad, grads[key], rtol=RTOL, atol=1e-12, msg=key)


def check_evaluation(case, tensors):
    given = {key.removeprefix("in/"): value for key, value in tensors.items() if key.startswith("in/")}
    y = fill(build_layer(case), given).eval()(given["x"])
    torch.testing.assert_close(y, tensors["out/y_eval"], rtol=RTOL, atol=1e-15)


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_layer_matches_reference_terms_and_gradients(name, monkeypatch):
    check_training(RECORDED[name], load_file(DATA / f"{name}.safetensors"), monkeypatch)


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_layer_matches_reference_in_evaluation(name):
    check_evaluation(RECORDED[name], load_file(DATA / f"{name}.safetensors"))


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_converted_adapter_matches_reference(name, monkeypatch):
    """Through `load_official_adapter`, in fp32: outputs in both modes and the side loss."""
    case, tensors = RECORDED[name], load_file(DATA / f"{name}.safetensors")
    given = {key.removeprefix("in/"): tensor.float() for key, tensor in tensors.items()}
    saved = {key: tensor for key, tensor in given.items() if key.startswith("fvae.") or key == "lora_B"}
    base = LayerModel(nn.Linear(case["in_features"], case["out_features"], bias=False))
    base.layer.weight.data.copy_(given["W"])
    keys_of_peft = {
        f"base_model.model.layer.{key.replace('fvae.', 'lora_A.')}": tensor for key, tensor in saved.items()
    }
    model = load_official_adapter(base, keys_of_peft, settings_of(case))
    torch.testing.assert_close(model(given["x"]), given["out/y_eval"], rtol=1e-6, atol=1e-6)
    noise = iter([given["eps1"], given["eps2"]])
    monkeypatch.setattr(torch, "randn_like", lambda like: next(noise))
    model.train()
    with side_loss.collect(model) as collected:
        y = model(given["x"])
    torch.testing.assert_close(y, given["out/y"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(collected.neg_elbo, given["out/neg_elbo"].squeeze(), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """The grid, computed by the reference: name -> in/, out/ and grad/ tensors."""
    jobs = {}
    for number, (name, case) in enumerate(GRID.items()):
        given = {f"in/{key}": tensor for key, tensor in random_tensors(case, seed=number).items()}
        jobs[name] = ({"kind": "one_layer", "settings": settings_of(case), "lora_alpha": case["lora_alpha"]}, given)
    results = run_reference(tmp_path_factory.mktemp("reference"), jobs)
    return {name: {**given, **results[name]} for name, (_, given) in jobs.items()}


@needs_reference
@pytest.mark.parametrize("name", GRID)
def test_layer_matches_reference_at_every_depth_and_rank(name, computed, monkeypatch):
    check_training(GRID[name], computed[name], monkeypatch)
    check_evaluation(GRID[name], computed[name])


def test_grid_covers_every_rank_depth_and_fusion():
    seen = {key: {case[key] for case in GRID.values()} for key in GRID["encoder0_decoder0_shared"] if key != "x"}
    assert seen["latent_dim"] == set(range(1, 9)) and seen["enc_num_of_layer"] == {0, 1, 2, 3}
    assert seen["dec_num_of_layer"] == {0, 1} and seen["latent_fusion"] == {"concat", "average"}
    assert seen["encoder_use_common_hidden_layer"] == {True, False}
