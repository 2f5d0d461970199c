"""A comparison that was read and checked: its trials, and the recipe of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_dist.comparison.schema import Comparison
from fvae_dist.training.recipe import Recipe, RecipeError
from fvae_dist.training.recipe_file import load_recipe, load_strictly

# Which layers are adapted: what a method takes over from the recipe whatever its type.
_WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
# What tells trials apart, and where they write.
_OURS = ("training.seed", "training.learning_rate", "training.output_dir", "training.overwrite_output_dir")


@dataclass(frozen=True)
class Trial:
    """One training with its validation: `index` is what --trial takes."""

    index: int
    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}/lr{self.learning_rate!r}-seed{self.seed}"

    def __str__(self) -> str:
        return f"train {self.method} learning_rate={self.learning_rate!r} seed={self.seed}"


@dataclass(frozen=True)
class Test:
    """The test of a method's chosen learning rate with one seed: `index` goes on after the trials'."""

    index: int
    method: str
    seed: int

    def __str__(self) -> str:
        return f"test {self.method} seed={self.seed}"


@dataclass(frozen=True)
class Study:
    """The comparison, the common recipe, and each method's whole adapter section."""

    comparison: Comparison
    recipe: Recipe
    adapters: dict[str, dict[str, Any]]

    @property
    def output(self) -> Path:
        return Path(self.comparison.output)

    def trials(self) -> list[Trial]:
        """Every method with every learning rate and seed: each has the same number, of the same steps."""
        asked = self.comparison
        cells = [(m, lr, seed) for m in asked.methods for lr in asked.learning_rates for seed in asked.seeds]
        return [Trial(index, *cell) for index, cell in enumerate(cells)]

    def tests(self) -> list[Test]:
        """Every method with every seed, at the learning rate that validation chooses."""
        asked = self.comparison
        first = len(asked.methods) * len(asked.learning_rates) * len(asked.seeds)
        cells = [(method, seed) for method in asked.methods for seed in asked.seeds]
        return [Test(first + index, *cell) for index, cell in enumerate(cells)]

    def folder(self, trial: Trial) -> Path:
        return self.output / "trials" / trial.name

    def recipe_of(self, trial: Trial) -> dict[str, Any]:
        """The trial's recipe as YAML holds it: the common one but for adapter, seed and learning rate."""
        values = self.recipe.model_dump()
        values["adapter"] = self.adapters[trial.method]
        values["training"] |= {
            "seed": trial.seed,
            "learning_rate": trial.learning_rate,
            "output_dir": str(self.folder(trial) / "train"),
            "overwrite_output_dir": False,
        }
        values["logging"]["tensorboard"] = True  # speed and memory are read there
        values["data"]["cache_dir"] = self.recipe.data.cache_dir or str(self.output / "data_cache")
        return values


def load_study(path: str | Path) -> Study:
    """Read a comparison, its recipe, and every method's adapter section.

    Raises:
        RecipeError: names the file, and line and key where there are; also a recipe that launch/evaluate.py could not
            evaluate, or a method that PEFT does not know.
    """
    path = Path(path)
    comparison = load_strictly(path, Comparison)
    for text in comparison.set:
        if text.partition("=")[0].strip() in _OURS:
            raise RecipeError(f"{path}: set: {text}: is set by the comparison itself")
    try:
        recipe = load_recipe(path.parent / comparison.recipe, comparison.set)
    except RecipeError as error:
        message = str(error)
        raise RecipeError(f"{path}: set: {message[6:]}" if message.startswith("--set ") else message) from None
    _check_evaluable(path, recipe)
    adapters = {name: _adapter(recipe.adapter, changes) for name, changes in comparison.methods.items()}
    study = Study(comparison, recipe, adapters)
    _check_suites(path, comparison)
    _check_adapters(path, study)
    return study


def _check_evaluable(path: Path, recipe: Recipe) -> None:
    model = recipe.model
    if model.random_weights:
        raise RecipeError(f"{path}: recipe: model.random_weights: launch/evaluate.py needs saved weights")
    for key in ("revision", "tokenizer"):
        if getattr(model, key) is not None:
            raise RecipeError(
                f"{path}: recipe: model.{key}: launch/evaluate.py takes a local folder or the Hub's newest"
            )


def _adapter(common: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A method's adapter section; a key of the recipe's is left out by giving it null."""
    own_type = common.get("peft_type", "FVAE_LORA")
    peft_type = changes.get("peft_type", own_type)
    where = () if peft_type == "FULL" else _WHERE
    kept = common if peft_type == own_type else {key: common[key] for key in where if key in common}
    merged = {"peft_type": peft_type, **kept, **changes}
    return {key: value for key, value in merged.items() if value is not None}


def _check_suites(path: Path, comparison: Comparison) -> None:
    from fvae_dist.evaluation.suites import parse_suites

    for name in ("validation", "test"):
        try:
            parse_suites(getattr(comparison, name).suite)
        except RecipeError as error:
            raise RecipeError(f"{path}: {name}.suite: {str(error).removeprefix('--suite').lstrip(': ')}") from None


def _check_adapters(path: Path, study: Study) -> None:
    """As train.py will check each, before the first of them is trained."""
    from fvae_dist.training.full import is_full
    from fvae_dist.training.methods import check_method
    from fvae_dist.training.modeling import build_peft_config

    for name, adapter in study.adapters.items():
        recipe = study.recipe.model_copy(update={"adapter": adapter})
        try:
            if not is_full(adapter):
                build_peft_config(adapter)
            check_method(recipe)
        except RecipeError as error:
            raise RecipeError(f"{path}: methods.{name}: {error}") from None
