"""Operations of a training step on a Llama with a frozen base and adapters.

N: parameters of the base's linear layers (the output head among them, the input embedding not). T: tokens of the one
sequence. Attention is causal: each of its two products takes 2 T^2 heads head_dim operations a layer, half of them
masked away, so that its forward is 2 T^2 heads head_dim a layer.

Model operations (MFU): 4 N T, for the forward's products and the gradients of their inputs, since frozen weights get
none; and three times attention's forward, its backward counted as twice the forward. No recomputation, no adapter.

Hardware operations: what runs. With recomputation 2 N T and attention's forward once more; attention's backward at 2.5
times its forward (flash attention computes five products there); and the adapters' own products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides the operations of a step."""

    linear_parameters: int
    layers: int
    heads: int
    head_dim: int

    def attention_forward(self, tokens: int) -> float:
        return self.layers * attention_forward(tokens, self.heads, self.head_dim)

    def attention_operations(self, tokens: int, recompute: bool) -> float:
        """What runs of attention: flash attention's five products in the backward, and the forward again."""
        return (4.5 if recompute else 3.5) * self.attention_forward(tokens)

    def model_operations(self, tokens: int) -> float:
        return 4.0 * self.linear_parameters * tokens + 3 * self.attention_forward(tokens)

    def hardware_operations(self, tokens: int, recompute: bool, adapters: float) -> float:
        products = (6.0 if recompute else 4.0) * self.linear_parameters * tokens
        return products + self.attention_operations(tokens, recompute) + adapters


def size_of(model: Any) -> ModelSize:
    """Of a base model, before it has adapters; on any device."""
    config = model.config
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    parameters = sum(linear.in_features * linear.out_features for linear in linears)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelSize(parameters, config.num_hidden_layers, heads, head_dim)


def attention_forward(tokens: int, heads: int, head_dim: int) -> float:
    """Operations of one layer's causal attention, forward."""
    return 2.0 * tokens**2 * heads * head_dim
