"""Time of one optimizer step: the slowest of the GPU's arithmetic, the traffic, and the host that feeds both.

Arithmetic is a roofline of every kernel that a layer runs: its FLOPs at the rate of a matrix product or its bytes at
the rate of memory, whichever is slower; attention at the rate measured for its length.
"""

from __future__ import annotations

from dataclasses import dataclass

from fvae_dist.planning.choice import Choice
from fvae_dist.planning.hardware import Cluster, Gpu, constant
from fvae_dist.planning.subject import LayerTraces, Subject
from fvae_dist.planning.trace import Work
from fvae_dist.planning.traffic import Traffic, estimate_traffic


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and what it is made of.

    Attributes:
        products_s, attention_s, elementwise_s: of the GPU; together its arithmetic.
        host_s: Python that launches kernels and runs DeepSpeed's hooks.
        traffic: all links and collectives.
        tokens: of the step on one GPU.
    """

    products_s: float
    attention_s: float
    elementwise_s: float
    host_s: float
    traffic: Traffic
    tokens: float

    @property
    def compute_s(self) -> float:
        return self.products_s + self.attention_s + self.elementwise_s

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.host_s, self.traffic.seconds) + self.traffic.update_s

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens / self.seconds

    @property
    def bound(self) -> str:
        """What the step would have to be relieved of."""
        if self.traffic.seconds >= max(self.compute_s, self.host_s):
            return self.traffic.bound
        if self.host_s >= self.compute_s:
            return "the host (Python and kernel launches)"
        parts = {"matrix products": self.products_s, "attention": self.attention_s, "memory speed": self.elementwise_s}
        return f"arithmetic, most of it {max(parts, key=lambda name: parts[name])}"


def estimate_step(
    subject: Subject, choice: Choice, cluster: Cluster, accumulation: int, shape: tuple[int, int] | None = None
) -> StepTime:
    """Time of one step of `accumulation` micro-steps.

    Args:
        shape: sequences and mean tokens of each in a micro-batch; default: the longest.
    """
    settings, gpu = subject.settings, cluster.gpu
    sequences, length = shape or (settings.sequences, settings.length)
    traces = subject.traces(choice.gathers, (sequences, length))
    traffic = estimate_traffic(subject, choice, cluster, accumulation)
    products, elementwise, attention = _layers(subject, choice, traces, gpu, length)
    head_products, head_elementwise = _head(subject, gpu, sequences * length)
    copies = 0.0
    if cluster.world_size > 1:
        # DeepSpeed copies every gathered weight out of the buffer it arrived in: read and written.
        copies = 2 * sum(traffic.gathered.values()) * settings.bytes_per_weight / gpu.copy_bytes
    return StepTime(
        products_s=accumulation * (products + head_products),
        attention_s=accumulation * attention,
        elementwise_s=accumulation * (elementwise + head_elementwise) + copies,
        host_s=accumulation * _host(subject, choice, traces) + _host_of_step(choice),
        traffic=traffic,
        tokens=float(accumulation * sequences * length),
    )


def _layers(subject: Subject, choice: Choice, traces: LayerTraces, gpu: Gpu, length: int) -> tuple[float, float, float]:
    """Seconds of all layers in one micro-step: products, elementwise, attention."""
    products = elementwise = attention = 0.0
    adapted = subject.adapted_layers
    for trace, count in ((traces.whole, adapted), (traces.bare, subject.num_layers - adapted)):
        if not count:
            continue
        again = choice.recompute != "none"
        for work, times in ((trace.forward, 1 + again), (trace.backward, 1)):
            of_products, of_others = _kernels(work, gpu)
            products += count * times * of_products
            elementwise += count * times * of_others
        flops = trace.backward.attention_flops
        flops += trace.forward.attention_flops * (1 + (choice.recompute == "full"))
        # Of sequences that are shared, a GPU has some heads of all tokens: the square of their number, not of its part.
        flops *= subject.settings.sequence_parallel
        rate = gpu.attention_flops(subject.settings.attention, length * subject.settings.sequence_parallel)
        attention += count * flops / rate
    return products, elementwise, attention


def _kernels(work: Work, gpu: Gpu) -> tuple[float, float]:
    """Seconds of one pass: kernels that multiply matrices and are bound by it, and all others."""
    products = others = 0.0
    for kernel, count in work.kernels.items():
        rate = gpu.matmul_flops if kernel.is_narrow else gpu.fp32_flops
        arithmetic, memory = kernel.flops / rate, kernel.moved_bytes / gpu.copy_bytes
        if arithmetic >= memory:
            products += count * arithmetic
        else:
            others += count * memory
    return products, others


def _head(subject: Subject, gpu: Gpu, num_tokens: int) -> tuple[float, float]:
    """Seconds of the language-model head and loss: the logits once, or by TRL's head twice, and their gradient."""
    products, passes = (4, 3) if subject.settings.fused_head else (6, 6)
    rate = gpu.matmul_flops if subject.settings.bytes_per_weight <= 2 else gpu.fp32_flops
    logits = num_tokens * subject.vocabulary
    return (
        products * logits * subject.hidden / rate,
        passes * logits * subject.settings.bytes_per_weight / gpu.copy_bytes,
    )


def _host_of_step(choice: Choice) -> float:
    """Seconds of Python in one step, however many micro-steps and tensors it has."""
    more = constant("zero2_host_ms_per_step") if choice.stage in (1, 2) else 0.0
    return 1e-3 * (constant("host_ms_per_step") + more)


def _host(subject: Subject, choice: Choice, traces: LayerTraces) -> float:
    """Seconds of Python in one micro-step. DeepSpeed's hooks for gathers outweigh the launches, which they include."""
    if choice.gathers:
        modules = subject.num_layers * subject.modules_per_layer * constant("zero3_host_ms_per_module")
        tensors = len(subject.trainable_sizes) * constant("zero3_host_ms_per_adapter_tensor")
        return 1e-3 * choice.passes * (modules + tensors)
    kind = {1: "zero2", 2: "zero2", 3: "resident"}.get(choice.stage)
    tensors = len(subject.trainable_sizes) * constant(f"{kind}_host_ms_per_adapter_tensor") if kind else 0.0
    kernels = 0
    for trace, count in (
        (traces.whole, subject.adapted_layers),
        (traces.bare, subject.num_layers - subject.adapted_layers),
    ):
        again = choice.recompute != "none"
        kernels += count * (trace.forward.num_kernels * (1 + again) + trace.backward.num_kernels)
    launches = 1e-6 * constant("host_us_per_kernel") * kernels
    return launches + 1e-3 * tensors
