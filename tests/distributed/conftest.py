"""Starts the two ranks once for all distributed tests, and hands out what each scenario wrote."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from tests.distributed.layouts import LAYOUTS, SEQUENCE_PARALLEL, TILED, one_process
from tests.distributed.resident import FLAT, FUSED
from tests.distributed.resident import LAYOUTS as RESIDENT_LAYOUTS
from tests.distributed.tiny import rows, write_large_model, write_model

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 480  # ~100 s on two free cores
NUM_RANKS = 2
SCENARIOS = (
    "loading",
    *LAYOUTS,
    *SEQUENCE_PARALLEL,
    "sp_resident",
    *TILED,
    "offload",
    "hpz",
    *(f"resident_{layout}" for layout in RESIDENT_LAYOUTS),
    *FUSED,
    "resident_run",
    "resident_odd",
    "resident_spoiled",
    "whole_run",
    "gradient_split",
    "fused_head",
    "five_steps",
    "forty_steps",
    "unsafe_precision",
    "resume",
    "elastic",
    "lora",
    "half_precision",
    "non_finite",  # last: it ends the processes
)


@dataclass
class TwoRanks:
    """The finished launch."""

    folder: Path
    large_model_bytes: int
    exit_codes: list[int | None]
    seconds_after_error: float | None
    logs: list[str]
    _results: dict[tuple[str, int], Any] = field(default_factory=dict)

    def result(self, scenario: str, rank: int = 0) -> Any:
        """What `scenario` returned on `rank`; fails the test with its traceback if it raised."""
        key = (scenario, rank)
        if key not in self._results:
            path = self.folder / f"{scenario}.{rank}.pt"
            if not path.is_file():
                pytest.fail(f"{scenario} wrote nothing on rank {rank}; its log ends\n{self.logs[rank][-3000:]}")
            self._results[key] = torch.load(path, weights_only=False)
        result = self._results[key]
        if "traceback" in result:
            pytest.fail(f"{scenario} failed on rank {rank}:\n{result['traceback']}")
        return result


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    """Started by the first of the processes that run tests side by side (pytest-xdist); the others wait for it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / "two_ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder, finished = folder / "two_ranks", folder / "two_ranks.json"
        if not finished.exists():
            folder.mkdir()
            write_model(folder / "model")
            large_model_bytes = write_large_model(folder / "large")
            one_rank(folder)
            launch = run_ranks(folder, SCENARIOS, large_model_bytes)
            finished.write_text(
                json.dumps([launch.large_model_bytes, launch.exit_codes, launch.seconds_after_error, launch.logs])
            )
    return TwoRanks(folder, *json.loads(finished.read_text()))


def one_rank(folder: Path, **arguments: Any) -> Any:
    """Four steps of eight rows in one process, saved after the second."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "linear",
    }
    return one_process(folder / "model", folder / "out" / "one_rank", rows(40), **settings | arguments)


@pytest.fixture(scope="session")
def two_gpus(tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    """The layouts again, a rank on each of two GPUs, in bf16, with a model whose heads flash attention takes."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    folder = tmp_path_factory.mktemp("two_gpus")
    write_model(folder / "model", hidden_size=256, intermediate_size=512)
    attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    settings = {"DS_ACCELERATOR": "cuda", "FVAE_TEST_DTYPE": "bfloat16", "FVAE_TEST_ATTENTION": attention}
    resident = (f"resident_{layout}" for layout in RESIDENT_LAYOUTS)
    shared = (*SEQUENCE_PARALLEL, "sp_resident", *TILED)
    return run_ranks(folder, (*LAYOUTS, *shared, *resident, *FLAT), settings=settings)


def run_ranks(
    folder: Path, scenarios: tuple[str, ...], large_model_bytes: int = 0, settings: dict[str, str] | None = None
) -> TwoRanks:
    processes = [_start(folder, rank, scenarios, settings or {}) for rank in range(NUM_RANKS)]
    try:
        exit_codes, seconds = _wait(processes, folder)
    finally:
        for process in processes:
            _kill(process)
    logs = [(folder / f"log.{rank}").read_text(errors="replace") for rank in range(NUM_RANKS)]
    return TwoRanks(folder, large_model_bytes, exit_codes, seconds, logs)


def _start(folder: Path, rank: int, scenarios: tuple[str, ...], settings: dict[str, str]) -> subprocess.Popen:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(NUM_RANKS),
        "LOCAL_WORLD_SIZE": str(NUM_RANKS),
        "LOCAL_SIZE": str(NUM_RANKS),
        # Never used: the ranks meet in a file. accelerate only wants them to be there.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # Freed weights go back to the system at once: what is resident is what is held.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 18),
        **settings,
    }
    command = [sys.executable, "-m", "tests.distributed.worker", str(folder), str(rank), str(NUM_RANKS), *scenarios]
    with open(folder / f"log.{rank}", "w") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _wait(processes: list[subprocess.Popen], folder: Path) -> tuple[list[int | None], float | None]:
    """Exit codes (None: killed after the timeout), and how long the ranks lived on after the deliberate error."""
    deadline = time.monotonic() + TIMEOUT_S
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
        failed = [process for process in processes if process.poll() not in (None, 0)]
        if failed and deadline - time.monotonic() > 90:
            deadline = time.monotonic() + 90  # the other rank notices within its collective's timeout
    raised = folder / "non_finite.0.pt"
    seconds = time.time() - raised.stat().st_mtime if raised.is_file() else None
    return [process.poll() for process in processes], seconds


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
