"""MLPs and norms over a tile of tokens at a time: DeepSpeed's TiledMLP, for rows of hundreds of thousands of tokens.

The gated unit keeps tensors of T x intermediate_size for its backward pass, the largest of a decoder layer; a norm
copies its input to fp32, several times. A tile's are made, used and dropped before the next one's, for one more forward
pass. Liger's norm keeps its input and no more, so it stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fvae_dist.training.recipe import RecipeError


def find_mlps(model: nn.Module) -> list[nn.Module]:
    """The gated MLPs of a model with its adapters.

    Raises:
        RecipeError: there are none, or something is trained in them: an adapter must see the tokens of a batch at once.
    """
    mlps = {name: module for name, module in model.named_modules() if _is_gated(module)}
    if not mlps:
        raise RecipeError("training.tiled_mlp: this model has no MLP of gate_proj, up_proj and down_proj")
    for name, mlp in mlps.items():
        if any(parameter.requires_grad for parameter in mlp.parameters()):
            raise RecipeError(f"training.tiled_mlp: {name} is trained; leave MLPs out of adapter.target_modules")
    return list(mlps.values())


def tile_mlps(model: nn.Module, zero3: bool) -> int:
    """Make every gated MLP and frozen norm of the model work over tiles of as many tokens as its input is wide.

    Returns:
        How many MLPs there are.

    Args:
        model: with its adapters; after Liger, which sets the MLPs' forward itself, and before deepspeed.initialize.
        zero3: whether the MLPs' weights are sharded and gathered.

    Raises:
        RecipeError: as `find_mlps`.
    """
    mlps = find_mlps(model)
    for module in (*mlps, *_norms(model)):
        module.forward = _tiled(module, module.forward)
    if zero3:  # one gather for all tiles: ranks whose rows differ in length would not gather equally often
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, list({type(mlp) for mlp in mlps}))
    return len(mlps)


def _norms(model: nn.Module) -> list[nn.Module]:
    """Those of torch and transformers; of others (Liger's are) the forward is set on the module, or the name tells."""
    return [
        module
        for module in model.modules()
        if type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
        and not type(module).__name__.startswith("Liger")
        and "forward" not in vars(module)
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


def _is_gated(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))


def _tiled(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def of_tile(_: nn.Module, x: Tensor) -> Tensor:
        # In the backward pass, where hooks that offload activations must not take a tile's.
        with saved_tensors_hooks(_same, _same):
            return forward(x)

    def tiled(x: Tensor) -> Tensor:
        tiles = math.ceil(x.shape[-2] / x.shape[-1])
        return TiledMLP.apply(of_tile, module, x, tiles, []) if tiles > 1 else forward(x)

    return tiled


def _same(tensor: torch.Tensor) -> Any:
    return tensor
