"""The model card: front matter that the Hub reads, and what the adapter was trained from."""

import yaml

from fvae_dist.training.card import package_versions, write_model_card
from fvae_dist.training.recipe import Recipe
from tests.recipes import recipe_values

REPORT = {"train": {"num_records": 3, "sources": [{"name": "data.jsonl", "num_records": 3}]}}


def write(folder, **sections) -> tuple[dict, str]:
    values = recipe_values(folder, folder, **sections)
    write_model_card(
        folder, Recipe.model_validate(values), REPORT, {"eval_end_loss": 1.23456789, "steps": 7, "x": None}
    )
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def blocks(text: str) -> dict[str, str]:
    """Section title -> contents."""
    return dict(part.split("\n", 1) for part in text.split("\n## ")[1:])


def test_card_lists_base_recipe_data_versions_and_metrics(tmp_path):
    front, text = write(tmp_path, model={"name_or_path": "meta-llama/Meta-Llama-3-8B"}, training={"seed": 17})
    assert front["base_model"] == "meta-llama/Meta-Llama-3-8B"
    assert front["library_name"] == "peft"
    assert front["tags"] == ["fvae-lora"]
    assert "FVAE_LORA adapter for meta-llama/Meta-Llama-3-8B" in text
    parts = blocks(text)
    assert "| eval_end_loss | 1.23457 |" in parts["Metrics"]
    assert "| steps | 7 |" in parts["Metrics"]
    assert yaml.safe_load(parts["Data"].split("```")[1].removeprefix("yaml")) == REPORT
    recipe = yaml.safe_load(parts["Recipe"].split("```")[1].removeprefix("yaml"))
    assert recipe["training"]["seed"] == 17
    assert Recipe.model_validate(recipe).training.seed == 17
    for name, version in package_versions().items():
        assert f"| {name} | {version} |" in parts["Versions"]


def test_card_of_a_local_base_names_no_hub_model(tmp_path):
    front, text = write(tmp_path)
    assert "base_model" not in front
    assert str(tmp_path) in text


def test_card_of_a_baseline_carries_its_name(tmp_path):
    front, text = write(tmp_path, adapter={"peft_type": "LORA"})
    assert front["tags"] == ["lora"]
    assert "LORA adapter for" in text


def test_versions_name_the_packages_that_decide_a_run():
    versions = package_versions()
    assert {"torch", "transformers", "peft", "trl", "deepspeed", "fvae-dist"} <= set(versions)
    assert versions["torch"] != "not installed"
