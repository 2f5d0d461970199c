"""Checkpoint folders on disk: written aside, published by a rename, checked file by file before they are trusted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
_BLOCK = 1 << 20


def publish(folder: Path, write: Callable[[Path], None], facts: dict[str, Any]) -> None:
    """Make `folder` appear complete or not at all.

    Args:
        write: fills the folder it is given.
        facts: what the manifest says beside files, sizes and checksums; JSON.

    Raises:
        OSError: nothing was published; what stood there before still does.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        files = {path.relative_to(aside).as_posix(): path for path in sorted(aside.rglob("*")) if path.is_file()}
        entries = {name: {"size": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
        manifest = {"format": FORMAT, **facts, "files": entries}
        manifest["sha256"] = _digest(manifest)
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*files.values(), aside / MANIFEST]:
            _sync(path)
        _sync(aside)
        _replace(aside, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def problem_with(folder: Path) -> str:
    """Why a checkpoint must not be loaded; empty if every byte of it is what was written."""
    if not folder.is_dir():
        return "no such folder"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        claimed = manifest.pop("sha256")
        entries = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or unreadable"
    if claimed != _digest(manifest):
        return f"{MANIFEST} was changed after it was written"
    if manifest["format"] != FORMAT:
        return f"its format is {manifest['format']!r}, this version reads {FORMAT}"
    for name, entry in entries.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            return f"{MANIFEST} names {name}, outside the checkpoint"
        if path.is_symlink():
            return f"{name} is a link"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes, {entry['size']} were written"
    for name, entry in entries.items():
        if sha256(folder / name) != entry["sha256"]:
            return f"{name} is not what was written (its checksum differs)"
    return ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that `problem_with` found no fault in."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def remove_leftovers(output_dir: Path) -> None:
    """Delete what killed writers left. Only for the one run that holds the folder's lock."""
    for path in [*output_dir.glob(".checkpoint-*.partial"), *output_dir.glob(".checkpoint-*.old")]:
        shutil.rmtree(path, ignore_errors=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _replace(aside: Path, folder: Path) -> None:
    """Rename into place; a folder cannot be renamed over another, so that one steps aside first."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(aside, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the system write it out: a power cut must not leave a published folder of empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
