"""`--dry-run`: what a recipe will do, without a launcher, a GPU or a loaded weight."""

from __future__ import annotations

import json
import os
from typing import Any

import yaml

from fvae_dist.planning.hardware import PlanError
from fvae_dist.planning.memory import estimate_memory
from fvae_dist.planning.report import memory_table
from fvae_dist.training.data import render_example
from fvae_dist.training.deepspeed_config import load_deepspeed_config, size_for_adapter
from fvae_dist.training.full import is_full
from fvae_dist.training.planned import choice_of, subject_of
from fvae_dist.training.rope_scaling import describe_scaling
from fvae_dist.training.run import Prepared
from fvae_dist.training.steps import global_batch_size, num_readers, optimizer_steps, steps_per_epoch

_SHOWN_CHARACTERS = 4000


def describe(prepared: Prepared, world_size: int) -> str:
    """The whole report; `world_size` is the number of devices it is computed for."""
    recipe = prepared.recipe
    deepspeed = _deepspeed(prepared, world_size)
    sections = {
        "Recipe": yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True).rstrip(),
        "DeepSpeed config": json.dumps(deepspeed, indent=2),
        "Model": _model(prepared),
        "Data": _data(prepared, world_size),
        f"Memory per device, {world_size} device(s), estimated": _memory(prepared, deepspeed, world_size),
        "First example (loss on what stands between the brackets ⟦ ⟧)": _shortened(
            render_example(prepared.data.train[0], prepared.tokenizer, prepared.data.classes)
        ),
    }
    return "\n\n".join(f"== {title} ==\n{text}" for title, text in sections.items())


def _deepspeed(prepared: Prepared, world_size: int) -> dict[str, Any] | None:
    """As DeepSpeed gets it: what depends on the adapter, and on the nodes that a launcher would state, filled in."""
    config = load_deepspeed_config(prepared.recipe, world_size, _node(world_size))
    if config is not None:
        size_for_adapter(config, prepared.plan.trainable_sizes, prepared.plan.base_sizes)
    return config


def _model(prepared: Prepared) -> str:
    plan = prepared.plan
    shown = plan.adapted_layers[:4]
    more = len(plan.adapted_layers) - len(shown)
    names = ", ".join(shown) + (f", ... ({more} more)" if more > 0 else "")
    share = 100 * plan.trainable_parameters / plan.base_parameters
    treated, adapter = "all trained", []
    if not is_full(prepared.recipe.adapter):
        treated = "frozen"
        adapter = [
            f"adapted layers: {len(plan.adapted_layers)}: {names}",
            f"adapter parameters: {plan.trainable_parameters:,} in training ({share:.3f} %), "
            f"{plan.inference_parameters:,} of them at inference",
        ]
    scaling = prepared.recipe.model.rope_scaling
    return "\n".join(
        [
            f"base: {prepared.recipe.model.name_or_path}, {plan.base_parameters:,} parameters, {treated}",
            *([describe_scaling(prepared.config, scaling)] if scaling else []),
            *adapter,
            f"attention: {prepared.attention} ({prepared.attention_reason})",
            f"Liger's layers: {'yes' if prepared.liger else 'no'} ({prepared.liger_reason})",
            str(prepared.fit),
        ]
    )


def _data(prepared: Prepared, world_size: int) -> str:
    recipe, report = prepared.recipe, prepared.data.report
    training = recipe.training
    readers = num_readers(training, world_size)
    sequences = len(prepared.data.train)
    per_epoch = steps_per_epoch(training, sequences, world_size)
    steps = optimizer_steps(training, sequences, world_size)
    batch = global_batch_size(training, world_size)
    lines = [
        f"{batch} sequences a step ({training.per_device_train_batch_size} a device x "
        f"{training.gradient_accumulation_steps} accumulation x {readers} {_readers(training.sequence_parallel)})",
        f"{per_epoch} steps and {report['train']['num_tokens']:,} tokens an epoch; {steps} steps in all",
    ]
    for split, counts in report.items():
        lines.append(f"{split}: " + ", ".join(f"{key} {_shown(value)}" for key, value in counts.items()))
    return "\n".join(lines)


def _readers(sequence_parallel: int) -> str:
    return "devices" if sequence_parallel == 1 else f"groups of {sequence_parallel} devices"


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _memory(prepared: Prepared, deepspeed: dict[str, Any] | None, world_size: int) -> str:
    """As `launch/plan.py` plans it, for the recipe as it stands."""
    recipe = prepared.recipe
    try:
        subject = subject_of(recipe, prepared.config, prepared.attention, prepared.liger)
        choice = choice_of(recipe, subject, deepspeed, prepared.fit.recompute, prepared.fit.resident)
        estimate = estimate_memory(subject, choice, world_size)
    except PlanError as error:  # training does not need the estimate
        return f"unknown: {error}"
    return memory_table(estimate) + "\n(time, traffic and other choices: python launch/plan.py --help)"


def _node(world_size: int) -> int:
    """Devices of a node: what a launcher says, else 8, or all of them."""
    stated = os.environ.get("LOCAL_WORLD_SIZE")
    if stated is not None:
        return int(stated)
    return 8 if world_size % 8 == 0 else world_size


def _shortened(text: str) -> str:
    """A rendered example with the middle of a long one left out; brackets are closed and opened again around it."""
    left_out = len(text) - _SHOWN_CHARACTERS
    if left_out <= 0:
        return text
    head, tail = text[: _SHOWN_CHARACTERS // 2], text[-(_SHOWN_CHARACTERS // 2) :]
    close = "⟧" if head.rfind("⟦") > head.rfind("⟧") else ""
    first_close, first_open = tail.find("⟧"), tail.find("⟦")
    reopen = "⟦" if first_close >= 0 and (first_open < 0 or first_close < first_open) else ""
    return f"{head}{close}\n[... {left_out:,} characters left out here ...]\n{reopen}{tail}"
