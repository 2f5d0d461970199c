"""What training adapters needs of DeepSpeed beyond its configuration."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fvae_dist.adapter.vae import FactorizedVAE


def skip_shared_memory_operator() -> None:
    """On CPU DeepSpeed compiles an operator for its inference as the process group starts; nothing here calls it.

    Compiling takes a minute, needs ninja and a compiler, and waits for ever for a lock that a killed process left.
    """
    import deepspeed

    getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False


def treat_vaes_as_leaves(model: torch.nn.Module) -> None:
    """One gather and one set of ZeRO-3 hooks for a whole VAE; must precede deepspeed.initialize."""
    vaes = [module for module in model.modules() if isinstance(module, FactorizedVAE)]
    if vaes:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [FactorizedVAE])
        for vae in vaes:
            vae.register_forward_pre_hook(_require_input_gradient)


def _require_input_gradient(module: torch.nn.Module, args: tuple) -> tuple | None:
    """DeepSpeed reduces a leaf's gradients in a full backward hook. For an input without gradient (the first adapted
    layer, without checkpointing) torch fires that hook before any of them exists: DeepSpeed would take zeros."""
    x = args[0]
    if not torch.is_grad_enabled() or x.requires_grad:
        return None
    return (x.detach().requires_grad_(), *args[1:])


def drop_stale_forward_stack() -> None:
    """Undo a leak of DeepSpeed 0.19 with non-reentrant checkpointing.

    Recomputation stops early by an exception that passes over ZeRO-3's post-forward hooks, so its stack of running
    modules grows with every step. Switching early stop off is no way out: the last module of a layer would then be
    released before its recomputed weight is used ("different metadata ... shape [0]").
    """
    from deepspeed.runtime.zero import parameter_offload

    del parameter_offload.FWD_MODULE_STACK[1:]


@contextmanager
def no_leaf_reduction(model: torch.nn.Module) -> Iterator[None]:
    """Forwards inside make graphs whose backward pass does not hand the VAEs' gradients to ZeRO-3.

    Its hook for a leaf module reduces whatever stands in .grad; `torch.autograd.grad` puts nothing there.
    """
    vaes = [module for module in model.modules() if isinstance(module, FactorizedVAE)]
    hooks = [vae._backward_hooks for vae in vaes]
    try:
        for vae in vaes:
            vae._backward_hooks = OrderedDict()
        yield
    finally:
        for vae, kept in zip(vaes, hooks, strict=True):
            vae._backward_hooks = kept
