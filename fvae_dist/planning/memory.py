"""A first estimate of a training step's device memory, part by part, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB per device. Allocator fragmentation and the CUDA context (about 1 GiB) come on top."""

    base_weights_gib: float
    gathered_weights_gib: float
    adapter_states_gib: float
    activations_gib: float

    @property
    def total_gib(self) -> float:
        return self.base_weights_gib + self.gathered_weights_gib + self.adapter_states_gib + self.activations_gib


def estimate_memory(
    text_config: Any,
    *,
    base_parameters: int,
    trainable_parameters: int,
    bytes_per_weight: int,
    num_tokens: int,
    stage: int,
    world_size: int,
    checkpointing: bool,
) -> MemoryEstimate:
    """Estimate one device's memory for a forward and backward pass.

    Args:
        text_config: the base model's configuration (hidden_size, intermediate_size, num_hidden_layers, vocab_size).
        base_parameters: frozen parameters.
        trainable_parameters: adapter parameters, kept whole as fp32 on every device (sharded states at stage >= 1).
        bytes_per_weight: of the base's dtype.
        num_tokens: tokens of one micro-batch on one device.
        stage: ZeRO stage.
        checkpointing: one decoder layer's activations live at a time, plus every layer's input.

    Returns:
        The estimate; the fused language-model head is taken to need one chunk of logits only.
    """
    hidden = text_config.hidden_size
    intermediate = getattr(text_config, "intermediate_size", None) or 4 * hidden
    layers = text_config.num_hidden_layers
    embedding = hidden * text_config.vocab_size
    num_embeddings = 1 if getattr(text_config, "tie_word_embeddings", False) else 2
    one_layer = max(base_parameters - num_embeddings * embedding, 0) / max(layers, 1)
    shards = world_size if stage == 3 else 1
    optimizer_shards = world_size if stage >= 1 else 1
    # Saved per token and layer: norms, q/k/v/o and attention output about 8 hidden, the gated MLP about 4
    # intermediate; each adapter's fp32 likelihood about 3 hidden of 4 bytes, two adapters.
    per_layer = num_tokens * ((8 * hidden + 4 * intermediate) * bytes_per_weight + 6 * hidden * 4)
    checkpoints = num_tokens * hidden * bytes_per_weight * layers
    return MemoryEstimate(
        base_weights_gib=base_parameters * bytes_per_weight / shards / GIB,
        gathered_weights_gib=(max(2 * one_layer, embedding) * bytes_per_weight / GIB) if stage == 3 else 0.0,
        # parameter + gradient, then master, two moments and accumulated gradient.
        adapter_states_gib=trainable_parameters * (8 + 16 / optimizer_shards) / GIB,
        activations_gib=(per_layer + checkpoints if checkpointing else per_layer * layers) / GIB,
    )
