"""The processes that take part in an evaluation, and what they tell each other. One process needs no process group."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fvae_dist.training.process_group import be_the_only_rank
from fvae_dist.training.zero3 import skip_shared_memory_operator


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size` ones."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order, on rank 0; an empty list elsewhere. All ranks must call it."""
        if self.world_size == 1:
            return [value]
        received: list[Any] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, received, dst=0)
        return received or []

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. All ranks must call it."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def environment_ranks() -> Ranks:
    """What the launcher says, before any process group."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def uses_cpu() -> bool:
    """On a machine with GPUs, DS_ACCELERATOR=cpu keeps to the CPU, as in training."""
    return os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()


def start_process_group(with_deepspeed: bool) -> tuple[Ranks, torch.device]:
    """Start the process group where there is more than one rank, or DeepSpeed; must precede loading.

    Returns:
        The ranks, and this one's device.
    """
    ranks, cpu = environment_ranks(), uses_cpu()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu") if cpu else torch.device("cuda", local_rank)
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if ranks.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            num_local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", ranks.world_size)))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_local))
    else:
        torch.cuda.set_device(device)
    if ranks.world_size == 1 and not with_deepspeed:
        return ranks, device
    be_the_only_rank()
    backend = "gloo" if cpu else "nccl"
    if with_deepspeed:
        import deepspeed

        if cpu:
            skip_shared_memory_operator()
        deepspeed.init_distributed(dist_backend=backend)  # takes a running group over
    elif not dist.is_initialized():
        dist.init_process_group(backend)
    return ranks, device
