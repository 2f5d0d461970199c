"""What a finished training says of its cost: parameters, speed and memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from fvae_dist.training.recipe import Recipe

_SPEED, _MEMORY = "perf/tokens_per_s_per_gpu", "mem/peak_gib"


def measured_in(recipe: dict[str, Any], run: Path) -> dict[str, Any]:
    """Parameters counted on the meta device, speed and memory from the run's TensorBoard files.

    step_s is the median, over pairs of consecutive log lines, of the time between them by the number of steps: pauses
    (a save, an evaluation, a restart) are rare enough not to count. Both medians leave out the first line, in which the
    run warms up. Missing values are None.

    Returns:
        trainable_parameters, inference_parameters (of FVAE-LoRA: encoder 1's mean and B), tokens_per_s_per_gpu, step_s,
        peak_gib (largest rank; on CPU its resident set).
    """
    return {**_parameters(recipe), **_speed_and_memory(run / "tensorboard")}


def _parameters(values: dict[str, Any]) -> dict[str, int]:
    from fvae_dist.training.modeling import load_config, plan_model

    recipe = Recipe.model_validate(values)
    plan = plan_model(recipe, load_config(recipe.model))
    return {"trainable_parameters": plan.trainable_parameters, "inference_parameters": plan.inference_parameters}


def _speed_and_memory(folder: Path) -> dict[str, float | None]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all of them
    events.Reload()
    known = events.Tags()["scalars"]
    speeds = [event.value for event in events.Scalars(_SPEED)] if _SPEED in known else []
    peaks = events.Scalars(_MEMORY) if _MEMORY in known else []
    lines = [(event.step, event.wall_time) for event in peaks]  # these stand on every log line
    steps = [(end - start) / (b - a) for (a, start), (b, end) in pairwise(lines[1:] or lines) if b > a]
    return {
        "tokens_per_s_per_gpu": median(speeds[1:] or speeds) if speeds else None,
        "step_s": median(steps) if steps else None,
        "peak_gib": max(event.value for event in peaks) if peaks else None,
    }
