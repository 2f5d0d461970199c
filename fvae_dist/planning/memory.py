"""Memory of one device at the peak of a training step, part by part.

What is counted is what torch's allocator hands out (`torch.cuda.max_memory_allocated`). A device also holds the CUDA
context, NCCL's buffers and what the allocator keeps without using it: `needed_gib` has them.

The peak falls into one of two moments: a layer's backward pass (after its recomputation), or the loss. Both hold the
shards, the adapters' states and every checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from fvae_dist.planning.choice import Choice
from fvae_dist.planning.hardware import GIB, constant
from fvae_dist.planning.subject import LayerTraces, Subject

# TRL 1.16, kernels/chunked_logprob.py and trainer/utils.py: logits are made in tiles of so many tokens and words.
_LOSS_TOKENS, _LOSS_WORDS = 4096, 32768


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB of one device at its peak.

    Attributes:
        base_weights_gib: the frozen model, or this rank's shard of it.
        hpz_copy_gib: the second shards that keep ZeRO++'s gathers inside a node.
        gathered_weights_gib: frozen weights that are whole at that moment.
        adapter_states_gib: adapter parameters, their shards, gradients, master copy and Adam's moments.
        checkpoints_gib: what recomputation starts from, of all layers.
        layer_activations_gib: the base's activations: of the layer at work, or of all without recomputation.
        adapter_activations_gib: what the adapters add to them.
        attention_gib: what attention keeps for its backward pass beyond its inputs' own users.
        loss_gib: logits' tile, the head's input and its gradient.
        communication_gib: the buckets of gathers and reductions.
        moment: which part of the step the peak falls into.
    """

    base_weights_gib: float
    hpz_copy_gib: float
    gathered_weights_gib: float
    adapter_states_gib: float
    checkpoints_gib: float
    layer_activations_gib: float
    adapter_activations_gib: float
    attention_gib: float
    loss_gib: float
    communication_gib: float
    moment: str

    @property
    def parts(self) -> dict[str, float]:
        return {field.name.removesuffix("_gib"): getattr(self, field.name) for field in fields(self)[:-1]}

    @property
    def total_gib(self) -> float:
        return sum(self.parts.values())

    @property
    def needed_gib(self) -> float:
        """What the device must have."""
        return self.total_gib * (1 + constant("fragmentation")) + constant("context_gib")


def estimate_memory(subject: Subject, choice: Choice, world_size: int, *, on_cpu: bool = False) -> MemoryEstimate:
    """The estimate for one device of `world_size`.

    Args:
        on_cpu: plain torch in the place of the loss's Triton kernels.
    """
    always = _always(subject, choice, world_size)
    moments = [_in_backward(subject, choice, world_size), _in_loss(subject, choice, world_size, on_cpu)]
    estimates = [MemoryEstimate(**{key: value / GIB for key, value in (always | m).items()}, moment=name)
                 for name, m in moments]
    return max(estimates, key=lambda estimate: estimate.total_gib)


def host_memory_gib(subject: Subject, choice: Choice, world_size: int, gpus_per_node: int) -> float:
    """Host memory of one node for weights that are offloaded to it."""
    if choice.offload != "cpu":
        return 0.0
    return subject.base_parameters * subject.settings.bytes_per_weight * min(gpus_per_node / world_size, 1.0) / GIB


def _always(subject: Subject, choice: Choice, world_size: int) -> dict[str, float]:
    """Bytes that are there all the time."""
    width = subject.settings.bytes_per_weight
    base = subject.base_parameters * width
    shard = base / world_size if choice.is_zero3 else base
    hidden = subject.settings.num_tokens * subject.hidden * width
    traces = subject.traces(choice.is_zero3)
    per_layer = {"none": 0.0, "full": hidden, "selective": hidden + traces.whole.attention_bytes}[choice.recompute]
    return {
        "base_weights_gib": 0.0 if choice.offload else shard + _persistent(subject, choice, world_size),
        "hpz_copy_gib": base / choice.hpz if choice.hpz > 1 else 0.0,
        "adapter_states_gib": adapter_bytes(subject, choice, world_size),
        "checkpoints_gib": per_layer * subject.num_layers,
        "communication_gib": _buckets(subject, choice, world_size),
    }


def adapter_bytes(subject: Subject, choice: Choice, world_size: int) -> float:
    """Bytes of the adapters' fp32 parameters and of all that belongs to them, on one rank.

    Read in deepspeed 0.19.8, runtime/zero/stage3.py and stage_1_and_2.py.
    """
    elements = subject.trainable_parameters
    if choice.stage == 3:
        threshold = choice.size("stage3_param_persistence_threshold")
        whole = sum(size for size in subject.trainable_sizes if size <= threshold) if world_size > 1 else 0
        # Shard, master copy, accumulated gradient, two moments.
        return 4.0 * whole + 20.0 * elements / world_size
    if choice.deepspeed is not None and choice.stage > 0:
        gradient = 4.0 * elements if choice.stage == 1 else 4.0 * elements / world_size
        return 4.0 * elements + gradient + 12.0 * elements / world_size  # parameter; master copy and two moments
    return 16.0 * elements  # parameter, gradient, two moments


def _persistent(subject: Subject, choice: Choice, world_size: int) -> float:
    """Bytes of frozen tensors so small that every rank keeps them whole."""
    if not choice.is_zero3 or world_size == 1:
        return 0.0
    threshold = choice.size("stage3_param_persistence_threshold")
    return sum(s for s in subject.base_sizes if s <= threshold) * subject.settings.bytes_per_weight


def _buckets(subject: Subject, choice: Choice, world_size: int) -> float:
    """Bytes of the gradient bucket (fp32), and at stage 3 of the buffer that a gather arrives in."""
    if choice.deepspeed is None:
        return 4.0 * subject.trainable_parameters if world_size > 1 else 0.0
    bucket = 4.0 * choice.size("reduce_bucket_size")
    if not choice.is_zero3:
        # Two of them where reduction overlaps with the backward pass.
        return bucket * (2 if choice.zero.get("overlap_comm") else 1)
    return bucket + gather_buffer_size(subject, choice, world_size) * subject.settings.bytes_per_weight


def gather_buffer_size(subject: Subject, choice: Choice, world_size: int) -> float:
    """Elements of one coalesced gather: the prefetch bucket, filled up by one matrix more."""
    if world_size == 1:
        return 0.0
    bucket = choice.size("stage3_prefetch_bucket_size") + max(subject.layer_sizes)
    return float(min(bucket, subject.num_layers * sum(subject.layer_sizes)))


def gathered_size(subject: Subject, choice: Choice, world_size: int) -> float:
    """Elements of frozen weights that are whole at a time under ZeRO-3.

    DeepSpeed's prefetch runs ahead with every submodule until `stage3_max_live_parameters` are whole
    (partitioned_param_coordinator.py); a layer's own weights are gathered whatever that says.
    """
    if not choice.is_zero3 or (world_size == 1 and not choice.offload):
        return 0.0
    threshold = choice.size("stage3_param_persistence_threshold")
    gatherable = sum(size for size in subject.base_sizes if size > threshold)
    live = max(choice.size("stage3_max_live_parameters"), max(subject.layer_sizes))
    return float(min(live, gatherable))


def _in_backward(subject: Subject, choice: Choice, world_size: int) -> tuple[str, dict[str, float]]:
    traces = subject.traces(choice.is_zero3)
    bare, adapted, whole = (_layers_peak(subject, choice, traces, n) for n in ("bare", "adapted", "whole"))
    gathered = gathered_size(subject, choice, world_size) * subject.settings.bytes_per_weight
    parts = {
        "gathered_weights_gib": gathered,
        "layer_activations_gib": bare,
        "adapter_activations_gib": adapted - bare,
        "attention_gib": whole - adapted,
        "loss_gib": 0.0,
    }
    return "a layer's backward pass", parts


def _layers_peak(subject: Subject, choice: Choice, traces: LayerTraces, which: str) -> float:
    """Bytes of activations when a layer's backward pass is at its peak."""
    layer = getattr(traces, which)
    return layer.peak_bytes + _saved_by_others(subject, choice, traces, which, subject.num_layers - 1)


def _saved_by_others(subject: Subject, choice: Choice, traces: LayerTraces, which: str, num_layers: int) -> float:
    """What `num_layers` layers that are not at work keep beside their checkpoints."""
    if choice.recompute != "none":
        return 0.0
    adapted = min(subject.adapted_layers, num_layers) if which != "bare" else 0
    return adapted * getattr(traces, which).saved_bytes + (num_layers - adapted) * traces.bare.saved_bytes


def _in_loss(subject: Subject, choice: Choice, world_size: int, on_cpu: bool) -> tuple[str, dict[str, float]]:
    settings = subject.settings
    width = settings.bytes_per_weight
    traces = subject.traces(choice.is_zero3)
    hidden = settings.num_tokens * subject.hidden
    tile = min(settings.num_tokens, _LOSS_TOKENS) * _LOSS_WORDS * width
    if on_cpu:  # five fp32 copies of the words that there are
        tile += 20 * min(settings.num_tokens, _LOSS_TOKENS) * min(subject.vocabulary, _LOSS_WORDS)
    # The final hidden state, its labelled tokens, their gradient in fp32 and in the base's dtype.
    loss = hidden * (3 * width + 4) + tile
    bare, adapted, whole = (
        _saved_by_others(subject, choice, traces, which, subject.num_layers) for which in ("bare", "adapted", "whole")
    )
    gathered = gathered_size(subject, choice, world_size)
    if gathered:
        gathered += max(subject.head_size or subject.embedding_size, 0)  # TRL gathers the head beside the rest
    parts = {
        "gathered_weights_gib": gathered * width,
        "layer_activations_gib": bare + traces.bare.norm_bytes / 2,  # the final norm's input in fp32
        "adapter_activations_gib": adapted - bare,
        "attention_gib": whole - adapted,
        "loss_gib": loss,
    }
    return "the loss", parts
