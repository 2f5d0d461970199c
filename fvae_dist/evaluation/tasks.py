"""What the suites have in common: a task is samples for the model, a judgement of each, and a summary of all.

A suite (commonsense, gsm8k, ...) makes tasks (boolq, piqa, ...). `running.py` sends their samples through the model and
knows nothing of what they ask; a suite knows nothing of batches, ranks and files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.source_files import read_rows
from fvae_dist.training.tokenization import encode_completions, encode_texts

Kind = Literal["generate", "score", "classify"]


@dataclass(frozen=True)
class Row:
    """One sequence for the model: token ids, and which of them are scored (kind score: those with 1)."""

    ids: list[int]
    scored: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """One question: its place in the set, the rows that the model sees in one call, and what judging it takes."""

    index: int
    rows: list[Row]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return max(len(row.ids) for row in self.rows)


@dataclass(frozen=True)
class Task:
    """A set of samples that is judged as a whole.

    kind says what `judge` is given for a sample: generate, the text that the model wrote; score, for each row the
    sum of log-probabilities (nats) of its scored tokens and their number; classify, for each row the K logits.
    judge(sample, output) makes the record of one sample, JSON values; summarise(records) the metrics of the task.
    """

    suite: str
    name: str
    kind: Kind
    samples: list[Sample]
    judge: Callable[[Sample, Any], dict[str, Any]]
    summarise: Callable[[list[dict[str, Any]]], dict[str, Any]]
    max_new_tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Of all that the model will see and be judged by: data, template, tokenizer, limit."""
        digest = hashlib.sha256(f"{self.kind} {self.max_new_tokens}".encode())
        for sample in self.samples:
            digest.update(json.dumps(asdict(sample), sort_keys=True).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Options:
    """How the suites are run; one object for all of them."""

    data: dict[str, str] = field(default_factory=dict)
    mode: Literal["generate", "loglikelihood"] | None = None
    template: Literal["clean", "published"] = "clean"
    max_new_tokens: int | None = None
    max_length: int = 2048
    limit: int | None = None
    seed: int = 42
    repeats: int = 5  # of each of the needle's questions

    def path(self, suite: str) -> Path:
        """Where the data of a suite lies.

        Raises:
            RecipeError: not given, or not there.
        """
        if suite not in self.data:
            raise RecipeError(f"--suite {suite}: needs its data: --data {suite}=PATH")
        path = Path(self.data[suite])
        if not path.exists():
            raise RecipeError(f"--data {suite}: there is no {path}")
        return path


def room_for_prompt(suite: str, options: Options, max_new_tokens: int) -> int:
    """Tokens that are left for the prompt.

    Raises:
        RecipeError: none.
    """
    if max_new_tokens >= options.max_length:
        raise RecipeError(
            f"--max-new-tokens: {max_new_tokens} of {suite} leave no room for a prompt in {options.max_length} tokens"
        )
    return options.max_length - max_new_tokens


def prompt_row(prompt: str, tokenizer: Any, room: int) -> tuple[Row, int]:
    """A prompt to continue, at most `room` tokens of it, and how many were cut away (in front, after BOS)."""
    (ids,) = encode_texts([prompt], tokenizer)
    if ids[-1:] == [tokenizer.eos_token_id]:
        ids = ids[:-1]
    num_cut = max(0, len(ids) - room)
    head = 1 if ids[:1] == [tokenizer.bos_token_id] else 0
    return Row(ids[:head] + ids[head + num_cut :]), num_cut


def continuation_rows(prompt: str, continuations: Iterable[str], tokenizer: Any, room: int) -> tuple[list[Row], int]:
    """The prompt with each continuation, scored; and how many tokens of the prompt had to be cut away at most.

    Tokenised as one text, as in training. The end-of-text token is not scored: a base model that has never been taught
    where an answer ends would be judged by it.
    """
    continuations = list(continuations)
    rows, most_cut = [], 0
    for ids, scored in encode_completions([prompt] * len(continuations), continuations, tokenizer):
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids, scored = ids[:-1], scored[:-1]
        scored[0] = 0  # nothing predicts the first token
        num_cut = max(0, len(ids) - room)
        head = 1 if ids[:1] == [tokenizer.bos_token_id] else 0
        rows.append(Row(ids[:head] + ids[head + num_cut :], scored[:head] + scored[head + num_cut :]))
        most_cut = max(most_cut, num_cut)
    return rows, most_cut


def read_objects(path: Path, limit: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .json, .jsonl or .parquet file, each with its place (`file:line`).

    Raises:
        RecipeError: not such a file, a broken one, an entry that is no object, or none at all.
    """
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        raise RecipeError(f"{path}: must be a .json, .jsonl or .parquet file")
    num_rows = 0
    try:
        for number, row in read_rows(str(path), set()):
            where = f"{path}:{number}"
            if not isinstance(row, dict):
                raise RecipeError(f"{where}: a record must be an object, not {type(row).__name__}")
            yield where, row
            num_rows += 1
            if num_rows == limit:
                return
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None
    if num_rows == 0:
        raise RecipeError(f"{path}: holds no record")


def text_column(row: dict[str, Any], name: str, where: str, default: str | None = None) -> str:
    """A column that holds text; numbers and truth values become text, as labels often are.

    Raises:
        RecipeError: it is missing and has no default, is empty, or holds anything else.
    """
    value = row.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise RecipeError(f'{where}: missing column "{name}" (has: {", ".join(map(str, row)) or "none"})')
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, int):
        value = str(value)
    if not isinstance(value, str):
        raise RecipeError(f'{where}: column "{name}" must be text, not {type(value).__name__}')
    if not value.strip() and default is None:
        raise RecipeError(f'{where}: column "{name}" is empty')
    return value
