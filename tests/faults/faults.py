"""The faults: each is injected into real runs, and tells what became of them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fvae_dist.training.checkpoint_files import problem_with
from fvae_dist.training.control import EXIT_RESUME, EXIT_STALLED
from tests.faults.harness import SAVE_STEPS, Place, Run, newest_whole, send

STEP = 5  # where the faults happen: after the checkpoint of step 3, before that of step 6
DISK_MIB = 8


@dataclass
class Outcome:
    """What one kind of fault did.

    Attributes:
        injected: how many faults.
        ended: runs that ended, with an adapter.
        right: of these, how many are bit for bit the undisturbed run.
        runs: how many runs they were spread over.
        lost: most steps that were done again after one fault.
        lost_checkpoints: whole checkpoints that a resumed run did not start from.
        told: what the run says of it.
    """

    injected: int = 0
    runs: int = 0
    ended: int = 0
    right: int = 0
    lost: int = 0
    lost_checkpoints: int = 0
    told: str = ""

    @property
    def wrong(self) -> int:
        return self.ended - self.right

    @property
    def is_good(self) -> bool:
        return self.injected > 0 and self.runs == self.ended == self.right and self.lost_checkpoints == 0


def _conclude(place: Place, output: Path, outcome: Outcome, after: Run) -> Outcome:
    """Resume to the end and compare; `after` is the run that the fault ended."""
    before = newest_whole(output)
    resumed = place.complete(output, resume=True)
    _count_lost(outcome, after, resumed, before)
    return _judge(place, output, outcome)


def _judge(place: Place, output: Path, outcome: Outcome) -> Outcome:
    outcome.runs += 1
    outcome.ended += (output / "adapter" / "adapter_model.safetensors").is_file()
    outcome.right += place.is_right(output)
    return outcome


def _count_lost(outcome: Outcome, before: Run, after: Run, newest: int) -> None:
    outcome.lost = max(outcome.lost, before.last_step - after.resumed_at)
    outcome.lost_checkpoints += after.resumed_at < newest


def killed(place: Place, num_kills: int, seed: int) -> Outcome:
    """SIGKILL at random moments of one rank or all; a checkpoint every step, so also while saving."""
    draw, outcome = random.Random(seed), Outcome(told="goes on from the newest checkpoint")
    settings = ("training.save_steps=1",)
    while outcome.injected < num_kills:
        output = place.folder / f"killed{outcome.runs}"
        before, newest = None, 0
        while outcome.injected < num_kills:
            run = place.start(output, *settings, resume=True)
            if not _killed_in_mid_run(run, draw):
                break
            if before is not None:
                _count_lost(outcome, before, run, newest)
            before, newest = run, newest_whole(output)
            outcome.injected += 1
        resumed = place.complete(output, *settings, resume=True)
        if before is not None:
            _count_lost(outcome, before, resumed, newest)
        assert not list(output.glob(".checkpoint-*"))  # nothing half-written is left
        _judge(place, output, outcome)
    return outcome


def _killed_in_mid_run(run: Run, draw: random.Random) -> bool:
    """Kill some time after one of the next steps; False if it ended before."""
    for _ in run.steps():
        if draw.random() < 0.4:
            time.sleep(draw.random() * 0.1)
            break
    ranks = run.processes if draw.random() < 0.5 else [draw.choice(run.processes)]
    for process in ranks:
        process.kill()
    codes = run.finish()  # the others notice that a peer is gone
    was_killed = -signal.SIGKILL in codes
    assert was_killed or codes == [0] * len(codes), run.all_output
    return was_killed


def signalled(place: Place, number: signal.Signals) -> Outcome:
    """One rank gets the signal: all save and stop after the same step."""
    output, outcome = place.folder / number.name, Outcome(injected=1)
    run = place.start(output)
    run.wait_for(f"step {STEP - 1}/")
    send(run, number, rank=place.num_ranks - 1)
    codes = run.finish()
    assert codes == [EXIT_RESUME] * place.num_ranks, (codes, run.all_output)
    outcome.told = f"exit code {EXIT_RESUME}, saved at the step's end"
    return _conclude(place, output, outcome, run)


def hangs(place: Place, stall_timeout_s: float = 10.0) -> Outcome:
    """The last rank does not come back: every rank says where it stands and exits."""
    output, outcome = place.folder / "hang", Outcome(injected=1)
    fault = f"hang {place.num_ranks - 1} {STEP}"
    run = place.start(output, f"training.stall_timeout_s={stall_timeout_s}", fault=fault)
    codes = run.finish()
    assert codes == [EXIT_STALLED] * place.num_ranks, (codes, run.all_output)
    assert all(f"error: rank {rank}: no progress for " in text for rank, text in enumerate(run.all_output))
    assert "tests/faults/rank.py" in run.all_output[-1]  # the stack that hangs
    outcome.told = f"exit code {EXIT_STALLED}, every rank's stacks"
    return _conclude(place, output, outcome, run)


def not_a_number(place: Place) -> Outcome:
    """One rank's activations become NaN for a step: all ranks stop and name it."""
    output, outcome = place.folder / "nan", Outcome(injected=1)
    run = place.start(output, fault=f"nan {place.num_ranks - 1} {STEP}")
    codes = run.finish()
    assert 0 not in codes, (codes, run.all_output)
    told = [line for text in run.all_output for line in text.splitlines() if "non-finite" in line.lower()]
    assert told and f"step {STEP}" in told[0] and f"rank {place.num_ranks - 1}" in told[0], run.all_output
    outcome.told = "all ranks stop; step, rank and batch are named"
    return _conclude(place, output, outcome, run)


def survived(place: Place, fault: str, *settings: str, says: str = "") -> Outcome:
    """A fault that the run itself must outlive: the clock jumps, or TensorBoard's folder is removed."""
    output, outcome = place.folder / f"survived_{fault.split()[0]}", Outcome(injected=1)
    run = place.complete(output, *settings, fault=fault)
    assert says in run.output, run.output
    outcome.told = "goes on" + (f"; logs: {says}" if says else "")
    return _judge(place, output, outcome)


def disk_full(place: Place) -> Outcome:
    """A small file system runs full before a save and has room again before the next one."""
    outcome = Outcome(injected=1)
    with small_disk(place.folder / "disk") as disk:
        run = place.complete(disk / "run", "logging.tensorboard=true", fault=f"full 0 {STEP + 1}")
        assert "checkpoint-6 was not written: " in run.output and "No space left on device" in run.output, run.output
        assert newest_whole(disk / "run") == 12 and not (disk / "run" / "checkpoint-6").exists()
        outcome.told = "goes on; logs the error, the checkpoint before stays, the next save succeeds"
        return _judge(place, disk / "run", outcome)


class NoSmallDisk(Exception):
    """This user may not mount one."""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 8 MiB in memory."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    result = subprocess.run(mount, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if result is None or result.returncode:
        raise NoSmallDisk(f"cannot mount a tmpfs: {result.stderr.strip() if result else 'no mount here'}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # tensors read from it are mapped


def damaged(place: Place, region_bytes: int = 256) -> Outcome:
    """Each region of each file of the newest checkpoint is changed once: never loaded, the one before is."""
    output, outcome = place.folder / "damaged", Outcome()
    shutil.copytree(place.undisturbed(), output)
    newest = output / "checkpoint-12"
    accepted = 0
    for path in sorted(path for path in newest.iterdir() if path.is_file()):
        data = path.read_bytes()
        for start in range(0, len(data), region_bytes):
            changed = bytearray(data)
            changed[start + min(region_bytes, len(data) - start) // 2] ^= 1
            path.write_bytes(changed)
            outcome.injected += 1
            accepted += not problem_with(newest)
        path.write_bytes(data[: len(data) // 2])
        outcome.injected += 1
        accepted += not problem_with(newest)
        path.write_bytes(data)
    assert not problem_with(newest)
    (newest / "optimizer.safetensors").write_bytes(b"x" * (newest / "optimizer.safetensors").stat().st_size)
    run = place.complete(output, resume=True)
    assert "checkpoint-12: optimizer.safetensors is not what was written" in run.output, run.output
    outcome.lost, outcome.lost_checkpoints = SAVE_STEPS, int(run.resumed_at != 12 - SAVE_STEPS) + accepted
    outcome.told = "named and skipped, the one before is taken"
    return _judge(place, output, outcome)


def bad_record(place: Place) -> Outcome:
    """A record of the data is damaged between two starts: found before the first step, by file and line."""
    output, outcome = place.folder / "record", Outcome(injected=1)
    run = place.start(output)
    run.wait_for(f"step {STEP - 1}/")
    send(run, signal.SIGUSR1)
    assert run.finish() == [EXIT_RESUME] * place.num_ranks
    data = place.folder / "data.jsonl"
    good = data.read_text()
    lines = good.splitlines(keepends=True)
    data.write_text("".join([*lines[:6], lines[6][: len(lines[6]) // 2] + "\n", *lines[7:]]))
    try:
        refused = place.start(output, resume=True)
        codes = refused.finish()
        assert 2 in codes and "data.jsonl:7: " in "".join(refused.all_output), (codes, refused.all_output)
    finally:
        data.write_text(good)
    outcome.told = "exit code 2, file and line"
    return _conclude(place, output, outcome, run)


def second_run(place: Place) -> Outcome:
    """Another run on the same folder is refused, and disturbs nothing."""
    output, outcome = place.folder / "shared", Outcome(injected=1)
    first = place.start(output)
    first.wait_for("step 1/")
    os.kill(first.processes[0].pid, signal.SIGSTOP)  # so that it is still there
    try:
        second = place.start(output, resume=True)
        second.wait_for("is in use by process ")
        second.kill()
    finally:
        os.kill(first.processes[0].pid, signal.SIGCONT)
    assert first.finish() == [0] * place.num_ranks, first.all_output
    outcome.told = "the second is refused: exit code 2"
    return _judge(place, output, outcome)


def all_faults(num_kills: int, seed: int) -> dict[str, Callable[[Place], Outcome]]:
    """Every fault by its name in the table."""
    return {
        f"SIGKILL of one rank or all at {num_kills} random moments": lambda p: killed(p, num_kills, seed),
        "SIGTERM to one rank": lambda p: signalled(p, signal.SIGTERM),
        "SIGUSR1 to one rank": lambda p: signalled(p, signal.SIGUSR1),
        "a rank hangs": hangs,
        "NaN on one rank": not_a_number,
        "disk full during a save (tmpfs)": disk_full,
        "checkpoint damaged: each 256 bytes of each file, each file cut": damaged,
        "data record damaged between start and resume": bad_record,
        "TensorBoard's folder removed": lambda p: survived(
            p, f"no_logs 0 {STEP}", "logging.tensorboard=true", says="tensorboard: not written"
        ),
        "clock jumps by a day back, then two forward": lambda p: survived(p, f"clock 0 {STEP}"),
        "a second run on the folder": second_run,
    }
