"""From a recipe to what the planner plans: `--dry-run` and `fvae-dist plan` agree because both come through here."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.utils.import_utils import is_triton_available

from fvae_dist.adapter.flat import flatten
from fvae_dist.planning.choice import Choice, Recompute
from fvae_dist.planning.hardware import PlanError
from fvae_dist.planning.planner import Load
from fvae_dist.planning.subject import Settings, Subject, describe
from fvae_dist.training.classification import is_classification
from fvae_dist.training.deepspeed_config import load_deepspeed_config, size_for_adapter
from fvae_dist.training.full import is_full
from fvae_dist.training.head import head_problem
from fvae_dist.training.implementations import has_flat_adapters, planned_attention, planned_liger
from fvae_dist.training.modeling import attach_adapter
from fvae_dist.training.recipe import Recipe
from fvae_dist.training.tiled_mlp import tile_mlps

WITHOUT_DEEPSPEED = "null"


def subject_of(
    recipe: Recipe, config: PretrainedConfig, attention: str | None = None, liger: bool | None = None
) -> Subject:
    """The recipe's model and adapter, on the meta device.

    Args:
        attention, liger: what was chosen; default: what `auto` takes on a GPU where flash-attn is installed, and
            Liger as it is here.
    """
    section, training = recipe.model, recipe.training
    if is_full(recipe.adapter):
        raise PlanError("full fine-tuning is not planned: the planner knows frozen weights and adapters")
    if is_classification(recipe):
        raise PlanError("classification is not planned: the planner knows the head and loss of language models")
    settings = Settings(
        dtype=section.dtype,
        sequences=training.per_device_train_batch_size,
        length=part_length(recipe, recipe.data.max_length),
        sequence_parallel=training.sequence_parallel,
        activation_offload=training.activation_offload,
        attention=attention or planned_attention(recipe),
        liger=planned_liger(recipe, config) if liger is None else liger,
        on_cpu=training.use_cpu is True,
        fused_adapters=training.use_cpu is not True and section.dtype == "bfloat16" and is_triton_available(),
        trust_remote_code=section.trust_remote_code,
    )

    head_problems: list[str | None] = []

    def attach(model: nn.Module) -> nn.Module:
        adapted = attach_adapter(model, recipe.adapter, low_cpu_mem_usage=True)
        head_problems.append(head_problem(adapted))
        if has_flat_adapters(recipe, settings.on_cpu):
            flatten(adapted)
        return adapted

    subject = describe(config, settings, attach, partial(tile_mlps, zero3=False) if training.tiled_mlp else None)
    if not settings.on_cpu and training.head != "trl" and head_problems == [None]:
        subject.settings = replace(settings, fused_head=True)
    return subject


def part_length(recipe: Recipe, length: int) -> int:
    """One GPU's part of a sequence."""
    return math.ceil(length / recipe.training.sequence_parallel)


def choice_of(
    recipe: Recipe, subject: Subject, deepspeed: dict[str, Any] | None, recompute: Recompute, resident: bool
) -> Choice:
    """A choice from a loaded DeepSpeed dict, the sizes that depend on the adapter filled in."""
    config = copy.deepcopy(deepspeed)
    if config is not None:
        size_for_adapter(config, subject.trainable_sizes, subject.base_sizes)
    return Choice(own_config(recipe), config, recompute, resident)


def longest_load(recipe: Recipe) -> Load:
    """What a step works on where every row is as long as may be."""
    training = recipe.training
    return Load(
        accumulation=training.gradient_accumulation_steps,
        sequences=training.per_device_train_batch_size,
        mean_length=part_length(recipe, recipe.data.max_length),
        sequence_parallel=training.sequence_parallel,
    )


def own_config(recipe: Recipe) -> str:
    """The path of the recipe's DeepSpeed configuration, or "null"."""
    return str(Path(recipe.training.deepspeed)) if recipe.training.deepspeed else WITHOUT_DEEPSPEED


def make_choice(
    recipe: Recipe,
    subject: Subject,
    name: str,
    recompute: Recompute,
    resident: bool,
    world_size: int,
    gpus_per_node: int,
) -> Choice:
    """The choice of a DeepSpeed configuration by its path (or "null") on a cluster.

    Raises:
        RecipeError: the configuration cannot be read, contradicts the recipe, or TRL refuses the combination.
    """
    training = recipe.training.model_copy(update={"deepspeed": None if name == WITHOUT_DEEPSPEED else name})
    changed = recipe.model_copy(update={"training": training})
    deepspeed = load_deepspeed_config(changed, world_size, gpus_per_node)
    return choice_of(changed, subject, deepspeed, recompute, resident)


def deepspeed_configs(recipe: Recipe) -> list[str]:
    """The configurations to choose from: those in the folder of the recipe's own, or in ds_configs/."""
    own = own_config(recipe)
    folder = Path("ds_configs") if own == WITHOUT_DEEPSPEED else Path(own).parent
    return list(dict.fromkeys([own, *sorted(str(path) for path in folder.glob("*.json"))]))


def overrides_of(choice: Choice) -> dict[str, Any]:
    """The recipe's keys that a choice decides, with their values."""
    values: dict[str, Any] = {
        "training.deepspeed": None if choice.name == WITHOUT_DEEPSPEED else choice.name,
        "training.recompute": choice.recompute,
    }
    return values | {"training.resident_weights": choice.resident} if choice.is_zero3 else values
