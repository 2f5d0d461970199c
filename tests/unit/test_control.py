"""What ends a run before its time: signals, hangs, a second run on the same folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fvae_dist.training import control
from fvae_dist.training.control import (
    EXIT_RESUME,
    EXIT_STALLED,
    LOCK_FILE,
    StallWatchdog,
    StopSignal,
    lock_output_dir,
)
from fvae_dist.training.recipe import RecipeError

ROOT = Path(__file__).parents[2]


def start(code: str) -> subprocess.Popen:
    """A process that prints "ready" when it is to be disturbed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_signal_before_training_ends_the_process_at_once():
    process = start(
        "import time; from fvae_dist.training.control import StopSignal\n"
        "stop = StopSignal().listen(); print('ready', flush=True); time.sleep(60)"
    )
    process.send_signal(signal.SIGTERM)
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


@pytest.fixture
def exits(monkeypatch):
    """What would have ended the process."""
    codes = []
    monkeypatch.setattr(control.os, "_exit", codes.append)
    return codes


@pytest.fixture
def clock(monkeypatch):
    """The watchdog's clock, which only the test moves."""
    now = [100.0]
    monkeypatch.setattr(control.time, "monotonic", lambda: now[0])
    return now


def test_hang_ends_the_process_and_says_where_it_stands(exits, clock, capfd):
    def stuck_in_a_collective(watchdog):
        clock[0] += 0.3
        while not exits:
            time.sleep(0.02)
        watchdog.on_train_end(None, None, None)

    watchdog = StallWatchdog(0.2)
    watchdog.on_train_begin(None, None, None)
    stuck_in_a_collective(watchdog)
    errors = capfd.readouterr().err
    assert exits[0] == EXIT_STALLED
    assert "rank 0: no progress for 0 s" in errors and "stuck_in_a_collective" in errors


def test_beats_keep_the_watchdog_quiet_and_the_end_stops_it(exits, clock):
    watchdog = StallWatchdog(0.2)
    watchdog.on_train_begin(None, None, None)
    for beat in (watchdog.on_step_begin, watchdog.on_step_end, watchdog.on_prediction_step, watchdog.on_save) * 2:
        clock[0] += 0.15
        beat(None, None, None)
        time.sleep(0.06)  # the watchdog looks every 0.05 s
    watchdog.on_train_end(None, None, None)
    clock[0] += 10
    time.sleep(0.1)
    assert exits == []


def test_folder_belongs_to_one_run(tmp_path):
    with lock_output_dir(tmp_path), pytest.raises(RecipeError, match=rf"in use by process {os.getpid()} on "):
        lock_output_dir(tmp_path)
    lock_output_dir(tmp_path).close()


def test_lock_of_a_killed_run_is_free(tmp_path):
    path = tmp_path / LOCK_FILE
    process = start(
        "import fcntl, time\n"
        f"file = open({str(path)!r}, 'w'); file.write('process 7 on node'); file.flush()\n"
        "fcntl.flock(file, fcntl.LOCK_EX); print('ready', flush=True); time.sleep(60)"
    )
    with pytest.raises(RecipeError, match="is in use by process 7 on node"):
        lock_output_dir(tmp_path)
    process.kill()
    process.wait()
    lock_output_dir(tmp_path).close()
