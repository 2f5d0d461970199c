"""What `auto` chooses: how a recipe is run so that it fits the device, by the planner's estimate of its memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from fvae_dist.planning.choice import Choice, Recompute
from fvae_dist.planning.hardware import GIB, PlanError
from fvae_dist.planning.memory import MemoryEstimate, estimate_memory
from fvae_dist.planning.subject import Subject
from fvae_dist.training.deepspeed_config import zero_stage
from fvae_dist.training.planned import choice_of, subject_of
from fvae_dist.training.recipe import Recipe, RecipeError

logger = logging.getLogger(__name__)
# Of the device's memory, left free by what auto chooses. Estimates are within 5 % of what tensors took on H200s
# (docs/planner.md), and have a share for fragmentation.
MARGIN = 0.05


@dataclass(frozen=True)
class Fit:
    """How the recipe is run.

    Attributes:
        resident: whether ZeRO-3's frozen weights are gathered once, for good.
        reason: why, for the log.
        estimate: memory of one device; None where nothing was estimated, because nothing was left to choose.
        is_automatic: whether anything was chosen here.
    """

    recompute: Recompute
    resident: bool
    reason: str
    estimate: MemoryEstimate | None = None
    is_automatic: bool = False

    @property
    def way_out(self) -> str:
        """What to set where the estimate was too low."""
        settings = ["training.resident_weights: false"] * self.resident
        settings += ["training.recompute: full"] * (self.recompute != "full")
        fewer_tokens = "a smaller data.max_length or training.per_device_train_batch_size, or more devices"
        return " or ".join(settings) or fewer_tokens

    def __str__(self) -> str:
        resident = ", resident weights" if self.resident else ""
        return f"recompute {self.recompute}{resident} ({self.reason})"


def fit_recipe(
    recipe: Recipe,
    config: PretrainedConfig,
    deepspeed: dict[str, Any] | None,
    world_size: int,
    attention: str,
    liger: bool,
    memory_gib: float | None,
) -> Fit:
    """As `fit_subject`, from the model's configuration. Without an estimate: all recomputed, nothing resident."""
    if memory_gib is None or not _is_open(recipe, deepspeed):
        return _without_estimate(recipe, deepspeed, "the device's memory is not known")
    try:
        return fit_subject(recipe, subject_of(recipe, config, attention, liger), deepspeed, world_size, memory_gib)
    except PlanError as error:  # training does not need the estimate
        return _without_estimate(recipe, deepspeed, f"no estimate: {error}")


def fit_subject(
    recipe: Recipe, subject: Subject, deepspeed: dict[str, Any] | None, world_size: int, memory_gib: float
) -> Fit:
    """The least recomputation whose estimate leaves MARGIN of the device's memory, with resident weights where these
    fit beside it; if nothing fits, what takes the least."""
    if not _is_open(recipe, deepspeed):
        return _without_estimate(recipe, deepspeed, "")
    allowed = (1 - MARGIN) * memory_gib
    tried = []
    for recompute, resident in _candidates(recipe, deepspeed):
        choice = choice_of(recipe, subject, deepspeed, recompute, resident)
        estimate = estimate_memory(subject, choice, world_size)
        tried.append((estimate.needed_gib, recompute, resident, estimate))
        if estimate.needed_gib <= allowed:
            break
    else:  # weights that are gathered again and again can take more than resident ones: DeepSpeed keeps their inputs
        _, recompute, resident, estimate = min(tried, key=lambda candidate: candidate[0])
    verdict = "the first that fits" if estimate.needed_gib <= allowed else "nothing fits, this takes the least"
    reason = f"auto: {verdict}: {estimate.needed_gib:.1f} GiB estimated, {memory_gib:.1f} GiB here"
    return Fit(recompute, resident, reason, estimate, is_automatic=True)


def check_asked(recipe: Recipe, deepspeed: dict[str, Any] | None) -> None:
    """RecipeError for what was asked for and cannot be."""
    if recipe.training.resident_weights is True and _as_choice(deepspeed).offload:
        raise RecipeError(
            f"training.resident_weights: true contradicts offload_param in {recipe.training.deepspeed}: the frozen "
            "weights cannot stay on the GPU and in host memory"
        )


def check_agreement(fit: Fit) -> None:
    """All ranks must have chosen alike; they may not where their devices differ. RecipeError on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (fit.recompute, fit.resident))
    if len(set(found)) > 1:
        raise RecipeError(
            "training.recompute, training.resident_weights: auto chose unlike on ranks with unlike memory: "
            f"{' and '.join(map(str, sorted(set(found))))}; state them"
        )


@contextmanager
def name_the_key_when_out_of_memory(fit: Fit) -> Iterator[None]:
    """Where there is no memory for what `auto` chose, say which key to set. It remains a crash."""
    try:
        yield
    except torch.OutOfMemoryError:
        if fit.is_automatic:
            logger.error("out of memory with %s: set %s", fit, fit.way_out)
        raise


def device_memory_gib(use_cpu: bool) -> float | None:
    """Memory of this rank's GPU; None on CPU."""
    if use_cpu or not torch.cuda.is_available():
        return None
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    return torch.cuda.get_device_properties(index).total_memory / GIB


def _is_open(recipe: Recipe, deepspeed: dict[str, Any] | None) -> bool:
    """Whether the recipe leaves anything to choose."""
    return recipe.training.recompute == "auto" or len(_residencies(recipe, deepspeed)) > 1


def _candidates(recipe: Recipe, deepspeed: dict[str, Any] | None) -> Iterator[tuple[Recompute, bool]]:
    """The fastest first. Recomputation costs half as much again of a step's arithmetic, more than gathers do."""
    recomputes: list[Recompute] = ["none", "selective", "full"]
    if recipe.training.recompute == "auto" and recipe.training.activation_offload:
        recomputes.remove("none")  # it would fill the host's memory
    for recompute in recomputes:
        if recipe.training.recompute in ("auto", recompute):
            yield from ((recompute, resident) for resident in _residencies(recipe, deepspeed))


def _residencies(recipe: Recipe, deepspeed: dict[str, Any] | None) -> list[bool]:
    asked = recipe.training.resident_weights
    if zero_stage(deepspeed) != 3:
        return [False]  # they are whole anyway
    if asked != "auto":
        return [asked]
    return [True, False] if _as_choice(deepspeed).can_be_resident else [False]


def _as_choice(deepspeed: dict[str, Any] | None) -> Choice:
    """The planner's reading of a DeepSpeed configuration."""
    return Choice("", deepspeed, "full")


def _without_estimate(recipe: Recipe, deepspeed: dict[str, Any] | None, why: str) -> Fit:
    asked = recipe.training.recompute
    recompute: Recompute = "full" if asked == "auto" else asked
    return Fit(
        recompute, _residencies(recipe, deepspeed)[-1], f"auto: {why}" if _is_open(recipe, deepspeed) else "asked for"
    )
