"""The gsm8k suite: grade-school mathematics, exact match of the last number.

A record is {question, answer} as published (openai/gsm8k; the answer ends in "#### 72"), or {instruction, answer} as in
LLM-Adapters. The model writes on after the prompt (`prompts.py`); its answer is the number after "####" if it wrote
that, else the last number in its text. Numbers are compared as numbers: 72, 72.0 and $72 are the same, 1,000 is 1000.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from fvae_dist.evaluation.metrics import estimate
from fvae_dist.evaluation.prompts import render_prompt
from fvae_dist.evaluation.tasks import Options, Sample, Task, prompt_row, read_objects, room_for_prompt, text_column
from fvae_dist.training.recipe import RecipeError

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def gsm8k_tasks(tokenizer: Any, options: Options) -> list[Task]:
    """The one task of the suite; its file is `--data gsm8k=PATH`.

    Raises:
        RecipeError: `file:line` and what is wrong there.
    """
    max_new_tokens = options.max_new_tokens or 512
    room, path = room_for_prompt("gsm8k", options, max_new_tokens), options.path("gsm8k")
    samples = []
    for index, (where, row) in enumerate(read_objects(path, options.limit)):
        question = text_column(row, "question" if "question" in row else "instruction", where)
        answer = row.get("answer")
        expected = find_number(str(answer)) if isinstance(answer, (str, int, float)) else None
        if expected is None:
            raise RecipeError(f'{where}: column "answer" holds no number')
        prompt, num_cut = prompt_row(render_prompt(options.template, question), tokenizer, room)
        facts = {"answer": str(expected)} | ({"num_cut_tokens": num_cut} if num_cut else {})
        samples.append(Sample(index, [prompt], facts))

    def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
        return summarise_matches(records, options.seed)

    return [Task("gsm8k", "gsm8k", "generate", samples, judge_number, summarise, max_new_tokens)]


def find_number(text: str) -> Decimal | None:
    """The number after the last "####", else the last number in the text; None if there is none."""
    before, marker, after = text.rpartition("####")
    after_marker = _NUMBER.search(after) if marker else None
    found = [after_marker.group()] if after_marker else _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def judge_number(sample: Sample, text: str) -> dict[str, Any]:
    """The record of a sample whose facts hold the right number as `answer`."""
    number = find_number(text)
    correct = number is not None and number == Decimal(sample.facts["answer"])
    return sample.facts | {"prediction": None if number is None else str(number), "correct": correct, "output": text}


def summarise_matches(records: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Exact match, and how many texts held no number."""
    return {
        "accuracy": estimate([float(record["correct"]) for record in records], seed=seed),
        "num_samples": len(records),
        "num_parse_failures": sum(record["prediction"] is None for record in records),
        "num_truncated": sum("num_cut_tokens" in record for record in records),
    }
