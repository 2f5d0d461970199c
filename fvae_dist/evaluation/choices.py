"""Questions with a few possible answers: asked in words and parsed, or by the likelihood of each answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from fvae_dist.evaluation.metrics import calibration, estimate, group_metrics
from fvae_dist.evaluation.tasks import Options, Sample, Task, continuation_rows, prompt_row, room_for_prompt


@dataclass(frozen=True)
class Question:
    """A prompt, its possible answers, and the right one.

    `lead` is what a trained model writes before the answer ("the correct answer is "); the likelihood mode puts it in
    front of each.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: str
    lead: str = ""
    group: str | None = None


def choice_task(
    suite: str, name: str, questions: list[Question], tokenizer: Any, options: Options, *, default_mode: str
) -> Task:
    """The task of answering `questions`, in the mode of `options`."""
    if (options.mode or default_mode) == "generate":
        return _generation_task(suite, name, questions, tokenizer, options)
    return _likelihood_task(suite, name, questions, tokenizer, options)


def answer_pattern(questions: list[Question]) -> re.Pattern[str]:
    """Matches any of the answers that occur in the set; the first match in a text is taken as its answer.

    A longer answer comes before one that it begins with. Of the family answer1, answer2, ... five are always known, as
    in the published protocol.
    """
    known = {choice for question in questions for choice in question.choices}
    if all(re.fullmatch(r"answer\d", choice) for choice in known):
        known |= {f"answer{number}" for number in range(1, 6)}
    return re.compile("|".join(re.escape(choice) for choice in sorted(known, key=lambda c: (-len(c), c))))


def _facts(question: Question, num_cut: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"choices": list(question.choices), "answer": question.answer}
    if question.group is not None:
        facts["group"] = question.group
    return facts | ({"num_cut_tokens": num_cut} if num_cut else {})


def _generation_task(suite: str, name: str, questions: list[Question], tokenizer: Any, options: Options) -> Task:
    max_new_tokens = options.max_new_tokens or 32  # as published
    room = room_for_prompt(suite, options, max_new_tokens)
    pattern = answer_pattern(questions)
    samples = []
    for index, question in enumerate(questions):
        row, num_cut = prompt_row(question.prompt, tokenizer, room)
        samples.append(Sample(index, [row], _facts(question, num_cut)))

    def judge(sample: Sample, text: str) -> dict[str, Any]:
        found = pattern.search(text)
        prediction = found.group() if found else None
        record = {"prediction": prediction, "correct": prediction == sample.facts["answer"], "output": text}
        return sample.facts | record

    def summarise(records: list[dict[str, Any]]) -> dict[str, Any]:
        failures = sum(record["prediction"] is None for record in records)
        return _summary(records, options.seed) | {"num_parse_failures": failures}

    return Task(suite, name, "generate", samples, judge, summarise, max_new_tokens)


def _likelihood_task(suite: str, name: str, questions: list[Question], tokenizer: Any, options: Options) -> Task:
    samples = []
    for index, question in enumerate(questions):
        answers = [question.lead + choice for choice in question.choices]
        rows, num_cut = continuation_rows(question.prompt, answers, tokenizer, options.max_length)
        samples.append(Sample(index, rows, _facts(question, num_cut)))

    def judge(sample: Sample, scores: list[tuple[float, int]]) -> dict[str, Any]:
        logits = np.array([log_probability for log_probability, _ in scores])
        return judge_logits(sample, logits, sample.facts["choices"])

    return Task(suite, name, "score", samples, judge, lambda records: summarise_probabilities(records, options.seed))


def judge_logits(sample: Sample, logits: Any, choices: list[str]) -> dict[str, Any]:
    """The record of a sample whose answers have these logits (log-probabilities up to a constant)."""
    odds = np.exp(logits - np.max(logits))
    prediction = choices[int(np.argmax(logits))]
    record = {
        "prediction": prediction,
        "correct": prediction == sample.facts["answer"],
        "probabilities": [float(p) for p in odds / odds.sum()],
    }
    return sample.facts | record


def summarise_probabilities(records: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Accuracy, groups and calibration of records with choices, answer and probabilities."""
    labels = [record["choices"].index(record["answer"]) for record in records]
    return _summary(records, seed) | {"calibration": calibration([r["probabilities"] for r in records], labels)}


def _summary(records: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    correct = [float(record["correct"]) for record in records]
    summary: dict[str, Any] = {"accuracy": estimate(correct, seed=seed), "num_samples": len(records)}
    num_cut = sum("num_cut_tokens" in record for record in records)
    if num_cut:
        summary["num_truncated"] = num_cut
    if all("group" in record for record in records):
        summary["groups"] = group_metrics(correct, [record["group"] for record in records], seed=seed)
    return summary
