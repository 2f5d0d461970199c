"""`launch/train.py` whose fourth and fifth step must not wait for the GPU: an error where they do.

python -m torch.distributed.run --standalone --nproc-per-node=1 -m tests.waits --config R
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import torch
from transformers import TrainerCallback

from fvae_dist.cli import train_command
from fvae_dist.training import run

FIRST, LAST = 4, 5
# What torch's own switch does not see. An event of a copy to the host (`HostCopy`) is of another class: torch.Event.
_WAITS = [(torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize"), (torch.cuda.Event, "synchronize")]


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("the host waits for the GPU")


class NoWaits(TrainerCallback):
    """Of the steps, of what is between them, and of the callbacks before this one."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == FIRST:
            self.originals = [getattr(owner, name) for owner, name in _WAITS]
            for owner, name in _WAITS:
                setattr(owner, name, _refuse)
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == LAST:
            torch.cuda.set_sync_debug_mode("default")
            for (owner, name), original in zip(_WAITS, self.originals, strict=True):
                setattr(owner, name, original)
            print(f"steps {FIRST} to {LAST}: no wait", flush=True)


def main() -> int:
    build = run.build_trainer

    def build_trainer(*args: Any) -> Any:
        trainer = build(*args)
        trainer.add_callback(NoWaits())
        return trainer

    run.build_trainer = build_trainer
    return train_command()


if __name__ == "__main__":
    sys.exit(main())
