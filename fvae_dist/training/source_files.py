"""Source files: JSON, JSONL, Parquet and text read row by row, each row with the place where it stands in the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fvae_dist.training.recipe import RecipeError

EXTENSIONS = (".json", ".jsonl", ".parquet", ".txt")


def read_rows(path: str, wanted: set[str]) -> Iterator[tuple[int, Any]]:
    """The rows of a file, each with its number: the line on which it begins (1-based), for Parquet the row (1-based).

    Args:
        path: a file with one of `EXTENSIONS`.
        wanted: the columns that will be used; the others of a Parquet file are not decoded.

    Yields:
        (number, row); a row is whatever the file holds there, checked by the caller. Blank lines are skipped.

    Raises:
        RecipeError: the file is broken there: not UTF-8, not JSON, not Parquet.
    """
    if Path(path).suffix == ".parquet":
        return _read_parquet(path, wanted)
    return {".json": _read_json, ".jsonl": _read_jsonl, ".txt": _read_text}[Path(path).suffix](path)


def _decode(raw: bytes, path: str, line: int) -> str:
    """Decode the part of a file that starts on `line`; drops the byte-order mark that some editors write."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise RecipeError(f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x})") from None
    return text.removeprefix("\ufeff") if line == 1 else text


def _read_json(path: str) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array with the line on which each begins; the file is read whole."""
    text = _decode(Path(path).read_bytes(), path, 1)
    parse = json.JSONDecoder().raw_decode
    position, counted, line = _skip_space(text, 0), 0, 1
    if not text[position:]:
        raise RecipeError(f"{path}:1: the file is empty")
    if text[position] != "[":
        raise RecipeError(f"{path}:1: a .json file must be an array of objects (one object a line is .jsonl)")
    position = _skip_space(text, position + 1)
    if text.startswith("]", position):
        return
    while True:
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, end = parse(text, position)
        except (ValueError, RecursionError) as error:
            raise RecipeError(_broken_json(path, getattr(error, "lineno", line), error)) from None
        yield line, row
        position = _skip_space(text, end)
        if text.startswith("]", position):
            position = _skip_space(text, position + 1)
            if position == len(text):
                return
        elif text.startswith(",", position):
            position = _skip_space(text, position + 1)
            continue
        line += text.count("\n", counted, position)
        raise RecipeError(f"{path}:{line}: broken JSON: expected , or the end of the array")


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _read_jsonl(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            text = _decode(raw, path, line).strip()
            if not text:
                continue
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise RecipeError(_broken_json(path, line, error)) from None


def _broken_json(path: str, line: int, error: Exception) -> str:
    return f"{path}:{line}: broken JSON: {getattr(error, 'msg', None) or error}"


def _read_text(path: str) -> Iterator[tuple[int, Any]]:
    """Documents of a .txt file: blocks between blank lines, their own newlines kept."""
    block: list[str] = []
    first = 0
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            text = _decode(raw, path, line).rstrip("\r\n")
            if text.strip():
                first = first if block else line
                block.append(text)
            elif block:
                yield first, {"text": "\n".join(block)}
                block = []
    if block:
        yield first, {"text": "\n".join(block)}


def _read_parquet(path: str, wanted: set[str]) -> Iterator[tuple[int, Any]]:
    """Rows of a Parquet file, read in batches; only the wanted columns are decoded (all of them if there is none)."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            present = file.schema_arrow.names
            columns = [name for name in present if name in wanted] or present
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for index in range(batch.num_rows):
                    number += 1
                    # Row by row, so that text that is not UTF-8 (to_pylist decodes) can be blamed on its row.
                    yield number, batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: row {number}: not UTF-8") from None
    except pa.ArrowException as error:
        raise RecipeError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from None
