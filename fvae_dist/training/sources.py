"""Sources: local files and Hub data sets, read one record at a time and checked before anything is trained.

A record that cannot be used stops the run at once with `file:line: what, which column`; nothing is skipped in silence.
The formats become one `Record`, so that everything after this file knows prompts, completions and messages only.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fvae_dist.training.recipe import RecipeError, SourceSection, one_line
from fvae_dist.training.source_files import EXTENSIONS, read_rows

# Our column names per format; `columns` in the recipe maps them to the file's.
COLUMNS = {
    "alpaca": ("instruction", "input", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "classification": ("text", "label"),
}

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
# Of LLM-Adapters (AGI-Edgerunners, `finetune.py`), whose lines stand as far in as in that file; the comment is one that
# stands inside the string there, and so in what models are trained on.
_PUBLISHED_INDENT = "\n" + " " * 16
_PUBLISHED_COMMENT = "  # noqa: E501\n"


@dataclass(frozen=True)
class Record:
    """One example as text.

    Either `messages` is filled, or `completion` with the `prompt` it continues ("" for format text: all of it is
    learned; format classification: the label, of the text in `prompt`). `number` is its line in the file (1-based); its
    row for Parquet files and Hub data sets.
    """

    number: int
    prompt: str = ""
    completion: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The Stanford-alpaca prompt, up to and with the newline after "### Response:"; evaluation must use the same."""
    # Filled in by replace, not format: an instruction may hold braces.
    template = _ALPACA_WITH_INPUT.replace("{input}", input) if input else _ALPACA_WITHOUT_INPUT
    head, tail = template.split("{instruction}", 1)
    return head + instruction + tail


def published_prompt(instruction: str, input: str = "") -> str:
    """The training prompt of LLM-Adapters, as the LoRA papers use it, up to where the answer begins."""
    head, _, _ = (_ALPACA_WITH_INPUT if input else _ALPACA_WITHOUT_INPUT).partition("\n")
    parts = {"Instruction": instruction} | ({"Input": input} if input else {}) | {"Response": ""}
    blocks = (f"### {name}:{_PUBLISHED_INDENT}{text}" for name, text in parts.items())
    return head + _PUBLISHED_COMMENT + _PUBLISHED_INDENT + (2 * _PUBLISHED_INDENT).join(blocks)


def source_name(source: SourceSection) -> str:
    """How messages and reports call a source: its path, or its Hub id."""
    return source.path or source.hub or ""


def place(source: SourceSection, number: int) -> str:
    """`file:line`, or `file: row N` where there are no lines (Parquet, Hub)."""
    has_lines = source.path is not None and Path(source.path).suffix != ".parquet"
    return f"{source_name(source)}:{number}" if has_lines else f"{source_name(source)}: row {number}"


def check_source(source: SourceSection) -> None:
    """Find what is wrong with a source before it is opened.

    Raises:
        RecipeError: missing file, directory, unknown extension, or a name in `columns` that the format does not have.
    """
    known = COLUMNS[source.format]
    for name in source.columns:
        if name not in known:
            what = f"columns: {name} is no column of format {source.format}"
            raise RecipeError(f"{source_name(source)}: {what}; known: {', '.join(known)}")
    if source.path is None:
        return
    path = Path(source.path)
    if path.is_dir():
        raise RecipeError(f"{path}: is a directory; name a file ({', '.join(EXTENSIONS)})")
    if path.suffix not in EXTENSIONS:
        raise RecipeError(f"{path}: unknown extension {path.suffix!r}; known: {', '.join(EXTENSIONS)}")
    if not path.is_file():
        raise RecipeError(f"{path}: there is no such file")
    if path.suffix == ".txt" and (source.format != "text" or source.columns):
        raise RecipeError(f"{path}: a .txt file has no columns: set format: text and no columns")


def fingerprint_source(source: SourceSection) -> str:
    """What a source's records depend on besides its settings: the sha256 of a file, the commit of a Hub data set.

    Raises:
        RecipeError: the file cannot be read, or the Hub does not answer.
    """
    if source.path is None:
        return f"{source.hub} {source.hub_config} {source.split} {_hub_revision(source)}"
    digest = hashlib.sha256()
    try:
        with open(source.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise RecipeError(f"{source.path}: cannot be read: {error.strerror}") from None
    return f"{Path(source.path).suffix} {digest.hexdigest()}"


def count_groups(source: SourceSection, column: str) -> dict[str, int]:
    """How many of a source's records (the first `limit`) each value of `column` has; most frequent first.

    Raises:
        RecipeError: a record without it.
    """
    counts: Counter[str] = Counter()
    rows = read_rows(source.path, {column}) if source.path else _read_hub(source)
    for number, row in islice(rows, source.limit):
        if not isinstance(row, dict) or row.get(column) is None:
            raise RecipeError(f'data.groups: {place(source, number)}: missing column "{column}"')
        counts[str(row[column])] += 1
    return dict(counts.most_common())


def read_records(source: SourceSection) -> Iterator[Record]:
    """Read and check the records of a source, the first `limit` of them (what follows is not even looked at).

    Raises:
        RecipeError: a record that cannot be used, named by file and line; or no record at all.
    """
    check_source(source)
    wanted = {source.columns.get(name, name) for name in COLUMNS[source.format]}
    rows = read_rows(source.path, wanted) if source.path else _read_hub(source)
    num_records = 0
    try:
        for number, row in rows:
            yield _check_row(row, source, number)
            num_records += 1
            if num_records == source.limit:
                return
    except OSError as error:
        raise RecipeError(f"{source_name(source)}: cannot be read: {error.strerror or one_line(error, 300)}") from None
    if num_records == 0:
        raise RecipeError(f"{source_name(source)}: holds no record")


# --------------------------------------------------------------------------------------------------- from row to record


def _check_row(row: Any, source: SourceSection, number: int) -> Record:
    where = place(source, number)
    if not isinstance(row, dict):
        raise RecipeError(f"{where}: a record must be an object, not {type(row).__name__}")
    if source.format == "messages":
        return Record(number, messages=_check_messages(_column(row, "messages", source, where), where))
    if source.format == "text":
        return Record(number, completion=_text(row, "text", source, where))
    if source.format == "classification":
        return Record(number, prompt=_text(row, "text", source, where), completion=_label(row, source, where))
    if source.format == "prompt_completion":
        # An empty prompt is allowed: the completion is then learned without one.
        prompt = _text(row, "prompt", source, where, may_be_empty=True)
        return Record(number, prompt=prompt, completion=_text(row, "completion", source, where))
    context = ""
    # `input` is the one optional column, but one that the recipe maps must be there.
    if "input" in source.columns or row.get("input") is not None:
        context = _text(row, "input", source, where, may_be_empty=True)
    render = published_prompt if source.template == "published" else alpaca_prompt
    prompt = render(_text(row, "instruction", source, where), context)
    return Record(number, prompt=prompt, completion=_text(row, "output", source, where))


def _column(row: dict[str, Any], name: str, source: SourceSection, where: str) -> Any:
    column = source.columns.get(name, name)
    if column not in row:
        raise RecipeError(f'{where}: missing column "{column}" (has: {", ".join(map(str, row)) or "none"})')
    return row[column]


def _text(row: dict[str, Any], name: str, source: SourceSection, where: str, may_be_empty: bool = False) -> str:
    value = _column(row, name, source, where)
    column = source.columns.get(name, name)
    _check_text(value, f'{where}: column "{column}"')
    if not may_be_empty and not value.strip():
        raise RecipeError(f'{where}: column "{column}" is empty')
    return value


def _label(row: dict[str, Any], source: SourceSection, where: str) -> str:
    """The label as text; a number or truth value too, written as the suites of evaluation write it."""
    value, column = _column(row, "label", source, where), source.columns.get("label", "label")
    if isinstance(value, int):  # bool is one
        return str(value).lower()
    _check_text(value, f'{where}: column "{column}"')
    if not value.strip():
        raise RecipeError(f'{where}: column "{column}" is empty')
    return value


def _check_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise RecipeError(f"{what} must be text, not {'null' if value is None else type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can escape half a surrogate pair, which no tokenizer takes
        raise RecipeError(f"{what} holds a lone surrogate, which is not a character") from None


def _check_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RecipeError(f"{where}: messages must be a non-empty list of {{role, content}}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RecipeError(f"{where}: messages[{index}] must be an object, not {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise RecipeError(f"{where}: messages[{index}] has no {key}")
            _check_text(message[key], f"{where}: messages[{index}].{key}")
    replies = [message["content"] for message in messages if message["role"] == "assistant"]
    if not replies:
        raise RecipeError(f"{where}: messages has no message of role assistant, so nothing to learn")
    if not replies[-1].strip():
        raise RecipeError(f"{where}: messages: the last assistant message is empty")
    return messages


# ---------------------------------------------------------------------------------------------------------- the Hub


def _hub_revision(source: SourceSection) -> str | None:
    """Commit of the Hub data set, so that a changed data set is tokenised anew; None where the Hub is switched off."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return HfApi().dataset_info(source_name(source)).sha
    except Exception as error:  # network, permission, name: whatever it is, the user has to see it with the id
        raise RecipeError(f"{source.hub}: cannot reach this data set on the Hub: {one_line(error, 300)}") from None


def _read_hub(source: SourceSection) -> Iterator[tuple[int, Any]]:
    """Rows of a Hub data set, kept in the usual Hugging Face cache as models are, so that it also works offline."""
    import datasets

    try:
        rows = datasets.load_dataset(source.hub, source.hub_config, split=source.split, revision=_hub_revision(source))
    except RecipeError:
        raise
    except Exception as error:  # load_dataset raises a dozen types, from unknown split to a lost connection
        raise RecipeError(f"{source.hub}: cannot load split {source.split}: {one_line(error, 300)}") from None
    yield from enumerate(rows, start=1)
