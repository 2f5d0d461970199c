"""Makes `tests` importable (`from tests.models import tiny_model`) however pytest was started."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
