"""Memory of one device at the peak of a training step, part by part.

What is counted is what torch's allocator hands out (`torch.cuda.max_memory_allocated`). A device also holds the CUDA
context, NCCL's buffers and what the allocator keeps without using it: `needed_gib` has them.

The peak falls into one of three moments: a layer's backward pass (after its recomputation), the loss, or the
optimizer's step. All hold the shards and the adapters' states, the first two every checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from fvae_dist.kernels.head import LOGITS_BYTES
from fvae_dist.planning.choice import Choice
from fvae_dist.planning.hardware import GIB, constant
from fvae_dist.planning.subject import LayerTraces, Subject

# TRL 1.16, kernels/chunked_logprob.py and trainer/utils.py: logits are made in tiles of so many tokens and words.
_LOSS_TOKENS, _LOSS_WORDS = 4096, 32768


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB of one device at its peak.

    Attributes:
        base_weights_gib: the frozen model, or this rank's shard of it; resident weights keep no shard.
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
        return {name: getattr(self, f"{name}_gib") for name in PARTS}

    @property
    def total_gib(self) -> float:
        return sum(self.parts.values())

    @property
    def needed_gib(self) -> float:
        """What the device must have."""
        return self.total_gib * (1 + constant("fragmentation")) + constant("context_gib")


PARTS = tuple(field.name.removesuffix("_gib") for field in fields(MemoryEstimate) if field.name != "moment")


def estimate_memory(subject: Subject, choice: Choice, world_size: int) -> MemoryEstimate:
    """The estimate for one device of `world_size`."""
    return max(estimate_moments(subject, choice, world_size), key=lambda estimate: estimate.total_gib)


def estimate_moments(subject: Subject, choice: Choice, world_size: int) -> list[MemoryEstimate]:
    """The three moments that can be the peak: a layer's backward pass, the loss, the optimizer's step."""
    always = _always(subject, choice, world_size)
    estimates = []
    for moment, parts in (
        ("a layer's backward pass", _in_backward(subject, choice, world_size)),
        ("the loss", _in_loss(subject, choice, world_size)),
        ("the optimizer's step", _in_step(subject, choice, world_size)),
    ):
        sizes = {f"{name}_gib": (always | parts)[name] / GIB for name in PARTS}
        estimates.append(MemoryEstimate(**sizes, moment=moment))
    return estimates


def host_memory_gib(subject: Subject, choice: Choice, world_size: int, gpus_per_node: int) -> float:
    """Host memory of one node for what is offloaded to it: weights, what the backward pass needs."""
    weights = activations = 0.0
    if choice.offload == "cpu":
        weights = subject.base_parameters * subject.settings.bytes_per_weight * min(gpus_per_node / world_size, 1.0)
    if subject.settings.activation_offload:
        kept = _input_bytes(subject, choice) * subject.num_layers
        kept += _saved_by_all(subject, choice, subject.traces(choice.gathers), "whole", subject.num_layers)
        activations = kept * min(gpus_per_node, world_size)
    return (weights + activations) / GIB


def _always(subject: Subject, choice: Choice, world_size: int) -> dict[str, float]:
    """Bytes that are there all the time."""
    width = subject.settings.bytes_per_weight
    base = subject.base_parameters * width
    shard = base / world_size if choice.gathers else base
    return {
        "base_weights": 0.0 if choice.offload else shard + _persistent(subject, choice, world_size),
        "hpz_copy": base / choice.hpz if choice.hpz > 1 else 0.0,
        "adapter_states": adapter_bytes(subject, choice, world_size),
        "checkpoints": _checkpoint_bytes(subject, choice),
        "communication": _buckets(subject, choice, world_size),
    }


def _checkpoint_bytes(subject: Subject, choice: Choice) -> float:
    """What recomputation starts from, on the device: of all layers, or of the one that is at work.

    TRL's offload (1.16, models/activation_offloading.py) brings one input back at a time, and has let go of the five
    that wait for their copies in the forward pass before the peak in the backward pass. What selective recomputation
    keeps of attention is in torch's own store, past the hooks that offload.
    """
    num_layers = subject.num_layers
    num_inputs = 1 if subject.settings.activation_offload else num_layers
    attention = subject.traces(choice.gathers).whole.attention_bytes if choice.recompute == "selective" else 0
    return _input_bytes(subject, choice) * num_inputs + attention * num_layers


def _input_bytes(subject: Subject, choice: Choice) -> float:
    return subject.traces(choice.gathers).whole.input_bytes if choice.recompute != "none" else 0.0


def adapter_bytes(subject: Subject, choice: Choice, world_size: int) -> float:
    """Bytes of the adapters' fp32 parameters and of all that belongs to them, on one rank.

    Read in deepspeed 0.19.8, runtime/zero/stage3.py and stage_1_and_2.py.
    """
    elements = subject.trainable_parameters
    if choice.stage == 3:
        threshold = choice.size("stage3_param_persistence_threshold")
        sizes = (size for size in subject.trainable_sizes if choice.resident or size <= threshold)
        whole = sum(sizes) if world_size > 1 else 0
        # Shard, master copy, accumulated gradient, two moments.
        return 4.0 * whole + 20.0 * elements / world_size
    if choice.deepspeed is not None and choice.stage > 0:
        gradient = 4.0 * elements if choice.stage == 1 else 4.0 * elements / world_size
        return 4.0 * elements + gradient + 12.0 * elements / world_size  # parameter; master copy and two moments
    return 16.0 * elements  # parameter, gradient, two moments


def _persistent(subject: Subject, choice: Choice, world_size: int) -> float:
    """Bytes of frozen tensors so small that every rank keeps them whole."""
    if not choice.gathers or world_size == 1:
        return 0.0
    threshold = choice.size("stage3_param_persistence_threshold")
    return sum(s for s in subject.base_sizes if s <= threshold) * subject.settings.bytes_per_weight


def _buckets(subject: Subject, choice: Choice, world_size: int) -> float:
    """Bytes of the gradient bucket (fp32), and at stage 3 of the buffer that a gather arrives in."""
    if choice.deepspeed is None:
        return 4.0 * subject.trainable_parameters if world_size > 1 else 0.0
    bucket = 4.0 * choice.size("reduce_bucket_size")
    if choice.is_zero3:
        return bucket + _gather_buffer_size(subject, choice, world_size) * subject.settings.bytes_per_weight
    # Two of them where reduction overlaps with the backward pass.
    return bucket * (2 if choice.zero.get("overlap_comm") else 1)


def _gather_buffer_size(subject: Subject, choice: Choice, world_size: int) -> float:
    """Elements of one coalesced gather: the prefetch bucket, filled up by one matrix more."""
    if world_size == 1:
        return 0.0
    bucket = choice.size("stage3_prefetch_bucket_size") + max(subject.layer_sizes)
    return float(min(bucket, live_size(subject, choice, world_size)))


def live_size(subject: Subject, choice: Choice, world_size: int) -> float:
    """Elements of frozen weights that are whole, or on their way, at a time under ZeRO-3.

    DeepSpeed's prefetch runs ahead with every submodule until `stage3_max_live_parameters` are whole
    (partitioned_param_coordinator.py); a layer's own weights are gathered whatever that says.
    """
    if not choice.gathers or (world_size == 1 and not choice.offload):
        return 0.0
    threshold = choice.size("stage3_param_persistence_threshold")
    gatherable = sum(size for size in subject.base_sizes if size > threshold)
    live = max(choice.size("stage3_max_live_parameters"), max(subject.layer_sizes))
    return float(min(live, gatherable))


def _gathered_bytes(subject: Subject, choice: Choice, world_size: int) -> float:
    """Bytes of the live weights that are not in the gather's buffer."""
    live = live_size(subject, choice, world_size) - _gather_buffer_size(subject, choice, world_size)
    return live * subject.settings.bytes_per_weight


def _in_backward(subject: Subject, choice: Choice, world_size: int) -> dict[str, float]:
    traces = subject.traces(choice.gathers)
    bare, adapted, whole = (_layers_peak(subject, choice, traces, n) for n in ("bare", "adapted", "whole"))
    return {
        "gathered_weights": _gathered_bytes(subject, choice, world_size),
        "layer_activations": bare,
        "adapter_activations": adapted - bare,
        "attention": whole - adapted,
        "loss": 0.0,
    }


def _layers_peak(subject: Subject, choice: Choice, traces: LayerTraces, which: str) -> float:
    """Bytes of activations when a layer's backward pass is at its peak."""
    layer = getattr(traces, which)
    return layer.peak_bytes + _saved_by_others(subject, choice, traces, which, subject.num_layers - 1)


def _saved_by_others(subject: Subject, choice: Choice, traces: LayerTraces, which: str, num_layers: int) -> float:
    """What `num_layers` layers that are not at work keep on the device beside their checkpoints."""
    if subject.settings.activation_offload:  # a few tensors: of one layer, at most
        num_layers = min(num_layers, 1)
    return _saved_by_all(subject, choice, traces, which, num_layers)


def _saved_by_all(subject: Subject, choice: Choice, traces: LayerTraces, which: str, num_layers: int) -> float:
    if choice.recompute != "none":
        return 0.0
    adapted = min(subject.adapted_layers, num_layers) if which != "bare" else 0
    return adapted * getattr(traces, which).saved_bytes + (num_layers - adapted) * traces.bare.saved_bytes


def _in_loss(subject: Subject, choice: Choice, world_size: int) -> dict[str, float]:
    settings = subject.settings
    width = settings.bytes_per_weight
    traces = subject.traces(choice.gathers)
    hidden = settings.num_tokens * subject.hidden
    tokens = min(settings.num_tokens, _LOSS_TOKENS)
    if settings.fused_head:
        tile = min(settings.num_tokens * subject.vocabulary * width, LOGITS_BYTES)
    elif settings.on_cpu:  # no Triton kernels: as much of the tile as is written to, and five fp32 copies of it
        tile = tokens * min(subject.vocabulary, _LOSS_WORDS) * (width + 20)
    else:
        tile = tokens * _LOSS_WORDS * width
    # The final hidden state, its labelled tokens, their gradient: kept and passed on, or in fp32 and the base's dtype.
    loss = hidden * (4 * width if settings.fused_head else 3 * width + 4) + tile
    bare, adapted, whole = (
        _saved_by_others(subject, choice, traces, which, subject.num_layers) for which in ("bare", "adapted", "whole")
    )
    gathered = _gathered_bytes(subject, choice, world_size)
    if gathered:
        gathered += (subject.head_size or subject.embedding_size) * width  # the head is gathered beside the rest
    return {
        "gathered_weights": gathered,
        "layer_activations": bare + traces.bare.norm_bytes / 2,  # the final norm's input in fp32
        "adapter_activations": adapted - bare,
        "attention": whole - adapted,
        "loss": loss,
    }


def _in_step(subject: Subject, choice: Choice, world_size: int) -> dict[str, float]:
    """Activations are gone; the gradients are put in one piece, and AdamW works on two copies of it."""
    shards = world_size if choice.stage > 0 else 1
    states = adapter_bytes(subject, choice, world_size) + 12.0 * subject.trainable_parameters / shards
    unused = ("gathered_weights", "checkpoints", "layer_activations", "adapter_activations", "attention", "loss")
    return {"adapter_states": states} | dict.fromkeys(unused, 0.0)
