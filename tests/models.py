"""Tiny random causal language models of the architectures that the tests run on."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fvae_dist import FVAELoraConfig
from fvae_dist.adapter.flat import split_flat

ARCHITECTURES = ("llama", "qwen2", "mistral", "gpt2")
VOCAB_SIZE = 64

_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SIZES = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """A two-layer model of 32 features with weights from seed 0, in evaluation mode; `overrides` go to its config."""
    settings = {"vocab_size": VOCAB_SIZE, **_SIZES[name], **overrides}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings))
    return model.to(dtype).eval()


def tiny_adapter(**settings) -> FVAELoraConfig:
    """An adapter configuration small enough for the models here; `settings` override it."""
    return FVAELoraConfig(**{"r": 4, "encoder_hidden": 8, "decoder_layers": 2, "decoder_hidden": 8, **settings})


def randomise(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Add noise to every adapter parameter, so that nothing about the adapters is zero any more; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in named_parts(model).items():
            if "fvae_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def named_parts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by their names in state dicts, whether flat or not, in that order: views without gradients."""
    found = split_flat(model, {name: parameter.detach() for name, parameter in model.named_parameters()})
    return {name: found[name] for name in model.state_dict() if name in found}


def named_gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of the parameters that have one, by the same names; copies."""
    return split_flat(model, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def token_ids(batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids (batch, length), none of them special."""
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


class LayerModel(nn.Module):
    """A model of one layer, for `side_loss.collect`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)
