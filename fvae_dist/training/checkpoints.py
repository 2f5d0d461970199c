"""Which checkpoint to resume from, and what a new run may overwrite."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from fvae_dist.training.checkpoint_files import problem_with
from fvae_dist.training.recipe import RecipeError

logger = logging.getLogger(__name__)


def find_checkpoint(resume: str | None, output_dir: str | Path) -> str | None:
    """The checkpoint that `--resume` names, every byte of it checked.

    Args:
        resume: None, "auto" (newest one in `output_dir` that is whole, none is fine) or a checkpoint folder.

    Raises:
        RecipeError: the folder named is no whole checkpoint, or `output_dir` can be no folder.
    """
    _check_is_folder(Path(output_dir))
    if resume is None:
        return None
    if resume != "auto":
        problem = problem_with(Path(resume))
        if problem:
            raise RecipeError(f"--resume {resume}: not a whole checkpoint: {problem}")
        return str(resume)
    for folder in reversed(list_checkpoints(output_dir)):
        problem = problem_with(folder)
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
    for path in [*list_checkpoints(output), output / "tensorboard", output / "adapter", output / "model"]:
        shutil.rmtree(path, ignore_errors=True)


def _check_is_folder(output: Path) -> None:
    """Found before anything is loaded or tokenised."""
    existing = next(path for path in [output, *output.absolute().parents] if path.exists())
    if not existing.is_dir():
        raise RecipeError(f"training.output_dir: {existing} is a file, not a folder")
