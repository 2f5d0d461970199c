"""AdaLoRA in the recipe's trainer: its schedule, its budget after every step, its orthogonality, its checkpoints.

PEFT's model has all of the method, and leaves it to the trainer to call it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn
from transformers import TrainerCallback

from fvae_dist.training.checks import StartupError
from fvae_dist.training.recipe import Recipe, RecipeError

# PEFT refuses a configuration without a number of steps; this stands for one that is not known yet.
UNKNOWN_STEPS = 2**31 - 1
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
_MASK = "rank_mask"
_SCHEDULE = "total_step"


def is_adalora(adapter: dict[str, Any]) -> bool:
    return str(adapter.get("peft_type")) == "ADALORA"


def check_adalora(recipe: Recipe) -> None:
    """RecipeError for what AdaLoRA cannot be trained with."""
    adapter = recipe.adapter
    if not is_adalora(adapter):
        return
    if recipe.training.deepspeed is not None:
        raise RecipeError(
            "adapter.peft_type: ADALORA weighs its ranks by the gradients of each step, which DeepSpeed has freed by "
            "then; use training.deepspeed: null"
        )
    target, initial = adapter.get("target_r", 8), adapter.get("init_r", 12)
    if not isinstance(target, int) or not isinstance(initial, int) or not 0 < target < initial:
        raise RecipeError(
            f"adapter.target_r: must be greater than 0 and less than init_r, got {target!r} and {initial!r}"
        )


def with_total_step(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with the run's number of optimizer steps in an AdaLoRA section that has none; others as they are.

    Raises:
        RecipeError: another number stands there, or the steps are too few for tinit and tfinal.
    """
    adapter = recipe.adapter
    if not is_adalora(adapter):
        return recipe
    stated = adapter.get("total_step")
    if stated is not None and stated != steps:
        raise RecipeError(
            f"adapter.total_step: {stated} contradicts the {steps} optimizer steps of this run; leave it out"
        )
    first, last = adapter.get("tinit", 0), adapter.get("tfinal", 0)
    if first + last >= steps:
        raise RecipeError(
            f"adapter.tinit, adapter.tfinal: {first} and {last} leave none of the {steps} steps to move ranks in"
        )
    return recipe.model_copy(update={"adapter": {**adapter, "total_step": steps}})


class RankAllocation(TrainerCallback):
    """After each optimizer step, with its gradients still there: importance of the ranks, and which remain."""

    def __init__(self, model: AdaLoraModel):
        self.model = model

    def on_train_begin(self, args, state, control, **kwargs):
        planned = _config(self.model).total_step
        if state.max_steps != planned:
            raise StartupError(f"AdaLoRA is scheduled for {planned} steps, the trainer takes {state.max_steps}")

    def on_optimizer_step(self, args, state, control, **kwargs):
        # Steps taken: counted from 0, a tfinal of 0 would leave the last budget unmet.
        self.model.update_and_allocate(state.global_step + 1)


def adalora_of(model: nn.Module) -> AdaLoraModel | None:
    """The AdaLoRA model inside `model`, if that is what it is."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    return tuner if isinstance(tuner, AdaLoraModel) else None


def orthogonality_loss(model: AdaLoraModel) -> Tensor:
    """orth_reg_weight times the mean over A and B of the Frobenius norm of A A^T - I, B^T B - I.

    PEFT's forward adds it to the model's own loss, which TRL does not use: it makes its loss from log-probabilities.
    """
    norms = []
    for name, parameter in model.model.named_parameters():
        if model.trainable_adapter_name not in name or not (".lora_A." in name or ".lora_B." in name):
            continue
        gram = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
        norms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
    return _config(model).orth_reg_weight * torch.stack(norms).mean()


# --------------------------------------------------------------------------------------------------------- checkpoints


@contextmanager
def whole_ranks(model: nn.Module) -> Iterator[None]:
    """Meanwhile PEFT takes AdaLoRA's tensors whole. A saved adapter lacks the ranks that are masked; training goes on
    with them, and one may come back."""
    tuner = adalora_of(model)
    if tuner is None:
        yield
        return
    config = _config(tuner)
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        yield
    finally:
        config.rank_pattern = pattern


def allocator_state(model: nn.Module) -> dict[str, Tensor]:
    """What AdaLoRA knows of its ranks, "KIND/NAME" -> tensor on CPU; empty for other models."""
    tuner = adalora_of(model)
    if tuner is None:
        return {}
    allocator = tuner.rankallocator
    state = {f"{kind}/{name}": t.cpu().clone() for kind in _AVERAGES for name, t in getattr(allocator, kind).items()}
    masks = _config(tuner).rank_pattern or {}
    state |= {f"{_MASK}/{name}": torch.tensor(mask, dtype=torch.uint8) for name, mask in masks.items()}
    return state | {_SCHEDULE: torch.tensor(_config(tuner).total_step)}


def load_allocator_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `allocator_state` gave; other keys are passed over.

    Raises:
        RecipeError: the ranks were moved by the schedule of a run of another length.
    """
    tuner = adalora_of(model)
    if tuner is None:
        return
    before, now = int(state[_SCHEDULE]), _config(tuner).total_step
    if before != now:
        raise RecipeError(f"--resume: AdaLoRA's ranks follow a schedule of {before} steps, this run has {now}")
    allocator = tuner.rankallocator
    device = next(tuner.parameters()).device
    allocator.reset_ipt()
    masks = {}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        if kind in _AVERAGES:
            getattr(allocator, kind)[name] = value.to(device)
            allocator.ipt[name] = torch.zeros_like(value, device=device)  # its presence says that averages exist
        elif kind == _MASK:
            masks[name] = value.bool().tolist()
    _config(tuner).rank_pattern = masks or None


def _config(tuner: AdaLoraModel) -> Any:
    return tuner.peft_config[tuner.trainable_adapter_name]
