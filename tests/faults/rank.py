"""One rank: the command of launch/train.py, with faults in it: "KIND RANK STEP; ...", before that step of that rank.

hang      never comes back
nan       the base's embeddings are not numbers in this step
clock     the wall clock jumps back by a day, and two steps later on by two
no_logs   TensorBoard's folder is removed
full      the disk of the output folder fills up, until two steps later
"""

import os
import shutil
import time
from pathlib import Path
from typing import NoReturn

# Before torch and DeepSpeed are imported, which read them.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu", TOKENIZERS_PARALLELISM="false")

import deepspeed  # noqa: F401
import torch
from transformers import TrainerCallback

from fvae_dist.cli import train_command
from fvae_dist.training import run
from fvae_dist.training.leaving import leave

ROOT = Path(__file__).parents[2]
DAY_S = 86400.0
_wall_clock = time.time


class Fault(TrainerCallback):
    """Happens once, and is over two steps later."""

    def __init__(self, trainer, output: Path, kind: str, step: int):
        self.trainer, self.output, self.step = trainer, output, step
        self.begin, self.end = getattr(self, kind), getattr(self, f"end_{kind}", lambda: None)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.begin()
        elif state.global_step + 1 == self.step + 2:
            self.end()

    def hang(self) -> None:
        time.sleep(3600)

    def nan(self) -> None:
        embeddings = self.trainer.accelerator.unwrap_model(self.trainer.model).get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, output: output * torch.nan)

    def clock(self) -> None:
        time.time = lambda: _wall_clock() - DAY_S

    def end_clock(self) -> None:
        time.time = lambda: _wall_clock() + DAY_S

    def no_logs(self) -> None:
        shutil.rmtree(self.output / "tensorboard")

    def full(self) -> None:
        self.filler = open(self.output / "filler", "wb", buffering=0)  # noqa: SIM115 - closed when the disk has room again
        for size in (1 << 16, 1):
            try:
                while True:
                    self.filler.write(b"x" * size)
            except OSError:
                pass

    def end_full(self) -> None:
        self.filler.close()
        (self.output / "filler").unlink()


def train(arguments: list[str], log: str, faults: str, **environment: str) -> NoReturn:
    """Run the command in this process, for a rank that its environment describes, and exit with its code."""
    os.environ.update(environment)
    os.chdir(ROOT)
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    build_trainer = run.build_trainer

    def build(prepared, args, model):
        trainer = build_trainer(prepared, args, model)
        for kind, rank, step in (fault.split() for fault in faults.split(";") if fault):
            if int(rank) == args.process_index:
                trainer.add_callback(Fault(trainer, Path(args.output_dir), kind, int(step)))
        return trainer

    run.build_trainer = build
    leave(train_command(arguments))
