"""Adapters as the reference code saves them, made from ours by writing our tensors under its names."""

import json

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file

from fvae_dist.adapter import FVAELinear
from fvae_dist.adapter.official import official_name
from tests.models import randomise, tiny_adapter, tiny_model, token_ids

IDS = token_ids()
TARGETS = ["q_proj", "v_proj"]
# An adapter whose update is linear in x, so that LoRA can represent it.
LINEAR = {"encoder_layers": 0, "lora_alpha": 6.0}
# The reference's settings for `tiny_adapter()`.
SETTINGS = {
    "peft_type": "FVAEPEFT",
    "latent_dim": 4,
    "latent_fusion": "concat",
    "enc_num_of_layer": 1,
    "enc_hidden_layer": 8,
    "enc_dropout": 0.1,
    "encoder_use_common_hidden_layer": True,
    "dec_num_of_layer": 2,
    "dec_hidden_layer": 8,
    "dec_dropout": 0.1,
    "z2_latent_mean": 1.5,
    "lambda_downstream": 1000.0,
    "lora_alpha": 16,
    "target_modules": TARGETS,
    "modules_to_save": None,
    "r": 8,
}


def trained(base=None, seed=1, **settings) -> PeftModel:
    """Our adapter on a tiny model, no parameter at its initial value, and its other trained modules changed too."""
    torch.manual_seed(0)
    config = tiny_adapter(**{"target_modules": TARGETS, **settings})
    model = randomise(get_peft_model(tiny_model("llama") if base is None else base, config), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model.eval()


def official_state_dict(model, prefix="base_model.model.", name="") -> dict[str, torch.Tensor]:
    """What the reference would have saved: its names, and the two tensors that it never uses."""
    adapter = f".{name}" if name else ""
    state_dict = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, FVAELinear):
            for key, tensor in layer.state_dict().items():
                if key.startswith("fvae_"):
                    shared = layer.fvae_config["default"].encoder_shared_trunk
                    theirs = official_name(key.replace(".default", ""), shared)
                    theirs = theirs.replace("lora_A", f"lora_A{adapter}").replace("lora_B", f"lora_B{adapter}")
                    state_dict[f"{prefix}{path}.{theirs}"] = tensor.clone()
            r = layer.r["default"]
            state_dict[f"{prefix}{path}.lora_E{adapter}"] = torch.ones(r, 1)
            state_dict[f"{prefix}{path}.ranknum{adapter}"] = torch.tensor([float(r)])
    for path, parameter in model.get_base_model().named_parameters():
        if ".modules_to_save.default." in path:
            state_dict[prefix + path.replace(".modules_to_save.default", "")] = parameter.detach().clone()
    return state_dict


def write_official(folder, model, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(official_state_dict(model), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **settings}))
    return folder


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits
