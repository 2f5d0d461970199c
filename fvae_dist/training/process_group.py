"""What training and evaluation do around a process group."""

from __future__ import annotations

import os
import socket

import torch.distributed as dist


def be_the_only_rank() -> None:
    """The environment of a process that no launcher set up: rank 0 of 1, meeting at a free port of this machine."""
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def shut_down() -> None:
    """End the process group, so that no rank is left waiting at interpreter exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
