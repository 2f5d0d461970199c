"""What one decoder layer keeps and does, counted by running it on the meta device.

The recipe's own model and adapter run one layer forward and backward, in milliseconds and without memory: every
storage that an operation makes is counted while it lives, every operation with its FLOPs and the bytes it moves. So a
model or PEFT method that nobody described to the planner is planned like the others, a changed adapter as changed.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fvae_dist.adapter import side_loss
from fvae_dist.adapter.noise import TokenNoise
from fvae_dist.planning.stand_ins import ATTENTION, Kernels, on_meta


class Kernel(NamedTuple):
    """One operation: FLOPs of a product (else 0), bytes read and written, and whether it multiplies 16-bit numbers."""

    flops: float
    moved_bytes: float
    is_narrow: bool


@dataclass
class Work:
    """Operations of one pass: how often each occurs, and attention's FLOPs apart."""

    kernels: Counter[Kernel] = field(default_factory=Counter)
    attention_flops: float = 0.0

    @property
    def num_kernels(self) -> int:
        return self.kernels.total()

    @property
    def flops(self) -> float:
        return sum(kernel.flops * count for kernel, count in self.kernels.items())

    def minus(self, other: Work) -> Work:
        return Work(self.kernels - other.kernels, self.attention_flops - other.attention_flops)


@dataclass(frozen=True)
class LayerTrace:
    """Bytes and work of one decoder layer for one micro-batch.

    Attributes:
        input_bytes: its input, which full recomputation keeps.
        attention_bytes: attention's output and statistics, which selective recomputation keeps.
        saved_bytes: what autograd keeps of it from forward to backward.
        peak_bytes: the most that is alive beside its input while it runs forward, then backward.
        norm_bytes: the most that is alive beside `saved_bytes` in the final norm's backward.
    """

    input_bytes: int
    attention_bytes: int
    saved_bytes: int
    peak_bytes: int
    norm_bytes: int
    forward: Work
    backward: Work


class StorageTracker(TorchDispatchMode):
    """Counts live bytes of meta storages made inside, their peak, and the operations."""

    def __init__(self, existing: list[Tensor]):
        super().__init__()
        self.live = self.peak = self.attention_bytes = 0
        self.work = Work()
        self._known: dict[int, weakref.ref] = {}
        for tensor in existing:
            self._see(tensor, counts=False)

    def restart_peak(self) -> None:
        self.peak = self.live

    def add_attention(self, flops: float, kept_bytes: int) -> None:
        self.work.attention_flops += flops
        self.work.kernels[Kernel(0.0, 0.0, True)] += 1
        self.attention_bytes = max(self.attention_bytes, kept_bytes)

    def add_launch(self, moved_bytes: int) -> None:
        self.work.kernels[Kernel(0.0, float(moved_bytes), True)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_meta]
        makes = [self._see(tensor) for tensor in outputs]
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        # A view makes nothing; an empty tensor is no kernel.
        if outputs and (any(makes) or writes) and "empty" not in func.__name__:
            packet = func._overloadpacket
            if packet in flop_registry:
                flops = flop_registry[packet](*args, **kwargs, out_val=out)
            else:  # experts of a mixture: (rows, D) x (experts, D, O)
                is_grouped = "grouped_mm" in func.__name__ and args[1].dim() == 3
                flops = 2 * args[0].numel() * args[1].shape[-1] if is_grouped else 0
            touched = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] + outputs
            moved = sum(tensor.numel() * tensor.itemsize for tensor in touched)
            self.work.kernels[Kernel(float(flops), float(moved), outputs[0].itemsize <= 2)] += 1
        return out

    def _see(self, tensor: Tensor, counts: bool = True) -> bool:
        """Count the tensor's storage until it dies; False if it was known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return False
        size = storage.nbytes() if counts else 0

        def forget(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)
        return True


def base_of(model: Any) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_layers(model: nn.Module, num_layers: int) -> tuple[nn.Module, str]:
    """The module that holds the decoder layers, and under which name. ValueError if there is none."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                return parent, name
    raise ValueError(f"{type(model).__name__} has no list of {num_layers} layers")


def trace_layer(
    model: nn.Module,
    layer: nn.Module,
    shape: tuple[int, int],
    kernels: Kernels,
    *,
    zero3: bool,
    eager_attention: bool = False,
    attention_memory: bool = True,
) -> LayerTrace:
    """Run one layer of a model on the meta device.

    Args:
        model: a PeftModel or transformers model in training mode.
        layer: one of its decoder layers.
        shape: sequences and tokens of each in a micro-batch.
        zero3: linears keep their inputs, as DeepSpeed's do at stage 3.
        kernels: whose memory the stand-ins take.
        eager_attention: run the model's plain attention, with its T^2 scores, instead of flash attention's stand-in.
        attention_memory: False leaves out what the stand-in keeps and works in.

    Raises:
        Exception: of any kind, from a model that the meta device cannot run.
    """
    run = _Run(model, layer, shape, kernels, zero3, eager_attention, attention_memory)
    once, twice = run(1), run(2)
    return LayerTrace(
        input_bytes=once.input_bytes,
        attention_bytes=once.attention_bytes,
        saved_bytes=twice.saved - once.saved,
        peak_bytes=max(once.forward_peak, once.backward_peak),
        norm_bytes=max(once.norm_peak - (twice.saved - once.saved), 0),
        forward=twice.forward.minus(once.forward),
        backward=twice.backward.minus(once.backward),
    )


@dataclass
class _Counts:
    input_bytes: int = 0
    attention_bytes: int = 0
    saved: int = 0
    forward_peak: int = 0
    norm_peak: int = 0
    backward_peak: int = 0
    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)


class _Run:
    """Runs a backbone of one and the same layer, several times over."""

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        shape: tuple[int, int],
        kernels: Kernels,
        zero3: bool,
        eager_attention: bool,
        attention_memory: bool,
    ):
        base = base_of(model)
        self.model, self.backbone, self.layer, self.shape = model, base.base_model, layer, shape
        self.holder, self.name = find_layers(base, base.config.get_text_config().num_hidden_layers)
        self.kernels, self.zero3 = kernels, zero3
        self.eager, self.attention_memory = eager_attention, attention_memory

    def __call__(self, times: int) -> _Counts:
        all_layers = getattr(self.holder, self.name)
        setattr(self.holder, self.name, nn.ModuleList([self.layer] * times))
        restore = _set_attention(self.backbone, "eager" if self.eager else ATTENTION)
        hidden = self._input()
        counts = _Counts(input_bytes=hidden.numel() * hidden.itemsize)
        tracker = StorageTracker([*self.model.parameters(), *self.model.buffers(), hidden])
        handles = self._watch(tracker, counts)
        try:
            with (
                on_meta(
                    self.kernels,
                    keeps_linear_inputs=self.zero3,
                    attention_memory=self.attention_memory,
                    on_attention=tracker.add_attention,
                    on_launch=tracker.add_launch,
                ),
                tracker,
            ):
                self._forward_backward(hidden, tracker, counts)
        finally:
            setattr(self.holder, self.name, all_layers)
            restore()
            for handle in handles:
                handle.remove()
            for parameter in self.model.parameters():
                parameter.grad = None
        return counts

    def _input(self) -> Tensor:
        width = self.backbone.get_input_embeddings().weight.shape[-1]
        dtype = next(p.dtype for p in self.layer.parameters() if not p.requires_grad)
        return torch.empty((*self.shape, width), dtype=dtype, device="meta", requires_grad=True)

    def _forward_backward(self, hidden: Tensor, tracker: StorageTracker, counts: _Counts) -> None:
        batch, length = self.shape
        tokens = torch.empty((batch, length), dtype=torch.long, device="meta")
        mask = torch.ones((batch, length), device="meta")
        noise = TokenNoise({"input_ids": tokens}, seed=0, step=0)
        arguments: dict[str, Any] = {"inputs_embeds": hidden, "use_cache": False}
        if self.eager:
            # As the model would make it; it cannot on the meta device.
            arguments["attention_mask"] = torch.empty((batch, 1, length, length), dtype=hidden.dtype, device="meta")
        start = tracker.live
        tracker.work = Work()
        with side_loss.collect(self.model, token_mask=mask, terms=False, noise=noise) as collected:
            out = self.backbone(**arguments)[0]
        counts.saved = tracker.live - start - out.numel() * out.itemsize
        roots = [out, collected.neg_elbo_sum] if collected.layer_names else [out]
        counts.forward, tracker.work = tracker.work, Work()
        tracker.restart_peak()
        torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
        counts.backward_peak = tracker.peak - start
        counts.attention_bytes = tracker.attention_bytes
        counts.backward = tracker.work

    def _watch(self, tracker: StorageTracker, counts: _Counts) -> list[Any]:
        """Note the peak inside the layer's forward, and in the backward pass down to its output."""
        before = [0]

        def enter(*_: Any) -> None:
            before[0] = tracker.live
            tracker.restart_peak()

        def leave(_module: Any, _args: Any, output: Any) -> None:
            counts.forward_peak = max(counts.forward_peak, tracker.peak - before[0])
            first = output if isinstance(output, Tensor) else output[0]

            def reached(gradient: Tensor) -> None:
                counts.norm_peak = max(counts.norm_peak, tracker.peak - before[0])
                tracker.restart_peak()

            first.register_hook(reached)

        return [self.layer.register_forward_pre_hook(enter), self.layer.register_forward_hook(leave)]


def _set_attention(backbone: nn.Module, implementation: str) -> Callable[[], None]:
    """Set it in every configuration that a module holds; returns what undoes it."""
    before: dict[int, tuple[Any, str]] = {}
    for module in backbone.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            before.setdefault(id(config), (config, config._attn_implementation))
            config._attn_implementation = implementation

    def restore() -> None:
        for config, previous in before.values():
            config._attn_implementation = previous

    return restore
