"""Makes `tests` importable (`from tests.models import tiny_model`) however pytest was started; one thread a process.

Tiny matrices on several threads spend their time waiting, up to fifty times as long where cores are shared.
"""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, here and in child processes

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


def pytest_collection_modifyitems(items) -> None:
    """Tests that run side by side (tests/run.sh) share a process by file, or by the two ranks they look at."""
    for item in items:
        group = "two_ranks" if "two_ranks" in item.fixturenames else str(item.path.relative_to(ROOT))
        item.add_marker(pytest.mark.xdist_group(group))
