"""Every way of running a recipe on a cluster, the one to take, and how it scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fvae_dist.planning.choice import Choice, Recompute
from fvae_dist.planning.hardware import Cluster, constant
from fvae_dist.planning.memory import MemoryEstimate, estimate_memory, host_memory_gib
from fvae_dist.planning.subject import Subject
from fvae_dist.planning.timing import StepTime, estimate_step

# A choice is worth a change of the recipe if it is faster than this.
_WORTH_A_CHANGE = 1.03
LARGEST_WORLD = 1024  # of the curve
_LARGEST_KNEE = 2**14  # nodes

MakeChoice = Callable[[str, Recompute, bool, Cluster], Choice]
Key = tuple[str, Recompute, bool]


@dataclass(frozen=True)
class Load:
    """What a step works on.

    Attributes:
        accumulation: micro-steps of a step.
        sequences, mean_length: of a micro-batch, for the time; memory is planned for the longest. With sequence
            parallelism of one GPU's part; its exchange of tokens for heads is not counted.
        epoch_sequences, epoch_tokens: of one epoch over the data, None where it is not known.
    """

    accumulation: int
    sequences: int
    mean_length: int
    epoch_sequences: int | None = None
    epoch_tokens: int | None = None
    sequence_parallel: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.sequences, self.mean_length


@dataclass(frozen=True)
class Option:
    """One choice, planned.

    Attributes:
        over_gib: what it lacks of the GPU's memory; negative: what is left.
        host_gib: host memory of one node for what is offloaded to it.
        host_over_gib: what the node lacks of it, by the memory that nodes are assumed to have.
    """

    choice: Choice
    memory: MemoryEstimate
    step: StepTime
    over_gib: float
    host_gib: float
    host_over_gib: float

    @property
    def fits(self) -> bool:
        return self.over_gib <= 0 and self.host_over_gib <= 0

    @property
    def lack(self) -> str:
        """By how much it does not fit."""
        if self.over_gib > 0:
            return f"does not fit by {self.over_gib:.1f} GiB"
        return f"does not fit by {self.host_over_gib:.0f} GiB of the node's memory"


@dataclass(frozen=True)
class Epoch:
    """One pass over the data."""

    steps: int
    tokens: int
    hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Point:
    """One number of nodes of the scaling curve.

    Attributes:
        efficiency: speed of a GPU, of the best one that fits.
        traffic_share: time of the traffic, of the time of what hides it; above 1 it is hidden no longer.
    """

    nodes: int
    world_size: int
    fits: bool
    needed_gib: float
    tokens_per_s_per_gpu: float
    efficiency: float
    traffic_share: float
    bound: str


@dataclass(frozen=True)
class Knee:
    """The most nodes on which arithmetic (or the host) still hides the traffic; 0: not even one node does.

    `bound` says what is slower beyond it.
    """

    nodes: int
    world_size: int
    bound: str


def plan_choice(subject: Subject, choice: Choice, cluster: Cluster, load: Load) -> Option:
    """Memory and time of one choice."""
    memory = estimate_memory(subject, choice, cluster.world_size)
    host_gib = host_memory_gib(subject, choice, cluster.world_size, cluster.gpus_per_node)
    return Option(
        choice=choice,
        memory=memory,
        step=estimate_step(subject, choice, cluster, load.accumulation, load.shape),
        over_gib=memory.needed_gib - cluster.gpu.memory_gib,
        host_gib=host_gib,
        host_over_gib=host_gib - constant("host_gib_per_gpu") * cluster.gpus_per_node,
    )


def recommend(options: Iterable[Option], own: Key | None = None) -> Option | None:
    """The fastest that fits; None if none does.

    Of those within 3 % of it the recipe's `own` (its `Choice.key`); else one without offload, with
    the least traffic, with the most room, in this order: what hides traffic on paper does not always hide it.
    """
    fitting = [option for option in options if option.fits]
    if not fitting:
        return None
    fastest = min(option.step.seconds for option in fitting)
    close = [option for option in fitting if option.step.seconds <= _WORTH_A_CHANGE * fastest]
    for option in close:
        if option.choice.key == own:
            return option
    return min(
        close,
        key=lambda option: (option.choice.offload is not None, option.step.traffic.seconds, option.memory.needed_gib),
    )


def epoch_of(option: Option, cluster: Cluster, load: Load) -> Epoch | None:
    """Steps, time and GPU-hours of one epoch; None where the data is not known."""
    if load.epoch_tokens is None:
        return None
    if load.epoch_sequences is not None:
        per_step = load.sequences * load.accumulation * cluster.world_size / load.sequence_parallel
        steps = math.ceil(load.epoch_sequences / per_step)
    else:
        steps = math.ceil(load.epoch_tokens / (option.step.tokens * cluster.world_size))
    hours = steps * option.step.seconds / 3600
    return Epoch(steps, load.epoch_tokens, hours, hours * cluster.world_size)


def scale(
    subject: Subject, option: Option, make: MakeChoice, cluster: Cluster, load: Load, knee: Knee | None = None
) -> list[Point]:
    """The same choice on 1, 2, 4, ... nodes, up to 1024 GPUs, and at the knee and twice beyond it.

    Every GPU keeps its micro-batch (weak scaling).
    """
    counts = {cluster.nodes}
    if knee is not None and knee.nodes:
        counts |= {knee.nodes, 2 * knee.nodes}
    nodes = 1
    while nodes * cluster.gpus_per_node <= LARGEST_WORLD:
        counts.add(nodes)
        nodes *= 2
    planned = [_on_nodes(subject, option, make, cluster, load, nodes) for nodes in sorted(counts)]
    best = max((p.step.tokens_per_s_per_gpu for p in planned if p.fits), default=None)
    best = best or max(p.step.tokens_per_s_per_gpu for p in planned)
    return [
        Point(
            nodes=nodes,
            world_size=nodes * cluster.gpus_per_node,
            fits=found.fits,
            needed_gib=found.memory.needed_gib,
            tokens_per_s_per_gpu=found.step.tokens_per_s_per_gpu,
            efficiency=found.step.tokens_per_s_per_gpu / best,
            traffic_share=_traffic_share(found),
            bound=found.step.bound,
        )
        for nodes, found in zip(sorted(counts), planned)
    ]


def find_knee(subject: Subject, option: Option, make: MakeChoice, cluster: Cluster, load: Load) -> Knee | None:
    """Where the curve bends; None if it does not up to 16,384 nodes."""

    def is_hidden(nodes: int) -> bool:
        return _traffic_share(_on_nodes(subject, option, make, cluster, load, nodes)) <= 1

    # From above by halves: offloaded weights are the better hidden the more nodes share them, until latency takes over.
    hidden, exposed = _LARGEST_KNEE, 2 * _LARGEST_KNEE
    while hidden and not is_hidden(hidden):
        hidden, exposed = hidden // 2, hidden
    if hidden == _LARGEST_KNEE:
        return None
    while exposed - hidden > 1:
        middle = (hidden + exposed) // 2
        hidden, exposed = (middle, exposed) if is_hidden(middle) else (hidden, middle)
    bound = _on_nodes(subject, option, make, cluster, load, hidden + 1).step.bound
    return Knee(hidden, hidden * cluster.gpus_per_node, bound)


def _on_nodes(subject: Subject, option: Option, make: MakeChoice, cluster: Cluster, load: Load, nodes: int) -> Option:
    of_size = replace(cluster, nodes=nodes)
    return plan_choice(subject, make(*option.choice.key, of_size), of_size, load)


def _traffic_share(option: Option) -> float:
    return option.step.traffic.seconds / max(option.step.compute_s, option.step.host_s)
