"""What training and evaluation do around a process group."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def ended_with(*errors: type[BaseException]) -> Iterator[None]:
    """End the process group after the block, so that no rank is left waiting at interpreter exit.

    `errors`: those that every rank meets. Any other may be one rank's alone, and NCCL ends its communicators only once
    the other ranks, which know nothing, have done what they wait for: such a rank must leave as it is, traceback first,
    for the launcher to end the others.
    """
    try:
        yield
    except errors:
        _shut_down()
        raise
    except BaseException:
        if not dist.is_initialized() or dist.get_backend() != "nccl":
            _shut_down()
        raise
    else:
        _shut_down()


def _shut_down() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
