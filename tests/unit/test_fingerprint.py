"""What tells one base model from another."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from fvae_dist.training.fingerprint import base_fingerprint
from fvae_dist.training.recipe import ModelSection
from tests.recipes import make_model_folder


def fingerprint(folder, seed=1, **settings):
    section = ModelSection(name_or_path=str(folder), **settings)
    return base_fingerprint(section, AutoConfig.from_pretrained(folder), seed)


@pytest.fixture
def folder(tmp_path):
    make_model_folder(tmp_path / "model")
    weights = {"a": torch.arange(500_000, dtype=torch.float32), "b": torch.zeros(3)}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_same_folder_has_the_same_fingerprint(folder):
    before = fingerprint(folder)
    assert fingerprint(folder, dtype="float32", attention="eager") == before == fingerprint(folder, seed=2)


@pytest.mark.parametrize("position", [20, 200, -1])
def test_other_weights_have_another(folder, position):
    before = fingerprint(folder)
    flip(folder / "model.safetensors", position)
    assert fingerprint(folder) != before


def test_other_configuration_file_or_seed_has_another(folder):
    seen = {fingerprint(folder)}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    seen.add(fingerprint(folder))
    save_file({"c": torch.ones(1)}, folder / "model-2.safetensors")
    seen.add(fingerprint(folder))
    seen |= {fingerprint(folder, random_weights=True), fingerprint(folder, seed=2, random_weights=True)}
    assert len(seen) == 5
