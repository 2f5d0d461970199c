"""`--dry-run`: what a recipe will do, without a launcher, a GPU or a loaded weight."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import yaml

from fvae_dist.planning.memory import estimate_memory
from fvae_dist.training.data import render_example
from fvae_dist.training.deepspeed_config import size_for_adapter, zero_stage
from fvae_dist.training.run import Prepared

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_SHOWN_CHARACTERS = 4000


def describe(prepared: Prepared, world_size: int) -> str:
    """The whole report; `world_size` is the number of devices it is computed for."""
    recipe = prepared.recipe
    sections = {
        "Recipe": yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True).rstrip(),
        "DeepSpeed config": _deepspeed(prepared),
        "Model": _model(prepared),
        "Data": _data(prepared, world_size),
        f"Memory per device, {world_size} device(s), estimated": _memory(prepared, world_size),
        "First example (loss on what stands between the brackets ⟦ ⟧)": _shortened(
            render_example(prepared.data.train[0], prepared.tokenizer)
        ),
    }
    return "\n\n".join(f"== {title} ==\n{text}" for title, text in sections.items())


def _deepspeed(prepared: Prepared) -> str:
    """As DeepSpeed gets it, the sizes that depend on the adapter filled in."""
    config = copy.deepcopy(prepared.deepspeed)
    if config is not None:
        size_for_adapter(config, prepared.plan.trainable_sizes, prepared.plan.base_sizes)
    return json.dumps(config, indent=2)


def _model(prepared: Prepared) -> str:
    plan = prepared.plan
    shown = plan.adapted_layers[:4]
    more = len(plan.adapted_layers) - len(shown)
    names = ", ".join(shown) + (f", ... ({more} more)" if more > 0 else "")
    share = 100 * plan.trainable_parameters / plan.base_parameters
    return "\n".join(
        [
            f"base: {prepared.recipe.model.name_or_path}, {plan.base_parameters:,} parameters, frozen",
            f"adapted layers: {len(plan.adapted_layers)}: {names}",
            f"adapter parameters: {plan.trainable_parameters:,} in training ({share:.3f} %), "
            f"{plan.inference_parameters:,} of them at inference",
            f"attention: {prepared.attention} ({prepared.attention_reason})",
        ]
    )


def _data(prepared: Prepared, world_size: int) -> str:
    recipe, report = prepared.recipe, prepared.data.report
    training = recipe.training
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size
    sequences = len(prepared.data.train)
    per_epoch = math.ceil(sequences / batch)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(per_epoch * training.num_train_epochs)
    lines = [
        f"{batch} sequences a step ({training.per_device_train_batch_size} a device x "
        f"{training.gradient_accumulation_steps} accumulation x {world_size} devices)",
        f"{per_epoch} steps and {report['train']['num_tokens']:,} tokens an epoch; {steps} steps in all",
    ]
    for split, counts in report.items():
        lines.append(f"{split}: " + ", ".join(f"{key} {_shown(value)}" for key, value in counts.items()))
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _memory(prepared: Prepared, world_size: int) -> str:
    recipe = prepared.recipe
    estimate = estimate_memory(
        prepared.config.get_text_config(),
        base_parameters=prepared.plan.base_parameters,
        trainable_parameters=prepared.plan.trainable_parameters,
        bytes_per_weight=_BYTES[recipe.model.dtype],
        num_tokens=recipe.data.max_length * recipe.training.per_device_train_batch_size,
        stage=zero_stage(prepared.deepspeed),
        world_size=world_size,
        checkpointing=recipe.training.gradient_checkpointing,
    )
    return "\n".join(
        [
            f"base weights        {estimate.base_weights_gib:9.3f} GiB",
            f"gathered weights    {estimate.gathered_weights_gib:9.3f} GiB",
            f"adapter and states  {estimate.adapter_states_gib:9.3f} GiB",
            f"activations         {estimate.activations_gib:9.3f} GiB",
            f"total               {estimate.total_gib:9.3f} GiB (plus about 1 GiB of CUDA context)",
        ]
    )


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
