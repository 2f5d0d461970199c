"""Operations that allocate and keep what the real ones do, for a model on the meta device.

Flash attention, DeepSpeed's linear and Liger's layers are CUDA or hooked code that the meta device cannot run. What
they save for the backward pass, and the buffers they work in, was read in their sources:

* flash-attn 2.8.3, csrc/flash_attn/flash_api.cpp: out and a log-sum-exp are kept; the backward accumulates dq in fp32,
  and with fewer key than query heads writes dk and dv for every query head first. cuDNN's, which SDPA takes on Hopper,
  writes dk and dv twice instead: `benchmark.py attention` measures 3,088 MiB at T = 65,536 (H200, 2026-11-28), of which
  out, its gradient, dq, dk, dv and dq in fp32 make 2,816.
* CUDA's dropout keeps a mask of booleans, the CPU's one of the input's dtype.
* deepspeed 0.19.8, runtime/zero/linear.py: the input of every linear is kept, frozen or not.
* fvae_dist.kernels: the functions themselves, but each launch only counts the bytes of its tensors.
* liger-kernel 0.8.5, ops/rms_norm.py and ops/swiglu.py: the norm keeps its input and one fp32 a row, the gated unit its
  two factors; both overwrite what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fvae_dist.adapter.vae import FactorizedVAE
from fvae_dist.kernels import launching
from fvae_dist.kernels.fused_vae import size_problem

ATTENTION = "fvae_planner"
# Set while a trace runs: told of each attention call, whether attention keeps its working memory, and whose.
_listener: Callable[[float, int], None] | None = None
_with_working_memory = True
_expands_heads = True
# Told of the bytes that a launch of the fused kernels moves.
_on_launch: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Kernels:
    """Which of several ways to compute the same takes its memory.

    Attributes:
        fused_adapters: whether the fused kernels compute the VAEs that they can.
        attention: flash_attention_2 or sdpa.
        on_cpu: whether dropout is the CPU's.
    """

    fused_adapters: bool = False
    attention: str = "flash_attention_2"
    on_cpu: bool = False


@contextmanager
def on_meta(
    kernels: Kernels,
    *,
    keeps_linear_inputs: bool,
    attention_memory: bool,
    on_attention: Callable[[float, int], None],
    on_launch: Callable[[int], None],
) -> Iterator[None]:
    """Inside, the stand-ins are in place.

    Args:
        keeps_linear_inputs: as ZeRO-3's linear does.
        attention_memory: whether attention keeps anything beside its output (else it is memory for nothing).
        on_launch: receives the bytes of the tensors of every launch of theirs.
        on_attention: receives the FLOPs of every forward and backward attention call, and the bytes that a forward
            leaves behind (output and log-sum-exp; 0 for a backward).
    """
    global _listener, _with_working_memory, _expands_heads, _on_launch
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention_interface)
    with ExitStack() as stack:
        # The meta device has no autocast; adapters ask for it by the device of their input.
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda *_: False))
        stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        is_fused = _is_fused if kernels.fused_adapters else _is_not_fused
        stack.enter_context(patch.object(FactorizedVAE, "is_fused", is_fused))
        stack.enter_context(patch.object(launching, "Launch", _Launch))
        if keeps_linear_inputs:
            stack.enter_context(patch.object(F, "linear", _zero3_linear))
        if not kernels.on_cpu:
            stack.enter_context(patch.object(F, "dropout", _cuda_dropout))
        _listener, _with_working_memory, _on_launch = on_attention, attention_memory, on_launch
        _expands_heads = kernels.attention == "flash_attention_2"
        try:
            yield
        finally:
            _listener, _with_working_memory, _expands_heads, _on_launch = None, True, True, None


# ----------------------------------------------------------------------------------------------------------- attention


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, T, D) each, k and v with fewer heads -> (B, T, H, D)."""
        batch, heads, length, _ = q.shape
        out = q.new_empty((batch, length, heads, v.shape[-1]))
        ctx.keeps = _with_working_memory
        if ctx.keeps:
            ctx.save_for_backward(q, k, v, out, q.new_empty((batch, heads, length), dtype=torch.float32))
        ctx.shapes = [t.shape for t in (q, k, v)]
        # Two products of 2 T^2 D each, half of them masked.
        ctx.flops = 2.0 * batch * heads * length * k.shape[2] * (q.shape[-1] + v.shape[-1]) / 2
        if _listener is not None:
            _listener(ctx.flops, out.numel() * out.itemsize + 4 * batch * heads * length)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        grad = grads[0]
        if _listener is not None:
            _listener(2.5 * ctx.flops, 0)  # five products instead of two
        query, key, _ = ctx.shapes
        working = []
        if ctx.keeps:
            working.append(grad.new_empty(query, dtype=torch.float32))
            if key[1] != query[1]:
                heads = query[1] if _expands_heads else key[1]
                working += [grad.new_empty((shape[0], heads, *shape[2:])) for shape in ctx.shapes[1:]]
        return tuple(grad.new_empty(shape) for shape in ctx.shapes)


def _attention_interface(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _Attention.apply(q, k, v), None


# ------------------------------------------------------------------------------------------------------- fused adapters


def _is_fused(vae: Any, x: Tensor) -> bool:
    can = vae.fused_problem is None and size_problem(vae.fused_spec) is None
    return can and vae.config.kernel != "torch" and x.dtype == torch.bfloat16


def _is_not_fused(vae: Any, x: Tensor) -> bool:
    return False


class _Launch:
    """In the place of a plan's launches."""

    def __init__(self, *_: Any):
        pass

    def __call__(self, stream: None, *arguments: Any, kind: Any = None) -> None:
        if _on_launch is not None:
            _on_launch(sum(one.numel() * one.itemsize for one in arguments if isinstance(one, Tensor)))


# ------------------------------------------------------------------------------------------------------------- dropout


def _cuda_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


# -------------------------------------------------------------------------------------------------------------- linear


class _Zero3Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = x.matmul(weight.t())
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        grad_x = grads[0].matmul(weight) if ctx.needs_input_grad[0] else None
        grad_weight = rows.t().matmul(x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _zero3_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Zero3Linear.apply(input, weight, bias)


# --------------------------------------------------------------------------------------------------------------- Liger


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].mul_(ctx.saved_tensors[0])  # one kernel, over the gradient


class _FusedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return gate * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        return gate.mul_(grads[0]), up.mul_(grads[0])  # over the factors


def fuse_layers(model: nn.Module) -> None:
    """Put Liger's norm and gated unit where `use_liger_kernel` would; architectures without them stay as they are."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _FusedNorm.apply  # type: ignore[assignment]
        elif all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            module.forward = _fused_gate_of(module)  # type: ignore[assignment]


def _fused_gate_of(mlp: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: mlp.down_proj(_FusedGate.apply(mlp.gate_proj(x), mlp.up_proj(x)))
