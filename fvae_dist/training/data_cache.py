"""The data cache: folders named by the hash of their contents' cause, made by one process and awaited by the others.

There is no collective in here: tokenising may take longer than any process-group time limit, and it happens before
there is a process group. Processes agree through the file system only:

    CACHE/<key>/          complete; exists from the moment of its rename on
    CACHE/<key>.tmp-*     being made
    CACHE/<key>.lock      held by the builder (several nodes have one builder each)
    CACHE/<key>.failed    the builder's error, for those who wait
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil
from filelock import FileLock

from fvae_dist.training.recipe import RecipeError, one_line

logger = logging.getLogger(__name__)
T = TypeVar("T")

_POLL_S = 0.2
_CLOCK_SLACK_S = 10.0  # between nodes, for `_read_failure`
_UNREADABLE_GRACE_S = 300.0  # how long a waiting process gives the builder to replace a folder that cannot be read
# What launchers set: equal in all processes of one launch, and mostly, not always, different in the next one.
_LAUNCH_VARIABLES = (
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
)


def build_or_load(folder: Path, build: Callable[[Path], None], load: Callable[[Path], T]) -> T:
    """Load the folder; make it first if it is not there or cannot be read.

    Builders on several nodes may race for one folder on a shared file system: the second finds it made.

    Args:
        build: writes everything into the empty folder that it is given.
        load: reads a complete folder; raises whatever it likes if it cannot.

    Raises:
        RecipeError: from `build`; `<key>.failed` then passes it on to the waiting processes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    failed = _failure_file(folder)
    # Of an earlier launch. Should another node's builder have written it just now, this one will fail alike.
    failed.unlink(missing_ok=True)
    with FileLock(_beside(folder, ".lock")):
        # Whoever left these behind was killed: this process has the lock.
        for leftover in folder.parent.glob(folder.name + ".tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = _beside(folder, f".tmp-{socket.gethostname()}-{os.getpid()}")
        if folder.exists():
            try:
                return load(folder)
            except Exception as error:  # whatever is wrong with it, making it anew is the cure
                logger.warning("data cache %s cannot be read (%s); making it anew", folder, one_line(error, None))
                folder.rename(temporary)
                shutil.rmtree(temporary)
        try:
            temporary.mkdir()
            build(temporary)
            temporary.rename(folder)
        except Exception as error:
            _write_failure(failed, error)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return load(folder)


def wait_and_load(folder: Path, load: Callable[[Path], T], timeout_s: float | None = None) -> T:
    """Wait, in silence, until the builder has made the folder, and load it.

    Raises:
        RecipeError: the builder met one; same message.
        RuntimeError: the builder failed otherwise, or the folder stays unreadable.
        TimeoutError: nothing after `timeout_s` seconds (None: wait for ever; the launcher ends us if the builder dies).
    """
    failed = _failure_file(folder)
    seen_at_start = _identity(failed)
    started, unreadable_since = time.monotonic(), None
    while True:
        if folder.exists():
            try:
                return load(folder)
            except Exception as error:  # the builder finds the same and makes it anew: wait for that
                unreadable_since = unreadable_since or time.monotonic()
                if time.monotonic() - unreadable_since > _UNREADABLE_GRACE_S:
                    raise RuntimeError(f"{folder}: this data cache cannot be read: {one_line(error, None)}") from error
        else:
            unreadable_since = None
        _raise_failure(failed, seen_at_start)
        if timeout_s is not None and time.monotonic() - started > timeout_s:
            raise TimeoutError(f"{folder}: no tokenised data after {timeout_s:g} s of waiting for the building process")
        time.sleep(_POLL_S)


# ------------------------------------------------------------------------------------------------------------- failures


def _write_failure(failed: Path, error: Exception) -> None:
    aside = failed.with_name(f"{failed.name}.{socket.gethostname()}-{os.getpid()}")
    note = {"launch": _launch(), "recipe_error": isinstance(error, RecipeError), "message": one_line(error, None)}
    try:
        aside.write_text(json.dumps(note), encoding="utf-8")
        os.replace(aside, failed)
    except OSError as second:  # a full disk, perhaps the very error; the first one is raised and ends the launch
        logger.warning("%s: cannot tell the waiting processes: %s", failed, second)


def _raise_failure(failed: Path, seen_at_start: tuple[int, int] | None) -> None:
    """Raise the builder's error, unless the file is left over from an earlier launch.

    A file that appeared or changed while we waited is this launch's. One that was there before is this launch's only if
    its launcher variables are ours and it is younger than this process (within the clocks' slack): ports and run ids
    alone repeat. What is left to chance, a relaunch within that slack that waits before its builder has removed the
    file, is harmless: the key stands for the same data, so the builder is about to meet the same error.
    """
    identity = _identity(failed)
    if identity is None:
        return
    try:
        note = json.loads(failed.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # removed or replaced in this moment: look again at the next poll
        return
    if identity == seen_at_start:
        born_s = psutil.Process().create_time()
        if note["launch"] != _launch() or identity[0] / 1e9 < born_s - _CLOCK_SLACK_S:
            return
    if note["recipe_error"]:
        raise RecipeError(note["message"])
    raise RuntimeError(f"the process that prepares the data failed: {note['message']}")


def _launch() -> list[str | None]:
    return [os.environ.get(name) for name in _LAUNCH_VARIABLES]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_ino


def _failure_file(folder: Path) -> Path:
    return _beside(folder, ".failed")


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)
