"""RoPE scaling: `model.rope_scaling` put into the model's configuration, and kept with the adapter trained under it.

An adapter is right only with the positions that it was trained with, and PEFT's files say nothing of them. So the run
writes `rope_scaling.json` beside adapter_config.json; whatever loads the adapter here applies it, and refuses a base
where that leads to other rotary parameters than the run's.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn
from transformers import PretrainedConfig

from fvae_dist.adapter.export import ROPE_SCALING_FILE, read_json
from fvae_dist.training.recipe import RecipeError, RopeScalingSection

logger = logging.getLogger(__name__)
_SCALING_KEYS = {"rope_type", "short_factor", "long_factor", *RopeScalingSection.model_fields}


def apply_rope_scaling(config: PretrainedConfig, section: RopeScalingSection, name: str) -> None:
    """Set `rope_parameters` and `max_position_embeddings` of `config`; theta and what else is no scaling are kept.

    max_position_embeddings becomes factor times the original, but for dynamic: transformers' formula takes it for the
    original there. `positions_of` knows.

    Args:
        name: of the model, for messages.

    Raises:
        RecipeError: the model has no RoPE, one for each kind of layer, or a scaling of its own while
            original_max_position_embeddings is not stated.
    """
    text_config: Any = config.get_text_config()
    own = getattr(text_config, "rope_parameters", None)
    if not own or getattr(text_config, "max_position_embeddings", None) is None:
        raise RecipeError(f"model.rope_scaling: {name} ({config.model_type}) has no rotary position embeddings (RoPE)")
    if any(isinstance(value, dict) for value in own.values()):
        raise RecipeError(f"model.rope_scaling: {name} has a RoPE for each kind of layer, which is not supported")
    original = section.original_max_position_embeddings
    if original is None:
        if own.get("rope_type", "default") != "default":
            raise RecipeError(
                f"model.rope_scaling: {name} already scales its RoPE (type {own['rope_type']}), which this would "
                "replace: state original_max_position_embeddings, its positions before any scaling"
            )
        original = text_config.max_position_embeddings
    given = section.model_dump(exclude_none=True, exclude={"type", "original_max_position_embeddings"})
    kept = {key: value for key, value in own.items() if key not in _SCALING_KEYS}
    parameters = {**kept, "rope_type": section.type, **given}
    if section.type in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = original
    if hasattr(text_config, "original_max_position_embeddings"):
        text_config.original_max_position_embeddings = original  # where there is one, transformers prefers it
    text_config.max_position_embeddings = original if section.type == "dynamic" else int(original * section.factor)
    text_config.rope_parameters = parameters


def positions_of(config: PretrainedConfig) -> int | None:
    """The longest sequence; None where the architecture has no limit."""
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    rope = getattr(text_config, "rope_parameters", None) or {}
    if positions is not None and rope.get("rope_type") == "dynamic":
        return int(positions * rope["factor"])
    return positions


def check_scaled(model: nn.Module, section: RopeScalingSection | None, name: str) -> None:
    """RecipeError where no module of the built model took the scaling: an architecture that reads other settings."""
    if section is None:
        return
    if not any(getattr(module, "rope_type", None) == section.type for module in model.modules()):
        raise RecipeError(f"model.rope_scaling: {name}: its architecture takes no RoPE of type {section.type}")


def describe_scaling(config: PretrainedConfig, section: RopeScalingSection) -> str:
    """One line for logs and reports."""
    stated = section.model_dump(exclude_none=True, exclude={"type"})
    shown = ", ".join(f"{key} {value}" for key, value in stated.items())
    return f"RoPE scaling: {section.type}, {shown}: {positions_of(config):,} positions"


def settings_of(config: PretrainedConfig) -> dict[str, Any]:
    """What the scaling changed: keyword arguments with which transformers loads the base as it was in the run."""
    text_config: Any = config.get_text_config()
    return {
        "rope_parameters": dict(text_config.rope_parameters),
        "max_position_embeddings": text_config.max_position_embeddings,
    }


def write_scaling(folder: Path, config: PretrainedConfig, section: RopeScalingSection | None) -> None:
    """Write rope_scaling.json into an adapter's folder; without scaling, remove what another run left there."""
    path = folder / ROPE_SCALING_FILE
    if section is None:
        path.unlink(missing_ok=True)
        return
    record = {"rope_scaling": section.model_dump(exclude_none=True), "result": settings_of(config)}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def apply_saved_scaling(config: PretrainedConfig, folder: Path, name: str) -> RopeScalingSection | None:
    """Scale a base's configuration as the adapter in `folder` was trained with, and log it; None: without scaling.

    Raises:
        RecipeError: rope_scaling.json is broken, or does not lead to the run's rotary parameters with this base.
    """
    path = folder / ROPE_SCALING_FILE
    if not path.exists():
        return None
    try:
        record = read_json(path)
        section = RopeScalingSection.model_validate(record.get("rope_scaling"))
        apply_rope_scaling(config, section, name)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, ("rope_scaling", *detail["loc"])))
        raise RecipeError(f"{path}: {where}: {detail['msg'].removeprefix('Value error, ')}") from None
    except (ValueError, RecipeError, OSError) as error:
        raise RecipeError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    if record.get("result") != settings_of(config):
        raise RecipeError(
            f"{path}: with {name} this gives {settings_of(config)}, but the adapter was trained with "
            f"{record.get('result')}: another base model?"
        )
    logger.info("%s (%s)", describe_scaling(config, section), path)
    return section
