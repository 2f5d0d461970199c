"""Fifty optimisation steps: every parameter stays on the reference's path (recorded; with FVAE_REFERENCE, anew)."""

import pytest
import torch
from safetensors.torch import load_file

from fvae_dist import side_loss
from tests.parity import trajectory
from tests.parity.cases import DATA, keys
from tests.parity.reference import needs_reference, run_reference
from tests.parity.trajectory import CASES, CHECKPOINTS, LEARNING_RATES, TwoLayers

TOLERANCE = 1e-8


@pytest.fixture
def run_ours(monkeypatch):
    """run_ours(optimizer name, tensors): our parameters by `STEP/LAYER.NAME`, and the loss of every step."""

    def run(name, tensors):
        model = TwoLayers(tensors).train()
        trained = {f"{index}.{key}": p for index, layer in enumerate(model.layers) for key, p in keys(layer).items()}
        optimizer = getattr(torch.optim, name)(list(trained.values()), lr=LEARNING_RATES[name])
        parameters, losses = {}, []
        for step, noise in enumerate(tensors["noise"], start=1):
            draws = iter(noise.flatten(0, 1))
            monkeypatch.setattr(torch, "randn_like", lambda like, draws=draws: next(draws))
            with side_loss.collect(model) as collected:
                task = (model(tensors["x"]) - tensors["target"]).square().mean()
            loss = CASES[0]["lambda_downstream"] * task + collected.neg_elbo
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            parameters |= {f"{step}/{key}": parameter.detach().clone() for key, parameter in trained.items()}
        return parameters, losses

    return run


def check_same_path(ours, expected):
    """Within 1e-8, absolute or relative to the largest element of the tensor."""
    assert {key.partition("/")[0] for key in expected} == {str(step) for step in CHECKPOINTS}
    for key, tensor in expected.items():
        bound = TOLERANCE * max(1.0, tensor.abs().max().item())
        assert (ours[key] - tensor).abs().max().item() <= bound, key


def check_moved(tensors, ours, losses):
    """The run says something only if it goes somewhere: the loss falls and every tensor changes."""
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    last = {key.removeprefix("50/"): tensor for key, tensor in ours.items() if key.startswith("50/")}
    for key, tensor in last.items():
        assert (tensor - tensors[key]).abs().max() > 1e-4 * tensor.abs().max(), key


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_training_follows_recorded_reference(optimizer, run_ours):
    recorded = load_file(DATA / "trajectory" / "run.safetensors")
    tensors = {key.removeprefix("in/"): tensor for key, tensor in recorded.items() if key.startswith("in/")}
    ours, losses = run_ours(optimizer, tensors)
    prefix = f"{optimizer}/"
    check_same_path(ours, {key.removeprefix(prefix): t for key, t in recorded.items() if key.startswith(prefix)})
    check_moved(tensors, ours, losses)


@needs_reference
@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_training_follows_reference(optimizer, run_ours, tmp_path):
    tensors = trajectory.make_tensors()
    expected = run_reference(tmp_path, {"run": (trajectory.reference_job(optimizer), tensors)})["run"]
    check_same_path(run_ours(optimizer, tensors)[0], expected)
