"""How a process ends that may hold a process group. Imports nothing that takes long: a mistake is told in a second."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with a finished command's code, past the interpreter's teardown.

    There a thread of a process group that lets go of a tensor can end the process by SIGABRT ("terminate called without
    an active exception", https://github.com/pytorch/pytorch/issues/190489), even after destroy_process_group, and a run
    that has saved everything, to be requeued, would count as crashed.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more, or it is closed
            stream.flush()
    os._exit(code)
