"""Tiny models with FVAE-LoRA in them, and what to ask them."""

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from fvae_dist.adapter import FVAELinear
from tests.models import randomise, tiny_adapter, tiny_model, token_ids

IDS = token_ids()


def trained(name: str = "llama", adapter_name: str = "default", model_settings=None, **settings) -> PeftModel:
    """Stands for a model after training, in evaluation mode: no adapter parameter is at its initial value."""
    base = tiny_model(name, **(model_settings or {}))
    torch.manual_seed(0)
    return randomise(get_peft_model(base, tiny_adapter(**settings), adapter_name=adapter_name)).eval()


def add_trained(model: PeftModel, adapter_name: str, seed: int = 2, **settings) -> PeftModel:
    """Add an adapter that has been trained, not active; returns the model."""
    torch.manual_seed(seed)
    model.add_adapter(adapter_name, tiny_adapter(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".fvae_" in name and f".{adapter_name}." in name.split(".fvae_")[1]:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: nn.Module, ids: torch.Tensor = IDS, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def outputs_of(model: PeftModel, names) -> dict[str, torch.Tensor]:
    """Each adapter's logits; leaves the first one active."""
    found = {}
    for name in names:
        model.set_adapter(name)
        found[name] = logits(model)
    model.set_adapter(next(iter(names)))
    return found


def fvae_layers(model: nn.Module) -> dict[str, FVAELinear]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, FVAELinear)}
    assert found
    return found


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def base_weights(model) -> dict[str, torch.Tensor]:
    """Everything that is no adapter, by the name it has without one."""
    state = {name: value.clone() for name, value in model.state_dict().items() if ".fvae_" not in name}
    return {name.removeprefix("base_model.model.").replace(".base_layer", ""): value for name, value in state.items()}


def assert_same_weights(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
