"""What ends a run before its time: signals, hangs, a second run on the same folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fvae_dist.training.control import EXIT_RESUME, EXIT_STALLED, StopSignal, lock_output_dir
from fvae_dist.training.recipe import RecipeError

ROOT = Path(__file__).parents[2]


def start(code: str) -> subprocess.Popen:
    """A process that prints "ready" when it is to be disturbed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_before_training_ends_the_process_at_once(number):
    process = start(
        "import time; from fvae_dist.training.control import StopSignal\n"
        "stop = StopSignal().listen(); print('ready', flush=True); time.sleep(60)"
    )
    process.send_signal(number)
    assert process.wait(20) == EXIT_RESUME


def test_signal_in_training_is_only_noted():
    stop = StopSignal().listen()
    stop.is_training = True
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        assert stop.received is signal.SIGUSR1
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)


def test_hang_ends_the_process_and_says_where_it_stands():
    process = start(
        "import time; from fvae_dist.training.control import StallWatchdog\n"
        "watchdog = StallWatchdog(0.5); watchdog.on_train_begin(None, None, None)\n"
        "def stuck_in_a_collective():\n    print('ready', flush=True); time.sleep(60)\n"
        "stuck_in_a_collective()"
    )
    _, errors = process.communicate(timeout=20)
    assert process.returncode == EXIT_STALLED
    assert "rank 0: no progress for" in errors and "stuck_in_a_collective" in errors


def test_beats_keep_the_watchdog_quiet_and_the_end_stops_it():
    process = start(
        "import time; from fvae_dist.training.control import StallWatchdog\n"
        "watchdog = StallWatchdog(0.6); watchdog.on_train_begin(None, None, None); print('ready', flush=True)\n"
        "for _ in range(10): time.sleep(0.15); watchdog.on_step_end(None, None, None)\n"
        "watchdog.on_train_end(None, None, None); time.sleep(1.2)"
    )
    assert process.wait(30) == 0


def test_folder_belongs_to_one_run(tmp_path):
    with lock_output_dir(tmp_path), pytest.raises(RecipeError, match=rf"in use by process {os.getpid()} on "):
        lock_output_dir(tmp_path)
    lock_output_dir(tmp_path).close()


def test_lock_of_a_killed_run_is_free(tmp_path):
    process = start(
        "import time; from fvae_dist.training.control import lock_output_dir\n"
        f"lock = lock_output_dir({str(tmp_path)!r}); print('ready', flush=True); time.sleep(60)"
    )
    with pytest.raises(RecipeError, match=rf"in use by process {process.pid} on "):
        lock_output_dir(tmp_path)
    process.kill()
    process.wait()
    lock_output_dir(tmp_path).close()
