"""The model card of an adapter, or of a model that was trained as a whole: what it was trained from, on and with."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from fvae_dist.training.full import is_full
from fvae_dist.training.recipe import Recipe

# A scaled RoPE stands in its config.json.
_LOAD_WHOLE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
"""
_PACKAGES = ("fvae-dist", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets")


def package_versions(names: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Installed versions of the packages that decide a run."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def write_model_card(
    folder: Path,
    recipe: Recipe,
    data_report: dict[str, Any],
    metrics: dict[str, Any],
    scaled: dict[str, Any] | None = None,
) -> None:
    """Write README.md into the folder that was saved; front matter as the Hub reads it.

    Args:
        scaled: settings of the base that a RoPE scaling changed, which PEFT would not know of.
    """
    base = recipe.model.name_or_path
    is_whole = is_full(recipe.adapter)
    front = {"base_model": base, "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["fvae-lora"]}
    classes = data_report.get("train", {}).get("labels")
    if classes is not None:
        front["pipeline_tag"] = "text-classification"
    if str(recipe.adapter.get("peft_type", "FVAE_LORA")) != "FVAE_LORA":
        front["tags"] = [str(recipe.adapter["peft_type"]).lower()]
    if is_whole:
        front |= {"library_name": "transformers", "tags": []}
    if Path(base).exists():
        del front["base_model"]  # the Hub only takes ids there
    title = f"{recipe.adapter.get('peft_type', 'FVAE_LORA')} adapter for {base}"
    code = _how_to_load(base, scaled, classes)
    if is_whole:
        title, code = f"{base}, fine-tuned in full", _LOAD_WHOLE
    numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    recipe_yaml = yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)
    text = (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# {title}\n\nLoad with plain {'transformers' if is_whole else 'PEFT'}:\n\n```python\n{code}```\n\n"
        f"## Metrics\n\n{_table(numbers)}\n\n## Data\n\n```yaml\n{yaml.safe_dump(data_report, sort_keys=False)}```\n\n"
        f"## Recipe\n\n```yaml\n{recipe_yaml}```\n\n## Versions\n\n{_table(package_versions())}\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _how_to_load(base: str, scaled: dict[str, Any] | None, classes: Iterable[str] | None) -> str:
    """Python code; with a scaled RoPE the base has to be loaded as it was in the run, with classes under a head."""
    imports = "import fvae_dist  # registers FVAE_LORA with PEFT\n"
    if classes is not None:
        known = {"id2label": dict(enumerate(classes)), **(scaled or {})}
        arguments = "".join(f"    {key}={value!r},\n" for key, value in known.items())
        return (
            f"{imports}from peft import PeftModel\nfrom transformers import AutoModelForSequenceClassification\n\n"
            f"base = AutoModelForSequenceClassification.from_pretrained(\n    {base!r},\n{arguments})\n"
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")  # for batches set base.config.pad_token_id\n'
        )
    if scaled is None:
        return (
            f"{imports}from peft import AutoPeftModelForCausalLM\n\n"
            'model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
        )
    settings = "".join(f"    {key}={value!r},\n" for key, value in scaled.items())
    return (
        f"{imports}from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        "# Trained with a scaled RoPE (rope_scaling.json): wrong without it.\n"
        f"base = AutoModelForCausalLM.from_pretrained(\n    {base!r},\n{settings})\n"
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n'
    )


def _table(rows: dict[str, Any]) -> str:
    lines = [
        f"| {key} | {value:.6g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in rows.items()
    ]
    return "\n".join(["| name | value |", "|---|---|", *lines])
