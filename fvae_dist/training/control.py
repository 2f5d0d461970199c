"""What ends a run before its time: a signal, a hang, another run on the same folder."""

from __future__ import annotations

import faulthandler
import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from transformers import TrainerCallback

from fvae_dist.training.recipe import RecipeError

logger = logging.getLogger(__name__)
EXIT_RESUME = 75  # stopped after a complete checkpoint: start me again
EXIT_STALLED = 76
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
LOCK_FILE = ".lock"


class StopSignal:
    """SIGTERM and SIGUSR1 ask the run to stop. Before it trains there is nothing to save: it ends at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.is_training = False

    def listen(self) -> StopSignal:
        """Take the signals over, where this is the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._receive)
        return self

    def ignore(self) -> None:
        """For the process's very end, where Python restores the signals' deadly defaults.

        Not before: what the process starts would ignore them too.
        """
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        if not self.is_training:
            os._exit(EXIT_RESUME)


class StopOnSignal(TrainerCallback):
    """When a rank was signalled, all of them save and stop after the same step: the one that runs, or, once its last
    forward pass is over, the next.

    Args:
        trainer: with FVAETrainerMixin, which tells all ranks what one wants.
    """

    def __init__(self, trainer: Any, stop: StopSignal):
        self.trainer = trainer
        self.stop = stop
        self.stopped_at: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.stop.is_training = True
        self.trainer.is_told_to_stop = False
        self.trainer.wants_to_stop = lambda: self.stop.received is not None

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.is_told_to_stop and state.global_step < state.max_steps:
            name = self.stop.received.name if self.stop.received else "a signal to another rank"
            logger.warning("%s: saving and stopping after step %d", name, state.global_step)
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True


class StallWatchdog(TrainerCallback):
    """Ends a process whose training does not go on, so that the job can start again.

    A rank that hangs keeps the others waiting in a collective: each of them notices by itself, says where it stands and
    exits.
    """

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._last_beat = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-watchdog", daemon=True)

    def on_train_begin(self, args, state, control, **kwargs):
        self._last_beat = time.monotonic()
        self._thread.start()

    def on_train_end(self, args, state, control, **kwargs):
        self._done.set()

    def _beat(self, args, state, control, **kwargs):
        self._last_beat = time.monotonic()

    on_step_begin = on_substep_end = on_step_end = on_prediction_step = on_evaluate = on_save = on_log = _beat

    def _watch(self) -> None:
        while not self._done.wait(min(self.timeout_s / 4, 10.0)):
            # The monotonic clock: a jump of the wall clock is no stall.
            silent = time.monotonic() - self._last_beat
            if silent > self.timeout_s:
                rank = os.environ.get("RANK", "0")
                print(f"error: rank {rank}: no progress for {silent:.0f} s; where it stands:", file=sys.stderr)
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                sys.stderr.flush()
                os._exit(EXIT_STALLED)


def lock_output_dir(output_dir: str | Path) -> IO[str]:
    """Keep other runs off the folder for as long as the file returned is open; one rank calls this.

    Raises:
        RecipeError: another run has it, or it cannot be written.
    """
    path = Path(output_dir) / LOCK_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held open on purpose
    except OSError as error:
        raise RecipeError(
            f"training.output_dir: cannot write in {path.parent}: {(error.strerror or str(error)).lower()}"
        ) from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RecipeError(f"training.output_dir: {path.parent} is in use by {holder}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
