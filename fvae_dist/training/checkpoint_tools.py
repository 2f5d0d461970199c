"""What `fvae-dist checkpoint` does: look at a checkpoint, check it, take its adapter out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fvae_dist.adapter.export import CONFIG_FILE, copy_companions, written_aside
from fvae_dist.training.checkpoint_files import problem_with, read_manifest
from fvae_dist.training.checkpoints import list_checkpoints
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.resumable import STATE_FILE
from fvae_dist.training.saving import ADAPTER_FILE


def verify(path: str) -> str:
    """One line for each checkpoint of `path`, a checkpoint or the folder of a run.

    Raises:
        RecipeError: there is none, or one is damaged; the message names each of those.
    """
    folders = _checkpoints(path)
    problems = {folder: problem_with(folder) for folder in folders}
    damaged = [f"{folder}: {problem}" for folder, problem in problems.items() if problem]
    if damaged:
        raise RecipeError("; ".join(damaged))
    return "\n".join(f"{folder}: whole" for folder in folders)


def inspect(path: str) -> str:
    """Step, layout, versions, files and last losses of each checkpoint of `path`, as JSON."""
    return json.dumps([_describe(folder) for folder in _checkpoints(path)], indent=1)


def export(path: str, out: str) -> str:
    """Copy the adapter of a checkpoint, of a run the newest whole one, to the folder `out`, in PEFT's format."""
    whole = [folder for folder in _checkpoints(path) if not problem_with(folder)]
    if not whole:
        raise RecipeError(f"{path}: no whole checkpoint")
    if Path(out).resolve() in {folder.resolve() for folder in whole}:
        raise RecipeError(f"--out {out}: is a checkpoint; choose another folder")
    if not (whole[-1] / ADAPTER_FILE).is_file():
        raise RecipeError(f"{whole[-1]}: holds a whole model, no adapter: load it as it is")
    try:
        with written_aside(Path(out)) as aside:
            for name in (CONFIG_FILE, ADAPTER_FILE):
                shutil.copyfile(whole[-1] / name, aside / name)
            copy_companions(whole[-1], aside, Path(out))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--out {out}: {error}") from None
    return f"{out}: the adapter of {whole[-1]}"


def _checkpoints(path: str) -> list[Path]:
    folder = Path(path)
    if not folder.is_dir():
        raise RecipeError(f"{path}: no such folder")
    folders = list_checkpoints(folder) or ([folder] if folder.name.startswith("checkpoint-") else [])
    if not folders:
        raise RecipeError(f"{path}: holds no checkpoint-N")
    return folders


def _describe(folder: Path) -> dict[str, Any]:
    problem = problem_with(folder)
    if problem:
        return {"checkpoint": str(folder), "problem": problem}
    manifest = read_manifest(folder)
    history = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["log_history"]
    losses: dict[str, Any] = next((row for row in reversed(history) if "loss/task" in row), {})
    files = manifest.pop("files")
    return {
        "checkpoint": str(folder),
        **{key: value for key, value in manifest.items() if key != "sha256"},
        "bytes": sum(entry["size"] for entry in files.values()),
        "last_log": {key: losses[key] for key in ("step", "loss/task", "loss/neg_elbo") if key in losses},
    }
