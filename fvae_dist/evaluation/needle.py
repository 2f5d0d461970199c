"""The needle suite: a number hidden in a long text, to be found again.

`--data needle=FILE` is a text that the number is hidden in (repeated if it is too short); without it a few plain
sentences are. One question for each length (a quarter, half and all of `--max-length`) and depth (0 to 100 % of the
text), `--repeats` numbers each; the answer is right if the first number that the model writes is the hidden one.

The numbers are multiples of 7, which those of `needle_data.py`, that a model may have been trained on, never are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fvae_dist.evaluation.metrics import estimate
from fvae_dist.evaluation.prompts import render_prompt
from fvae_dist.evaluation.tasks import Options, Sample, Task, prompt_row, room_for_prompt
from fvae_dist.training.recipe import RecipeError

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
LONGEST_NUMBER = "8888888"  # what lengths are measured with
_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. The river runs down to the sea. "
    "In the morning the market opens, and in the evening it closes again. "
)
_NEEDLE = "The secret number is"
_QUESTION = "What is the secret number that the text above mentions? Answer with the number alone."


def needle_tasks(tokenizer: Any, options: Options) -> list[Task]:
    """The one task of the suite.

    Raises:
        RecipeError: no such text, or no room for it in `--max-length`.
    """
    max_new_tokens = options.max_new_tokens or 16
    room = room_for_prompt("needle", options, max_new_tokens)
    words = filler_words(options.path("needle") if "needle" in options.data else None, "--data needle")
    generator = np.random.default_rng(options.seed)
    samples: list[Sample] = []
    for length in sorted({room // 4, room // 2, room}):
        num_words = _fitting_words(words, length, tokenizer, options.template)
        for depth in DEPTHS:
            for _ in range(options.repeats):
                number = draw_number(generator, "evaluation")
                row, _ = prompt_row(needle_prompt(words, num_words, depth, number, options.template), tokenizer, room)
                facts = {"answer": number, "depth": depth, "length": length}
                samples.append(Sample(len(samples), [row], facts))
    samples = samples[: options.limit]

    def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
        return summarise_needles(records, options.seed)

    return [Task("needle", "needle", "generate", samples, judge_needle, summarise, max_new_tokens)]


def draw_number(generator: np.random.Generator, use: Literal["training", "evaluation"]) -> str:
    """A number of seven digits: for evaluation a multiple of 7, for training none, so that no seed makes them meet."""
    number = 7 * int(generator.integers(142_858, 1_428_571))
    return str(number if use == "evaluation" else number + int(generator.integers(1, 7)))


def filler_words(path: Path | None, option: str) -> list[str]:
    """The words that a number is hidden among: of a text file, or of a few plain sentences.

    Raises:
        RecipeError: naming `option`: the file is no text, is empty, or tells of a secret number itself.
    """
    if path is None:
        return _FILLER.split()
    try:
        words = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{option}: {path}: is no readable text: {error}") from None
    if not words:
        raise RecipeError(f"{option}: {path}: is empty")
    if _NEEDLE in " ".join([*words, *words]):
        raise RecipeError(f"{option}: {path}: holds '{_NEEDLE}' itself")
    return words


def needle_prompt(words: list[str], num_words: int, depth: float, number: str, template: str, start: int = 0) -> str:
    """The prompt that asks for `number`, hidden at `depth` (0 to 1) of `num_words` of the filler, from word `start`."""
    text = hide_number(words, num_words, depth, number, start)
    return render_prompt(template, f"{text}\n\n{_QUESTION}")


def hide_number(words: list[str], num_words: int, depth: float, number: str, start: int = 0) -> str:
    """The text that `needle_prompt` asks about."""
    text = [words[(start + i) % len(words)] for i in range(num_words)]
    text.insert(round(depth * num_words), f"{_NEEDLE} {number}.")
    return " ".join(text)


def _fitting_words(words: list[str], length: int, tokenizer: Any, template: str) -> int:
    """The most words of filler with which the prompt has no more than `length` tokens."""

    def num_tokens(num_words: int) -> int:
        # About the longest of them: a number's tokens depend on its digits and its place.
        return len(
            prompt_row(needle_prompt(words, num_words, 0.5, LONGEST_NUMBER, template), tokenizer, 1 << 40)[0].ids
        )

    if num_tokens(0) > length:
        raise RecipeError(f"--max-length: a needle's question does not fit into {length} tokens")
    low, high = 0, length  # a word has a token at least
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if num_tokens(middle) <= length else (low, middle - 1)
    return low


def judge_needle(sample: Sample, text: str) -> dict[str, Any]:
    """The record of one hidden number."""
    found = re.search(r"\d[\d,]*", text)
    prediction = found.group().replace(",", "") if found else None
    return sample.facts | {"prediction": prediction, "correct": prediction == sample.facts["answer"], "output": text}


def summarise_needles(records: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Accuracy over all, of each length, each depth, and both ("length x depth %")."""
    cells, depths, lengths = (dict[str, list[bool]]() for _ in range(3))
    for record in records:
        length, depth = str(record["length"]), f"{record['depth']:.0%}"
        for groups, name in ((cells, f"{length} x {depth}"), (depths, depth), (lengths, length)):
            groups.setdefault(name, []).append(record["correct"])
    return {
        "accuracy": estimate([float(record["correct"]) for record in records], seed=seed),
        "num_samples": len(records),
        "num_parse_failures": sum(record["prediction"] is None for record in records),
        "cells": _shares(cells),
        "depths": _shares(depths),
        "lengths": _shares(lengths),
    }


def _shares(groups: dict[str, list[bool]]) -> dict[str, float]:
    return {name: sum(correct) / len(correct) for name, correct in groups.items()}
