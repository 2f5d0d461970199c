"""Which checkpoint to resume from, and what a new run may overwrite."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.saving import ADAPTER_FILE

logger = logging.getLogger(__name__)


def find_checkpoint(resume: str | None, output_dir: str | Path) -> str | None:
    """The checkpoint that `--resume` names.

    Args:
        resume: None, "auto" (newest complete one in `output_dir`, none is fine) or a checkpoint folder.

    Raises:
        RecipeError: the folder named is not a complete checkpoint, or `output_dir` can be no folder.
    """
    _check_is_folder(Path(output_dir))
    if resume is None:
        return None
    if resume != "auto":
        problem = what_is_missing(Path(resume))
        if problem:
            raise RecipeError(f"--resume {resume}: not a complete checkpoint: {problem}")
        return str(resume)
    for folder in reversed(list_checkpoints(output_dir)):
        problem = what_is_missing(folder)
        if not problem:
            logger.info("resuming from %s", folder)
            return str(folder)
        logger.warning("skipping %s: %s", folder, problem)
    logger.info("--resume auto: no checkpoint in %s, starting anew", output_dir)
    return None


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """checkpoint-N folders, oldest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))


def what_is_missing(folder: Path) -> str:
    """Why a checkpoint cannot be resumed from; empty if it can."""
    if not folder.is_dir():
        return "no such folder"
    # trainer_state.json is the last file written.
    state = folder / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{state.name} is missing or unreadable"
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as tensors:
            if not list(tensors.keys()):
                return f"{ADAPTER_FILE} is empty"
    except (OSError, SafetensorError):
        return f"{ADAPTER_FILE} is missing or unreadable"
    tag = folder / "latest"
    if tag.is_file():
        name = tag.read_text(encoding="utf-8", errors="replace").strip()
        if not name or not any((folder / name).glob("*optim_states.pt")):
            return "the optimizer's shards are missing"
    if not tag.is_file() and not (folder / "optimizer.pt").is_file():
        return "the optimizer's state is missing"
    return ""


def check_output_dir(output_dir: str | Path, checkpoint: str | None, overwrite: bool, resume: bool = False) -> None:
    """Make the folder, and refuse to train anew over an earlier run's checkpoints. Deletes nothing.

    Args:
        checkpoint: what is resumed from, or None.
        resume: whether `--resume` was given; without a `checkpoint` found, what lies there was never completed, and
            a run that was stopped while it wrote its first checkpoint starts anew.

    Raises:
        RecipeError: checkpoints are there, nothing is resumed and overwrite_output_dir is off; or it cannot be written.
    """
    output = Path(output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"training.output_dir: cannot make {output}: {(error.strerror or str(error)).lower()}"
        ) from None
    if not os.access(output, os.W_OK | os.X_OK):
        raise RecipeError(f"training.output_dir: {output} is not writable")
    leftovers = list_checkpoints(output)
    if leftovers and checkpoint is None and not overwrite and not resume:
        raise RecipeError(
            f"training.output_dir: {output} holds {leftovers[-1].name} of an earlier run; go on with --resume auto, "
            "choose another folder, or set training.overwrite_output_dir: true"
        )


def clear_output_dir(output_dir: str | Path) -> None:
    """Delete what an earlier run wrote there, and nothing else. One rank calls this, once all else is checked."""
    output = Path(output_dir)
    for path in [*list_checkpoints(output), output / "tensorboard", output / "adapter"]:
        shutil.rmtree(path, ignore_errors=True)


def _check_is_folder(output: Path) -> None:
    """Found before anything is loaded or tokenised."""
    existing = next(path for path in [output, *output.absolute().parents] if path.exists())
    if not existing.is_dir():
        raise RecipeError(f"training.output_dir: {existing} is a file, not a folder")
