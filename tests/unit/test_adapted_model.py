"""Compiling, copying, pickling and describing the adapted model."""

import copy
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

from fvae_dist import side_loss
from tests.adapted import IDS, add_trained, fvae_layers, logits, outputs_of, trainable_names, trained
from tests.models import ARCHITECTURES, tiny_model

# ------------------------------------------------------------------------------------------------------------ compiling


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "settings"), [("llama", {"task_type": "CAUSAL_LM"}), ("gpt2", {})], ids=str)
def test_evaluation_compiles_into_one_graph(name, settings, fresh_dynamo):
    one_layer = {"num_hidden_layers": 1}
    model = add_trained(trained(name, model_settings=one_layer, **settings), "other", encoder_layers=0)
    expected = outputs_of(model, ["default", "other"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected["default"], rtol=1e-5, atol=1e-5)
    # What changes afterwards must not go unnoticed.
    model.set_adapter("other")
    torch.testing.assert_close(logits(compiled), expected["other"], rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(compiled), expected["other"], rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(compiled), logits(tiny_model(name, **one_layer)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(compiled), expected["other"], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_evaluation_compiles_with_inductor(fresh_dynamo):
    model = trained(model_settings={"num_hidden_layers": 1})
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- copying, pickling


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_copy_trains_by_itself(name):
    model = trained(name)
    expected, before = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD((p for p in twin.parameters() if p.requires_grad), lr=0.1)
    with side_loss.collect(twin.train()) as collected:
        loss = twin(IDS, labels=IDS).loss
    (loss + collected.neg_elbo).backward()
    optimizer.step()
    changed = {key for key, value in twin.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == trainable_names(twin) == trainable_names(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(logits(model), expected) and not torch.equal(logits(twin.eval()), expected)
    twin.rename_adapter("default", "other")
    assert list(model.peft_config) == ["default"]


UNPICKLE = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    model, ids, expected = pickle.load(file)  # the first thing that happens: nothing has been imported yet
import torch
with torch.no_grad():
    assert torch.equal(model(ids).logits, expected)
model.merge_adapter(); model.unmerge_adapter(); model.rename_adapter("default", "new")
with torch.no_grad():
    assert torch.equal(model(ids).logits, expected)
print(model.peft_type.value, model.active_adapter)
"""


def test_pickle(tmp_path):
    model = add_trained(trained(encoder_layers=0, task_type="CAUSAL_LM"), "other")
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(restored), logits(model))
    assert trainable_names(restored) == trainable_names(model) and restored.peft_config == model.peft_config
    path = tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps((model, IDS, logits(model))))
    command = [sys.executable, "-c", UNPICKLE, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.stdout.strip().endswith("FVAE_LORA new"), result.stderr


def test_torch_save(tmp_path):
    model = trained()
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), logits(model))


# ----------------------------------------------------------------------------------------------------------- describing


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_status(name):
    model = add_trained(trained(name, encoder_layers=0), "other", encoder_layers=0)
    layers = model.get_layer_status()
    assert [status.name for status in layers] == [n.removeprefix("base_model.") for n in fvae_layers(model)]
    for status in layers:
        assert status.module_type == "fvae.FVAELinear" and status.enabled and status.merged_adapters == []
        assert status.active_adapters == ["default"] and status.available_adapters == ["default", "other"]
        assert status.requires_grad == {"default": True, "other": False}
        assert status.devices == {"default": ["cpu"], "other": ["cpu"]} and status.quantization_backend is None
    status = model.get_model_status()
    assert (status.adapter_model_type, status.num_adapter_layers) == ("FVAELoraModel", len(layers))
    assert status.peft_types == {"default": "FVAE_LORA", "other": "FVAE_LORA"} and status.enabled is True
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.merge_adapter(adapter_names=["default"])
    assert model.get_model_status().merged_adapters == ["default"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


def test_print():
    text = repr(trained("gpt2"))
    assert text.startswith("PeftModel(") and text.count("fvae.FVAELinear(") == 1 and "2 x GPT2Block" in text
    for part in (
        "(base_layer): Conv1D(nf=96, nx=32)",
        "(default): FactorizedVAE",
        "(default): UpProjection(in_features=4",
    ):
        assert part in text
