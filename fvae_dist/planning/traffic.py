"""What one optimizer step moves: inside a node, between nodes, and from host memory.

A ring gather hands every rank what the others hold: of P bytes over W ranks each receives (W - 1) / W P, and into a
node of g GPUs comes (n - 1) / n P, a g-th of it through each GPU's network adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from fvae_dist.planning.choice import Choice
from fvae_dist.planning.hardware import Cluster, constant
from fvae_dist.planning.subject import Subject

# A quantised gather sends int8 and a fp32 scale for every block of weights.
_QUANTISED_BYTES = 1.02


@dataclass(frozen=True)
class Traffic:
    """One optimizer step of one GPU. Bytes are received ones.

    Attributes:
        gathered: elements gathered by pass (forward, recompute, backward), of all micro-steps.
        in_node_bytes, between_nodes_bytes: of gathers and reductions together.
        host_bytes: over PCIe, from host memory.
        nvme_bytes: of the whole node, from its drives.
        in_node_s, between_nodes_s, host_s: what each link takes for it.
        latency_s: start and hops of all collectives.
        update_s: of that, what comes after the last backward pass and overlaps with nothing.
    """

    gathered: dict[str, float]
    in_node_bytes: float
    between_nodes_bytes: float
    host_bytes: float
    nvme_bytes: float
    in_node_s: float
    between_nodes_s: float
    host_s: float
    latency_s: float
    update_s: float

    @property
    def seconds(self) -> float:
        """Links work side by side; hops come on top of the busiest."""
        return max(self.in_node_s, self.between_nodes_s, self.host_s) + self.latency_s

    @property
    def bound(self) -> str:
        times = {
            "traffic inside the node": self.in_node_s,
            "traffic between nodes": self.between_nodes_s,
            "weights from the drives" if self.nvme_bytes else "weights from host memory": self.host_s,
            "latency of collectives": self.latency_s,
        }
        return max(times, key=lambda name: times[name])


def estimate_traffic(subject: Subject, choice: Choice, cluster: Cluster, accumulation: int) -> Traffic:
    """Traffic of one optimizer step of `accumulation` micro-steps."""
    gathered = {name: accumulation * size for name, size in gathered_by_pass(subject, choice).items()}
    width = _QUANTISED_BYTES if choice.has_quantised_gathers else subject.settings.bytes_per_weight
    weights = sum(gathered.values()) * width if cluster.world_size > 1 else 0.0
    ranks, nodes = _ring_of_gathers(choice, cluster)
    gradients, parameters = _adapter_bytes(subject, choice, accumulation)
    adapters = gradients + parameters
    inside = weights * (ranks - 1) / ranks + adapters * (cluster.world_size - 1) / cluster.world_size
    across = _between(weights, nodes, cluster) + _between(adapters, cluster.nodes, cluster)
    shard = sum(gathered.values()) * subject.settings.bytes_per_weight / cluster.world_size if choice.offload else 0.0
    nvme = shard * cluster.gpus_per_node if choice.offload == "nvme" else 0.0
    gpu = cluster.gpu
    update = parameters * (cluster.world_size - 1) / cluster.world_size
    return Traffic(
        gathered=gathered,
        in_node_bytes=inside,
        between_nodes_bytes=across,
        host_bytes=shard,
        nvme_bytes=nvme,
        in_node_s=inside / gpu.in_node_bytes,
        between_nodes_s=across / gpu.network_bytes,
        host_s=max(shard / gpu.pcie_bytes, nvme / (constant("nvme_gb_s") * 1e9)),
        latency_s=_num_gathers(subject, choice, cluster, accumulation) * _ring_latency_s(ranks, nodes),
        update_s=max(update / gpu.in_node_bytes, _between(parameters, cluster.nodes, cluster) / gpu.network_bytes)
        + _ring_latency_s(cluster.world_size, cluster.nodes),
    )


def gathered_by_pass(subject: Subject, choice: Choice) -> dict[str, float]:
    """Elements of frozen weights that a rank gathers in one micro-step, by pass."""
    if not choice.gathers:
        return {"forward": 0.0, "recompute": 0.0, "backward": 0.0}
    threshold = choice.size("stage3_param_persistence_threshold")
    all_weights = sum(size for size in subject.base_sizes if size > threshold)
    head = subject.head_size or subject.embedding_size  # a tied one is gathered where it is used
    layers = all_weights - subject.embedding_size - subject.head_size
    recompute = float(layers) if choice.recompute != "none" else 0.0
    # What the end of a layer's recomputation gathered is still there when its backward pass begins.
    layer = sum(size for size in subject.layer_sizes if size > threshold)
    kept = min(choice.size("stage3_max_reuse_distance") / 2, layer) * subject.num_layers if recompute else 0.0
    return {
        "forward": float(layers + subject.embedding_size + head),
        "recompute": recompute,
        "backward": max(layers - kept, 0.0) + head,
    }


def _ring_of_gathers(choice: Choice, cluster: Cluster) -> tuple[int, int]:
    """Ranks and nodes that a gather of frozen weights runs over."""
    if choice.hpz > 1:
        ranks = min(choice.hpz, cluster.world_size)
        return ranks, max(1, ranks // cluster.gpus_per_node)
    return cluster.world_size, cluster.nodes


def _adapter_bytes(subject: Subject, choice: Choice, accumulation: int) -> tuple[float, float]:
    """Bytes of gradients that are reduced, and of parameters gathered after the step; fp32."""
    size = 4.0 * subject.trainable_parameters
    if choice.stage in (2, 3):
        return accumulation * size, size
    return (size, size) if choice.stage == 1 else (2 * size, 0.0)  # an all-reduce is both halves


def _between(num_bytes: float, nodes: int, cluster: Cluster) -> float:
    """Bytes through one GPU's network adapter."""
    return num_bytes * (nodes - 1) / nodes / cluster.gpus_per_node


def _num_gathers(subject: Subject, choice: Choice, cluster: Cluster, accumulation: int) -> int:
    """Collectives of one step: coalesced into prefetch buckets, which are filled up by one tensor more."""
    if cluster.world_size == 1:
        return 0
    reductions = max(1, round(subject.trainable_parameters / max(choice.size("reduce_bucket_size"), 1)))
    if not choice.gathers:
        return reductions * accumulation + choice.is_zero3  # resident weights' adapters are gathered in one piece
    bucket, threshold = choice.size("stage3_prefetch_bucket_size"), choice.size("stage3_param_persistence_threshold")
    per_layer = filled = 0
    for size in subject.layer_sizes:
        if size > threshold:
            per_layer += filled == 0
            filled = 0 if filled + size >= bucket else filled + size
    return accumulation * (choice.passes * subject.num_layers * per_layer + 3 + reductions)


def _ring_latency_s(ranks: int, nodes: int) -> float:
    """Of one gather. NCCL's own model: src/graph/tuning.cc, (steps - inter) * intra + inter * inter-node latency."""
    if ranks == 1:
        return 0.0
    hops = (ranks - nodes) * constant("ring_hop_in_node_us") + (nodes - 1) * constant("ring_hop_between_nodes_us")
    return 1e-6 * (constant("collective_start_us") + hops)
