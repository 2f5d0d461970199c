"""A comparison that can be run: a tiny model with weights, data, a recipe, and the comparison's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.evaluating import boolq, write_adapted, write_json
from tests.recipes import recipe_values, write_recipe, write_records

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}


def comparison_values(folder: Path, **changes: Any) -> dict[str, Any]:
    """The comparison as YAML holds it, beside its recipe; no model is needed to read it."""
    training = {"max_steps": 3, "use_cpu": True, "save_steps": 2, "per_device_eval_batch_size": 8}
    sections = {"training": training, "model": {"random_weights": False}, "logging": {"steps": 1}}
    values = recipe_values(folder, folder / "base", **sections)
    values["data"]["eval"] = [{"path": str(folder / "data.jsonl")}]
    values["evaluation"] = {"at_end": True}
    recipe = write_recipe(folder, values)
    return {
        "recipe": recipe.name,
        "methods": {"fvae": {}, "lora": LORA, "pissa": {**LORA, "init_lora_weights": "pissa"}},
        "seeds": [0],
        "learning_rates": [1e-2],
        "validation": {"suite": "perplexity", "data": f"{recipe}:eval", "metric": "perplexity/eval/loss"},
        "test": {"suite": "groups", "data": str(folder / "groups.json"), "metric": "groups/groups/accuracy"},
        "output": str(folder / "out"),
        **changes,
    }


def write_comparison(folder: Path, **changes: Any) -> Path:
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(comparison_values(folder, **changes), sort_keys=False))
    return path


def write_inputs(folder: Path) -> None:
    """The model, and the data of training, validation and test."""
    write_adapted(folder)
    write_records(folder / "data.jsonl")
    write_json(folder / "groups.json", boolq("ttf", group="easy") + boolq("ff", group="hard"))
