"""The commonsense suite: BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c, OBQA in LLM-Adapters' JSON format.

A record is {instruction, input, output, answer}; the instruction ends in "Answer format: true/false". Protocol of the
LoRA papers: the model writes on after the prompt (`prompts.py`), and the first answer that is found in what it wrote
counts. With `--mode loglikelihood` the answer of the largest likelihood counts instead, after the words that come
before it in the record's output ("the correct answer is ").
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fvae_dist.evaluation.choices import Question, choice_task
from fvae_dist.evaluation.prompts import render_prompt
from fvae_dist.evaluation.tasks import Options, Task, read_objects, text_column
from fvae_dist.training.recipe import RecipeError

_ANSWER_FORMAT = re.compile(r"Answer format:\s*(\S.*?)\s*$")


def commonsense_tasks(tokenizer: Any, options: Options) -> list[Task]:
    """One task for each set that is found at `--data commonsense=PATH`."""
    return [
        choice_task("commonsense", name, read_questions(path, options), tokenizer, options, default_mode="generate")
        for name, path in find_sets(options.path("commonsense")).items()
    ]


def find_sets(path: Path) -> dict[str, Path]:
    """The test sets of a folder by name: NAME.test.json, or NAME/test.json, or else every .json and .jsonl; or a file.

    Raises:
        RecipeError: the folder holds none.
    """
    if path.is_file():
        return {path.name.split(".")[0]: path}
    found = {file.name.removesuffix(".test.json"): file for file in sorted(path.glob("*.test.json"))}
    found = found or {file.parent.name: file for file in sorted(path.glob("*/test.json"))}
    found = found or {file.stem: file for file in sorted(path.iterdir()) if file.suffix in (".json", ".jsonl")}
    if not found:
        raise RecipeError(f"{path}: holds neither NAME.test.json nor NAME/test.json nor any .json file")
    return found


def read_questions(path: Path, options: Options, with_group: bool = False) -> list[Question]:
    """The questions of a file.

    The possible answers are the record's `choices`, or what its instruction names as "Answer format", or all answers
    that occur in the file.

    Raises:
        RecipeError: `file:line` and what is wrong there.
    """
    rows = list(read_objects(path, options.limit))
    answers = [text_column(row, "answer", where) for where, row in rows]
    occurring = tuple(sorted(set(answers)))
    leads = [_lead(text_column(row, "output", where, default=""), a) for (where, row), a in zip(rows, answers)]
    # A lead of one record's own may give its answer away.
    lead = leads[0] if len(set(leads)) == 1 else ""
    questions = []
    for (where, row), answer in zip(rows, answers, strict=True):
        instruction = text_column(row, "instruction", where)
        choices = _choices(row, instruction, where) or occurring
        if answer not in choices:
            raise RecipeError(f"{where}: the answer {answer!r} is none of {', '.join(choices)}")
        prompt = render_prompt(options.template, instruction, text_column(row, "input", where, default=""))
        group = text_column(row, "group", where) if with_group else None
        questions.append(Question(prompt, choices, answer, lead, group))
    return questions


def _lead(output: str, answer: str) -> str:
    return output[: output.index(answer)] if answer in output else ""


def _choices(row: dict[str, Any], instruction: str, where: str) -> tuple[str, ...]:
    given = row.get("choices")
    if given is not None:
        if not isinstance(given, list) or not given or not all(isinstance(choice, str) for choice in given):
            raise RecipeError(f'{where}: column "choices" must be a list of texts')
        return tuple(given)
    stated = _ANSWER_FORMAT.search(instruction)
    return tuple(stated.group(1).split("/")) if stated else ()
