"""What the text of a launcher says of its processes and its port; nothing is run to find out."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from fvae_dist.comparison.jobs import Slot, visible_gpus
from fvae_dist.training.recipe import RecipeError

_NUMBER_OPTION = r"--(?:num[-_](?:gpus|accelerators|nodes|processes|machines)|nproc[-_\w]*|nnodes)"
_NUMBER = re.compile(rf"(?<!\S){_NUMBER_OPTION}[ =]+(\S+)")
_NUM_PROCESSES = re.compile(r"(?<!\S)--num[-_](?:gpus|accelerators|processes)[ =]")
_CHOOSES_DEVICES = re.compile(r"(?<!\S)(?:--(?:include|exclude|hostfile)|-[ieH])[ =]")
_PORT = re.compile(r"(?<!\S)--(?:master[-_]port|rdzv[-_]endpoint|main[-_]process[-_]port)[ =]+(?:\S*:)?(\S+)")
_DEEPSPEED = ("deepspeed", "deepspeed.launcher.runner")


def check_several_at_once(launcher: str, jobs: int) -> None:
    """Whether the launcher can run several times at once.

    On GPUs a job has one of them, so that the launcher has to start a single process: several would take other jobs'
    GPUs, or, kept to the one, make the global batch another than without --jobs.

    Raises:
        RecipeError: it starts, or may start, several processes on GPUs; or it states a port.
    """
    text = " ".join(shlex.split(launcher))
    port = _PORT.search(text)
    if port and port[1] != "0":
        raise RecipeError(f"--jobs {jobs}: launcher: {launcher}: states a port, which launchers at once cannot share")
    gpus = visible_gpus()
    if gpus and not starts_one_process(launcher, len(gpus)):
        ways = "python, deepspeed --num_gpus 1 or torchrun --nproc-per-node=1"
        raise RecipeError(
            f"--jobs {jobs}: launcher: {launcher}: trials at once on GPUs take one process each, as {ways}"
        )


def starts_one_process(launcher: str, num_gpus: int) -> bool:
    """Whether every number of processes, GPUs and nodes that the text gives is 1.

    Without one deepspeed and accelerate start a process for each visible GPU, torchrun and Python one. deepspeed's own
    choice of devices, and launchers of clusters, are taken for several processes.
    """
    words = shlex.split(launcher)
    text, names = " ".join(words), {Path(word).name for word in words}
    if names & {"srun", "mpirun", "mpiexec"} or any(number not in ("1", "1:1") for number in _NUMBER.findall(text)):
        return False
    if names.isdisjoint((*_DEEPSPEED, "accelerate")):
        return True
    if not names.isdisjoint(_DEEPSPEED) and _CHOOSES_DEVICES.search(text):
        return False
    return num_gpus <= 1 or _NUM_PROCESSES.search(text) is not None


def launcher_words(launcher: str, slot: Slot) -> list[str]:
    """The command in front of a script; of several at once, deepspeed's has a port and heeds its slot's GPU."""
    words = shlex.split(launcher) or [sys.executable]
    place = next((index for index, word in enumerate(words) if Path(word).name in _DEEPSPEED), None)
    if slot.jobs == 1 or place is None:
        return words
    from fvae_dist.training.process_group import free_port

    before, after = words[: place + 1], words[place + 1 :]
    if slot.gpu is not None:  # beside a number deepspeed takes the first GPUs, whatever CUDA_VISIBLE_DEVICES says
        after = _without_numbers(after)
    return [*before, "--master_port", str(free_port()), *after]


def _without_numbers(words: list[str]) -> list[str]:
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if re.fullmatch(_NUMBER_OPTION, word):
            next(rest, None)
        elif not re.match(rf"{_NUMBER_OPTION}=", word):
            kept.append(word)
    return kept
