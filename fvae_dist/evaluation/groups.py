"""The groups suite: average, per-group and worst-group accuracy of any labelled set with a `group` column.

Two forms of record. Answer as text: {instruction, input, output, answer, group}, asked as in the commonsense suite,
by likelihood unless `--mode generate`; for language models. Classification: {text, label, group}; for an adapter of
task type SEQ_CLS, whose classes are those of its labels.json, without one the labels in sorted order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fvae_dist.evaluation.choices import choice_task, judge_logits, summarise_probabilities
from fvae_dist.evaluation.commonsense import read_questions
from fvae_dist.evaluation.tasks import Options, Row, Sample, Task, read_objects, text_column
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.tokenization import encode_whole_texts


def groups_tasks(
    tokenizer: Any, options: Options, num_labels: int | None, classes: list[str] | None = None
) -> list[Task]:
    """The one task of the suite; its file is `--data groups=PATH`.

    Args:
        num_labels: of a classifier; None for a language model.
        classes: its labels, if they are known.

    Raises:
        RecipeError: `file:line` and what is wrong there; or records of the form for the other kind of model.
    """
    path = options.path("groups")
    is_text = next(iter(read_objects(path, 1)))[1].keys() >= {"text", "label"}
    if is_text and num_labels is None:
        raise RecipeError(f"{path}: text and label are for a classifier; a language model needs instruction and answer")
    if not is_text and num_labels is not None:
        raise RecipeError(f"{path}: a classifier (task type SEQ_CLS) needs the columns text, label and group")
    if num_labels is not None:
        return [_classification_task(path, tokenizer, options, num_labels, classes)]
    questions = read_questions(path, options, with_group=True)
    return [choice_task("groups", "groups", questions, tokenizer, options, default_mode="loglikelihood")]


def _classification_task(
    path: Path, tokenizer: Any, options: Options, num_labels: int, known: list[str] | None
) -> Task:
    rows = [
        (where, *(text_column(row, name, where) for name in ("text", "label", "group")))
        for where, row in read_objects(path, options.limit)
    ]
    classes = known or _classes_of(path, {label for _, _, label, _ in rows}, num_labels)
    for where, _, label, _ in rows:
        if label not in classes:
            raise RecipeError(f"{where}: label {label!r} is none of the classifier's: {', '.join(classes)[:200]}")
    samples = []
    all_ids = encode_whole_texts([text for _, text, _, _ in rows], tokenizer)
    for index, (ids, (_, _, label, group)) in enumerate(zip(all_ids, rows, strict=True)):
        num_cut = max(0, len(ids) - options.max_length)  # at the end, as in training
        facts: dict[str, Any] = {"choices": classes, "answer": label, "group": group}
        facts |= {"num_cut_tokens": num_cut} if num_cut else {}
        samples.append(Sample(index, [Row(ids[: options.max_length])], facts))

    def judge(sample: Sample, logits: list[list[float]]) -> dict[str, Any]:
        return judge_logits(sample, np.array(logits[0]), classes)

    def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
        return summarise_probabilities(records, options.seed)

    return Task("groups", "groups", "classify", samples, judge, summarise)


def _classes_of(path: Path, labels: set[str], num_labels: int) -> list[str]:
    """The classes of an adapter that does not name them."""
    classes = sorted(labels)
    if len(classes) > num_labels:
        raise RecipeError(f"{path}: has {len(classes)} labels, the classifier {num_labels}")
    # A set may lack a class: numbers name their class, whichever others occur.
    if all(label.isdecimal() and int(label) < num_labels for label in classes):
        return [str(number) for number in range(num_labels)]
    if len(classes) != num_labels:
        raise RecipeError(f"{path}: has {len(classes)} labels, the classifier {num_labels}; number them from 0")
    return classes
