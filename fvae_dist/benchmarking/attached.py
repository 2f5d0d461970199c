"""Several adapters on one base model that exists once: each variant's layers are put in place when its turn comes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fvae_dist.adapter.flat import flatten
from fvae_dist.benchmarking.reference import build_reference_layer
from fvae_dist.benchmarking.variants import AdapterSize


@dataclass
class Attached:
    """One variant's adapted layers by name, and what trains them; the bare base has none."""

    layers: dict[str, nn.Module] = field(default_factory=dict)
    parameters: list[nn.Parameter] = field(default_factory=list)
    optimizer: torch.optim.Optimizer | None = None

    def num_bytes(self) -> int:
        """Of adapter, gradients and optimizer states: what lies on the device between steps."""
        tensors: list[torch.Tensor] = [*self.parameters]
        tensors += [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.optimizer is not None:
            states = (state.values() for state in self.optimizer.state.values())
            tensors += [value for of_one in states for value in of_one if torch.is_tensor(value)]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def sizes(self) -> list[tuple[int, int]]:
        """(in-features, out-features) of the adapted linears."""
        found: list[Any] = [layer.get_base_layer() for layer in self.layers.values()]  # type: ignore[operator]
        return [(linear.in_features, linear.out_features) for linear in found]


def attach(model: nn.Module, config: PeftConfig) -> Attached:
    """Make an adapter on `model` as PEFT does, flat as recipes have it, with AdamW for it, and take it off again."""
    flatten(get_peft_model(model, config))  # type: ignore[arg-type]
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    attached = _with_optimizer(layers)
    put_in_place(model, Attached(), attached)
    del model.peft_config  # or PEFT takes the next variant for a second adapter of this one
    return attached


def attach_reference(model: nn.Module, clone: str, targets: list[str], size: AdapterSize) -> Attached:
    """The reference code's layers around `linears_of(model, targets)`, and AdamW for them; they are not put in place.

    Raises:
        ValueError: no clone of the reference, or one that cannot be imported here.
    """
    linears = linears_of(model, targets)
    return _with_optimizer({name: build_reference_layer(clone, linear, size) for name, linear in linears.items()})


def linears_of(model: nn.Module, targets: list[str]) -> dict[str, nn.Linear]:
    """The linears of these names, "all-linear": all but the head."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {
        name: linear
        for name, linear in linears.items()
        if (name != "lm_head" if targets == ["all-linear"] else name.rpartition(".")[2] in targets)
    }


def _with_optimizer(layers: dict[str, Any]) -> Attached:
    parameters = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=parameters[0].is_cuda)
    return Attached({name: layer.train() for name, layer in layers.items()}, parameters, optimizer)


def put_in_place(model: nn.Module, wanted: Attached, present: Attached) -> None:
    """Exchange the adapted layers: those of `present` leave, those of `wanted` come."""
    for name, layer in present.layers.items():
        model.set_submodule(name, layer.get_base_layer())  # type: ignore[operator]
    for name, layer in wanted.layers.items():
        model.set_submodule(name, layer)
