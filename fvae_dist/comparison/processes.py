"""train.py and evaluate.py as processes of their own: their commands, logs, signals and errors."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fvae_dist.comparison.jobs import ALONE, Running, Slot
from fvae_dist.comparison.launchers import launcher_words
from fvae_dist.comparison.schema import SuiteSection
from fvae_dist.comparison.study import Study
from fvae_dist.training.recipe import RecipeError

_LAUNCH = Path(__file__).parents[2] / "launch"
_ERROR = re.compile(r"^(\[rank\d+\]: )?(error: |[\w.]*(Error|Exception|Interrupt)\b)")


class Stopped(Exception):
    """SIGTERM or SIGUSR1 came; what runs was told, and saved what it could."""


def script(name: str) -> str:
    """launch/NAME.

    Raises:
        RecipeError: the package was installed without it.
    """
    path = _LAUNCH / name
    if not path.is_file():
        raise RecipeError(f"{path}: not there; compare runs the scripts of the project's folder")
    return str(path)


def train_command(study: Study, recipe: Path, slot: Slot = ALONE) -> list[str]:
    launcher = launcher_words(study.comparison.launcher, slot)
    return [*launcher, script("train.py"), "--config", str(recipe), "--resume", "auto"]


def evaluate_command(study: Study, suite: SuiteSection, trained: Path, out: Path, slot: Slot = ALONE) -> list[str]:
    """Evaluate a training's model/ or adapter/ as `suite` says, the adapter with the recipe's base, in its dtype."""
    model = study.recipe.model
    is_whole = trained.name == "model"
    options: dict[str, Any] = {
        "--model": trained if is_whole else model.name_or_path,
        "--adapter": None if is_whole else trained,
        "--dtype": model.dtype,
        "--attention": model.attention,
        "--suite": suite.suite,
        "--data": f"{suite.suite}={suite.data}" if suite.data is not None else None,
        "--mode": suite.mode,
        "--template": suite.template,
        "--batch-size": suite.batch_size,
        "--num-beams": suite.num_beams,
        "--max-new-tokens": suite.max_new_tokens,
        "--max-length": suite.max_length,
        "--limit": suite.limit,
        "--out": out,
    }
    given = [part for key, value in options.items() if value is not None for part in (key, str(value))]
    flags = ["--trust-remote-code"] if model.trust_remote_code else []
    return [*launcher_words(study.comparison.launcher, slot), script("evaluate.py"), *given, *flags]


def run_logged(command: list[str], log_path: Path, slot: Slot = ALONE) -> int:
    """Run to the end, output into a file that grows; returns the exit code.

    SIGTERM and SIGUSR1 are passed on and waited for: train.py then saves a checkpoint. Whatever else ends this process
    takes the other with it.

    Raises:
        Stopped: a signal came and the process did not end well by itself, or was not started any more.
        RecipeError: the command cannot be started.
    """
    signals = Running() if slot.running is None else nullcontext(slot.running)
    with open(log_path, "a", encoding="utf-8") as log, signals as running:
        if running.received:
            raise Stopped
        added = slot.environment()
        log.write(f"$ {shlex.join([*(f'{name}={value}' for name, value in added.items()), *command])}\n")
        log.flush()
        process: subprocess.Popen | None = None
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **added}
            )
            running.add(process)
            code = process.wait()
        except OSError as error:
            raise RecipeError(f"launcher: cannot run {command[0]}: {error.strerror or error}") from None
        finally:
            if process is not None:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                running.remove(process)
        if code and running.received:
            raise Stopped
        return code


def last_error(log_path: Path, code: int) -> str:
    """What went wrong, in one line: the last error of the log's last command, or its last line."""
    text = log_path.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2]  # before it: earlier attempts
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1])
    return f"exit code {code}: {found[:500]}"
