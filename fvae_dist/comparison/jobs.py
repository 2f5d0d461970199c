"""Trials at once: what each of them has for itself, and what they share."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)


class Running:
    """The processes that run now. While it is entered, in the main thread, SIGTERM and SIGUSR1 are passed on to all.

    `received`: the signals that came; after one, nothing is to be started any more. `working` is held by the job that
    works in this process: imports, and models on the meta device, are not made for several threads.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.working = threading.Lock()
        self._processes: set[subprocess.Popen] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Running:
        self._before = {number: signal.signal(number, self._receive) for number in _PASSED_ON}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def add(self, process: subprocess.Popen) -> None:
        """Pass signals on to it, also one that came before there was anybody to pass it on to."""
        self._processes.add(process)
        if self.received:
            process.terminate()

    def remove(self, process: subprocess.Popen) -> None:
        """It has ended."""
        self._processes.discard(process)

    def stop(self) -> None:
        """As if SIGTERM had come, unless a signal has: what runs saves what it can and ends."""
        if not self.received:
            self._receive(signal.SIGTERM, None)

    def kill(self) -> None:
        """End what runs, with all that it has started."""
        self.received.append(signal.SIGKILL)
        for process in list(self._processes):
            with contextlib.suppress(ProcessLookupError):  # ended in this moment
                os.killpg(process.pid, signal.SIGKILL)

    def _receive(self, number: int, frame: Any) -> None:
        self.received.append(number)
        for process in list(self._processes):
            process.send_signal(number)


@dataclass(frozen=True)
class Slot:
    """Where a trial runs: beside up to `jobs` - 1 others, on the GPU `gpu` if there are several to choose from."""

    jobs: int = 1
    gpu: str | None = None
    running: Running | None = None  # of all slots; None: alone

    def environment(self) -> dict[str, str]:
        """What a process in this slot has in its environment beyond this process's."""
        return {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a process: meanwhile another slot may work."""
        if self.running is None:
            yield
            return
        self.running.working.release()
        try:
            yield
        finally:
            self.running.working.acquire()


ALONE = Slot()


def slots_of(running: Running, jobs: int) -> list[Slot]:
    """As many slots as jobs; several GPUs go round among them."""
    gpus = visible_gpus()
    return [Slot(jobs, gpus[index % len(gpus)] if len(gpus) > 1 else None, running) for index in range(jobs)]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name here, one by one; none where everything keeps to the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return list(takewhile(lambda name: name not in ("", "-1"), (part.strip() for part in named.split(","))))
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]
