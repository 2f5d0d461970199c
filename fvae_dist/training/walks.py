"""What transformers' Trainer does in every step by walking through the whole model, done once.

An 8B model with adapters has 2,000 modules and as many parameters. A walk is some milliseconds of Python on every rank,
between two steps, when the GPU has nothing else to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import Trainer as _TrainerBase  # what the mixin is mixed into
else:
    _TrainerBase = object


class WalkOnceMixin(_TrainerBase):
    """Mix in before the trainer class. Modules and parameters must stay the same once training has begun."""

    _modules: list[torch.nn.Module] | None = None
    _operations_per_token: float | None = None

    def training_step(self, model, inputs, *args: Any, **kwargs: Any):
        """As the trainer's, which calls `model.train()`; that walks only if a module of it does not train."""
        if self._modules is None:
            self._modules = list(model.modules())
        with _walking_only_if_due(model, self._modules):
            return super().training_step(model, inputs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As the trainer's, whose count of parameters is taken once."""
        main_input = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        if not torch.is_tensor(main_input) or not main_input.numel():
            return super().floating_point_ops(inputs)
        if self._operations_per_token is None:
            self._operations_per_token = super().floating_point_ops(inputs) / main_input.numel()
        return round(self._operations_per_token * main_input.numel())


@contextmanager
def _walking_only_if_due(model: Any, modules: list[torch.nn.Module]) -> Iterator[None]:
    train = model.train

    def train_if_due(mode: bool = True) -> Any:
        return model if mode and all(module.training for module in modules) else train(mode)

    model.train = train_if_due
    try:
        yield
    finally:
        del model.train  # a copy of the model must not call this one's
