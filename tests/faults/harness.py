"""A small run of the real command, on one rank or several, that can be disturbed, resumed and compared."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fvae_dist.training.checkpoint_files import problem_with
from fvae_dist.training.checkpoints import list_checkpoints
from fvae_dist.training.process_group import free_port
from tests.recipes import SIZES, byte_tokenizer, recipe_values, write_recipe, write_records

ROOT = Path(__file__).parents[2]
STEPS = 12
SAVE_STEPS = 3
KEYS = ("step", "loss/task", "loss/neg_elbo", "loss", "grad_norm", "learning_rate", "elbo/nll", "elbo/active_units")
TIMEOUT_S = 240
TOKEN = "hf_" + "ThisIsASecretOfTheUser" + 12 * "0"
# Ranks are forked from a process that has imported everything already, which takes longer than all they do.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.rank"])


@dataclass
class Run:
    """Ranks that run, and the file that each prints to."""

    processes: list[BaseProcess]
    logs: list[Path]

    @property
    def output(self) -> str:
        """What rank 0 has printed so far."""
        return self.logs[0].read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        """Until rank 0 has printed `text`."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self.output:
            if (not self.processes[0].is_alive() and text not in self.output) or time.monotonic() > deadline:
                raise AssertionError(f"{text!r} never came:\n{self.output[-4000:]}")
            time.sleep(0.02)

    def steps(self) -> Iterator[int]:
        """Each step once rank 0 has printed it, until it ends."""
        seen = self.last_step
        while self.processes[0].is_alive():
            if self.last_step > seen:
                seen = self.last_step
                yield seen
            time.sleep(0.01)

    def finish(self) -> list[int | None]:
        """Exit codes of all ranks."""
        deadline = time.monotonic() + TIMEOUT_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()
        return [process.exitcode for process in self.processes]

    def succeed(self) -> None:
        """Run to the end, which must be a good one."""
        codes = self.finish()
        assert set(codes) == {0}, (codes, *(text[-4000:] for text in self.all_output))

    def kill(self) -> None:
        """SIGKILL what still lives."""
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def all_output(self) -> list[str]:
        return [log.read_text(errors="replace") for log in self.logs]

    @property
    def last_step(self) -> int:
        """The last one that rank 0 has printed."""
        return max(map(int, re.findall(r"^step (\d+)/", self.output, re.MULTILINE)), default=0)

    @property
    def resumed_at(self) -> int:
        """The checkpoint's step; 0 where it started afresh."""
        found = re.search(r"resuming from .*checkpoint-(\d+)", self.output)
        return int(found[1]) if found else 0


@dataclass(frozen=True)
class Layout:
    """How the 4 rows of a step are spread; without a DeepSpeed configuration by DDP."""

    num_ranks: int = 1
    accumulation: int = 2
    deepspeed: str | None = None
    sequence_parallel: int = 1

    def __str__(self) -> str:
        shared = f", rows shared by {self.sequence_parallel}" if self.sequence_parallel > 1 else ""
        return f"{self.num_ranks} x {self.rows} x {self.accumulation}, {self.deepspeed or 'DDP'}{shared}"

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return 4 * self.sequence_parallel // (self.num_ranks * self.accumulation)

    @property
    def settings(self) -> tuple[str, ...]:
        """Overrides of the recipe."""
        config = f"{ROOT}/ds_configs/{self.deepspeed}.json" if self.deepspeed else "null"
        return (
            f"training.per_device_train_batch_size={self.rows}",
            f"training.gradient_accumulation_steps={self.accumulation}",
            f"training.deepspeed={config}",
            f"training.sequence_parallel={self.sequence_parallel}",
        )


@dataclass
class Place:
    """A folder with model, data and recipe: 12 steps of 4 rows over 10 rows, so that epochs end in mid-run."""

    folder: Path
    layout: Layout = field(default_factory=Layout)
    _num_runs: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(self.folder / "model")
        byte_tokenizer().save_pretrained(self.folder / "model")
        words = ["red", "green", "blue", "sun", "moon"]
        records = [{"instruction": f"Say {w}.", "output": f"{w} {i}" * (i + 1)} for i, w in enumerate(words * 2)]
        write_records(self.folder / "data.jsonl", records)
        values = recipe_values(
            self.folder,
            self.folder / "model",
            model={"random_weights": False},
            data={"cache_dir": str(self.folder / "cache")},
            training={
                "max_steps": STEPS,
                "save_steps": SAVE_STEPS,
                "save_total_limit": None,
                "learning_rate": 1e-3,
                "use_cpu": True,
            },
            logging={"steps": 1, "tensorboard": False},
        )
        write_recipe(self.folder, values)

    @property
    def num_ranks(self) -> int:
        return self.layout.num_ranks

    def start(
        self, output: Path, *settings: str, resume: bool = False, fault: str = "", layout: Layout | None = None
    ) -> Run:
        """Start the ranks.

        Args:
            output: the run's folder.
            settings: overrides of the recipe.
            resume: with --resume auto.
            fault: see tests/faults/rank.py.
            layout: another than the place's.
        """
        layout = layout or self.layout
        arguments = ["--config", str(self.folder / "recipe.yaml"), *(["--resume", "auto"] if resume else [])]
        for setting in (f"training.output_dir={output}", *layout.settings, *settings):
            arguments += ["--set", setting]
        self._num_runs += 1
        return start_ranks(arguments, self.folder / f"{output.name}.{self._num_runs}", layout.num_ranks, fault)

    def complete(self, output: Path, *settings: str, **options: Any) -> Run:
        """Run to the end, which must be a good one; arguments as for `start`."""
        run = self.start(output, *settings, **options)
        run.succeed()
        return run

    def is_right(self, output: Path) -> bool:
        """Whether losses and adapter are, bit for bit, those of a run that nothing disturbed."""
        (rows, adapter), (expected_rows, expected) = _results(output), _results(self.undisturbed())
        assert len(expected_rows) == STEPS
        same = adapter.keys() == expected.keys() and all(torch.equal(adapter[name], t) for name, t in expected.items())
        return same and rows == expected_rows

    def difference(self, output: Path) -> float:
        """The largest relative difference of what was logged from the undisturbed run on the place's layout."""
        rows, expected = (
            torch.tensor(_results(folder)[0], dtype=torch.float64) for folder in (output, self.undisturbed())
        )
        return float(((rows - expected).abs() / expected.abs().clamp_min(1e-12)).max())

    def undisturbed(self) -> Path:
        """The folder of a run that nothing disturbed, which is done when it is first asked for."""
        whole = self.folder / "whole"
        if not whole.exists():
            self.complete(whole)
        return whole


def start_ranks(arguments: list[str], stem: Path, num_ranks: int, fault: str = "") -> Run:
    """Start the training command on ranks of this machine, which print to STEM.RANK.log."""
    environment = {"HF_TOKEN": TOKEN}
    if num_ranks > 1:
        environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [stem.with_name(f"{stem.name}.{rank}.log") for rank in range(num_ranks)]
    processes = []
    for rank, log in enumerate(logs):
        log.touch()
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}
        process = _context.Process(target=_be_rank, args=(arguments, str(log), fault), kwargs=environment | of_rank)
        process.start()
        processes.append(process)
    return Run(processes, logs)


def _be_rank(arguments: list[str], log: str, faults: str, **environment: str) -> None:
    # Imported where ranks are forked, never here: it brings DeepSpeed, and is told to be on the CPU.
    from tests.faults.rank import train

    train(arguments, log, faults, **environment)


def newest_whole(output: Path) -> int:
    """Step of the newest checkpoint with which nothing is wrong; 0 if there is none."""
    whole = [folder for folder in list_checkpoints(output) if not problem_with(folder)]
    return max((int(folder.name.rpartition("-")[2]) for folder in whole), default=0)


def send(run: Run, number: signal.Signals, rank: int = 0) -> None:
    pid = run.processes[rank].pid
    assert pid is not None
    os.kill(pid, number)


def _results(folder: Path) -> tuple[list, dict[str, Tensor]]:
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return [[row[key] for key in KEYS] for row in history], load_file(folder / "adapter" / "adapter_model.safetensors")
