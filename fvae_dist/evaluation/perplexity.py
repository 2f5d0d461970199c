"""The perplexity suite: loss and perplexity on the data section of a recipe, tokenised as in training.

`--data perplexity=RECIPE` takes its data.eval, `RECIPE:train` its data.train. Every record is a sequence of its own
(packing is for speed, and would join records); loss counts where the recipe says so (`completion_only_loss`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fvae_dist.evaluation.metrics import estimate
from fvae_dist.evaluation.tasks import Options, Row, Sample, Task
from fvae_dist.training.data import prepare_data
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.recipe_file import load_recipe
from fvae_dist.training.tokenization import IGNORED


def perplexity_tasks(tokenizer: Any, options: Options, output_dir: Path) -> list[Task]:
    """The one task of the suite.

    Args:
        output_dir: tokenised data is kept in its .data_cache.

    Raises:
        RecipeError: no recipe, one without data.eval, or what its data holds.
    """
    if "perplexity" not in options.data:
        raise RecipeError("--suite perplexity: needs a recipe: --data perplexity=RECIPE[:eval|:train]")
    path, split = _split_of(options.data["perplexity"])
    recipe = load_recipe(path)
    if split == "eval" and not recipe.data.eval:
        raise RecipeError(f"{path}: data.eval: is empty; --data perplexity={path}:train takes data.train")
    if recipe.model.task != "causal_lm":
        raise RecipeError(f"{path}: model.task: {recipe.model.task}: perplexity is of texts, not of their labels")
    section = recipe.data.model_copy(update={"packing": False})
    is_builder = os.environ.get("LOCAL_RANK", "0") == "0"
    prepared = prepare_data(
        section, tokenizer, seed=recipe.training.seed, output_dir=str(output_dir / "run"), is_builder=is_builder
    )
    dataset = prepared.train if split == "train" else prepared.eval
    assert dataset is not None
    samples = []
    for index, example in enumerate(dataset.select(range(min(len(dataset), options.limit or len(dataset))))):
        scored = [int(label != IGNORED) for label in example["labels"]]
        samples.append(Sample(index, [Row(example["input_ids"], scored)]))

    def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
        return summarise_losses(records, options.seed)

    counts = {key: value for key, value in prepared.report[split].items() if key != "sources"}
    return [Task("perplexity", split, "score", samples, judge_loss, summarise, facts={"data": counts})]


def _split_of(text: str) -> tuple[str, str]:
    path, _, split = text.rpartition(":")
    return (path, split) if split in ("eval", "train") and path else (text, "eval")


def judge_loss(sample: Sample, scores: list[tuple[float, int]]) -> dict[str, Any]:
    """The record of one sequence: its summed negative log-likelihood, nats, and over how many tokens."""
    ((log_probability, num_tokens),) = scores
    return {"nll": -log_probability, "num_tokens": num_tokens}


def summarise_losses(records: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Loss in nats per token over all tokens, and its exponential; intervals resample sequences."""
    nll, num_tokens = [r["nll"] for r in records], [r["num_tokens"] for r in records]
    loss = estimate(nll, num_tokens, seed=seed)
    return {
        "loss": loss,
        "perplexity": {name: float(np.exp(value)) for name, value in loss.items()},
        "num_samples": len(records),
        "num_tokens": int(sum(num_tokens)),
    }
