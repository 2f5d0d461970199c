"""What is told of the recipe's schema: the text of --help-recipe, and the nearest known key to a wrong one."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from fvae_dist.training.recipe import Recipe

# Names of transformers' that say the same as a key here, far from it as they are spelt.
_SYNONYMS = {"gradient_checkpointing": "recompute", "gradient_checkpointing_kwargs": "recompute"}


def unknown_key(key: str, known: list[str]) -> str:
    """The message for an unknown key: the nearest known one."""
    if _SYNONYMS.get(key) in known:
        return f"unknown key; did you mean {_SYNONYMS[key]}?"
    folded = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(key.lower(), list(folded), n=1, cutoff=0.0)
    return f"unknown key; did you mean {folded[nearest[0]]}?" if nearest else "unknown key"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, alone, in a list or where it is optional; None for a plain value."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def describe_recipe() -> str:
    """The text of `--help-recipe`: every section and key with type, default and meaning."""
    parts = []
    for name, field in Recipe.model_fields.items():
        parts.append(f"{name}:")
        if name == "adapter":
            parts.append(f"  # {field.description} Of FVAE_LORA:")
            parts += _describe_adapter("  ")
            continue
        parts += _describe(field.annotation, "  ")  # type: ignore[arg-type]
    return "\n".join(parts)


def _describe_adapter(indent: str) -> list[str]:
    from fvae_dist.adapter.config import FVAELoraConfig

    own = [field for field in dataclasses.fields(FVAELoraConfig) if field.name in FVAELoraConfig.__annotations__]
    return [f"{indent}{f.name}: {f.type}, default {f.default!r}\n{indent}    {f.metadata['help']}" for f in own]


def _describe(section: type[BaseModel], indent: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        annotation, nested = field.annotation, section_of(field.annotation)
        if nested is not None:
            kind = "A list" if get_origin(annotation) is list else "Default: none. A mapping"
            rows.append(f"{indent}{name}: # {field.description} {kind}{', as train' if name == 'eval' else ' of:'}")
            if name != "eval":
                rows += _describe(nested, indent + "    ")
            continue
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
        rows.append(f"{indent}{name}: {kind}, {default}\n{indent}    {field.description}")
    return rows
