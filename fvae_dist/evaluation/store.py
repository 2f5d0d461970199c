"""Finished samples on disk: one JSON line each, written as they come: a killed evaluation goes on from there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from fvae_dist.training.recipe import RecipeError


class SampleStore:
    """The records of one task: FOLDER/SUITE/TASK.jsonl, and beside it the settings that they were made with.

    Only rank 0 has one. `records` maps a sample's index to its record.
    """

    def __init__(self, folder: Path, suite: str, task: str, settings: dict[str, Any], overwrite: bool):
        self.path = folder / suite / f"{task}.jsonl"
        self.settings_path = self.path.with_suffix(".settings.json")
        self.records: dict[int, dict[str, Any]] = {}
        self._settings = settings
        self._file: IO[str] | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self.path.unlink(missing_ok=True)
            self.settings_path.unlink(missing_ok=True)
        if self.path.exists():
            self._check_settings()
            self._load()

    def append(self, records: dict[int, dict[str, Any]]) -> None:
        """Add finished samples; they are with the operating system when this returns."""
        if self._file is None:
            # Only now: an evaluation that dies before its first sample, for a broken adapter, binds nobody.
            write_text(self.settings_path, json.dumps(self._settings, indent=1) + "\n")
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the store)
        for index, record in records.items():
            if index not in self.records:
                self.records[index] = record
                self._file.write(_line(index, record))
        self._file.flush()

    def close(self) -> None:
        """Close the file; it may be called twice."""
        if self._file is not None:
            self._file.close()

    def finish(self) -> list[dict[str, Any]]:
        """Write the file anew in the order of the set, whatever order the batches had; returns the records."""
        self.close()
        write_text(self.path, "".join(_line(index, record) for index, record in sorted(self.records.items())))
        return [record for _, record in sorted(self.records.items())]

    def _check_settings(self) -> None:
        settings = self._settings
        way_out = "choose another --out, or start anew with --overwrite"
        try:
            before = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise RecipeError(f"{self.path}: {self.settings_path.name} is missing or broken; {way_out}") from None
        for key in dict.fromkeys([*before, *settings]):
            if before.get(key) != settings.get(key):
                was, now = before.get(key), settings.get(key)
                what = key if len(f"{was}{now}") > 100 else f"{key} ({was}, now {now})"
                raise RecipeError(f"{self.path}: was made with another {what}; {way_out}")

    def _load(self) -> None:
        """Read what is there. A last line without its end was being written when the process died: it goes."""
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
                self.records.setdefault(record.pop("index"), record)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise RecipeError(f"{self.path}:{number}: broken; remove the line, or use --overwrite") from None
        if len(whole) < len(raw):
            os.truncate(self.path, len(whole))


def _line(index: int, record: dict[str, Any]) -> str:
    return json.dumps({"index": index, **record}, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader, or a crash, sees the old one or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
