"""The gradients of task loss and side loss apart: what pulls on which part of the adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fvae_dist.adapter.flat import split_flat
from fvae_dist.training.checkpoint_state import shape_of
from fvae_dist.training.zero3 import no_leaf_reduction

KINDS = ("encoder1", "encoder2", "decoder", "lora_B")


def kind_of(name: str) -> str:
    """The module kind of an adapter parameter: one of KINDS, or "other" (modules_to_save)."""
    return next((kind for kind in KINDS if f".{kind}." in name or f"fvae_{kind}." in name), "other")


class GradientSplit:
    """Gradient norms of task and side loss, per module kind, of one optimizer step.

    Each micro-batch runs twice more, with the noise and dropout of its training pass. The sums over its micro-batches
    are kept in fp32: twice the adapters' size.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, losses: Callable[[], dict[str, Tensor]], device: torch.device) -> None:
        """Add a micro-batch: `losses()` runs it and returns its shares of the step's loss. All ranks must call this."""
        for part in ("task", "side"):
            # The training pass that follows must draw what it would have drawn.
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                with no_leaf_reduction(self._model):
                    loss = losses()[part]
                gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=False)
            self._add(part, gradients)

    def _add(self, part: str, gradients: tuple[Tensor | None, ...]) -> None:
        sums = self._sums.setdefault(part, [torch.zeros(()) for _ in gradients])
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                sums[index] = sums[index].to(gradient.device) + gradient.float()

    def norms(self, reduce: Callable[[Tensor, str], Tensor], device: torch.device) -> dict[str, float]:
        """gradient/PART/KIND -> norm of the step's gradient, averaged over ranks. All ranks must call this."""
        squares: dict[str, Any] = {}
        for part, sums in self._sums.items():
            means = {}
            for name, parameter, gradient in zip(self._names, self._parameters, sums, strict=True):
                mean = reduce(gradient.to(device), "mean")
                means[name] = mean.expand(shape_of(parameter)) if mean.dim() == 0 else mean  # no gradient: one 0
            for name, mean in split_flat(self._model, means).items():
                key = f"gradient/{part}/{kind_of(name)}"
                squares[key] = squares.get(key, 0.0) + mean.double().square().sum()
        return {key: float(value) ** 0.5 for key, value in squares.items()}
