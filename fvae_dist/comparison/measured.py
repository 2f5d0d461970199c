"""What a finished training says of its cost: parameters, speed and memory."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from safetensors import safe_open

from fvae_dist.adapter.export import ADAPTER_FILE
from fvae_dist.training.recipe import Recipe

_SPEED, _MEMORY = "perf/tokens_per_s_per_gpu", "mem/peak_gib"


def measured_in(recipe: dict[str, Any], run: Path) -> dict[str, Any]:
    """Parameters counted on the meta device, speed and memory from the run's TensorBoard files.

    step_s is the median, over pairs of consecutive log lines, of the time between them by the number of steps: pauses
    (a save, an evaluation, a restart) are rare enough not to count. Both medians leave out the first line, in which the
    run warms up. Missing values are None.

    Returns:
        trainable_parameters, inference_parameters (of FVAE-LoRA: encoder 1's mean and B; of what training decides, such
        as AdaLoRA's ranks: as saved), tokens_per_s_per_gpu, step_s, peak_gib (largest rank; on CPU its resident set).
    """
    return {**_parameters(recipe, run / "adapter" / ADAPTER_FILE), **_speed_and_memory(run / "tensorboard")}


def _parameters(values: dict[str, Any], saved: Path) -> dict[str, int]:
    from fvae_dist.training.adalora import is_adalora
    from fvae_dist.training.from_data import EVA, initialisation_from_data
    from fvae_dist.training.labels import read_labels, set_labels
    from fvae_dist.training.modeling import load_config, plan_model

    recipe = Recipe.model_validate(values)
    config = load_config(recipe.model)
    if (classes := read_labels(saved.parent)) is not None:
        set_labels(config, classes)
    plan = plan_model(recipe, config)
    trainable, inference = plan.trainable_parameters, plan.inference_parameters
    start = initialisation_from_data(recipe.adapter)
    if start is not None or is_adalora(recipe.adapter):
        with safe_open(saved, "pt") as tensors:
            inference = sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return {"trainable_parameters": inference if start == EVA else trainable, "inference_parameters": inference}


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
