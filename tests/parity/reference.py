"""Runs the reference code on our tensors, in a process of its own.

Needs FVAE_REFERENCE, the path of a clone of idiap/FVAE-LoRA (commit 1dfd8af), which is no part of this project.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

REFERENCE = os.environ.get("FVAE_REFERENCE", "")
needs_reference = pytest.mark.skipif(not REFERENCE, reason="FVAE_REFERENCE, a clone of idiap/FVAE-LoRA, is not set")
WORKER = Path(__file__).with_name("reference_worker.py")
TIMEOUT_S = 300


def run_reference(folder: Path, jobs: dict[str, tuple[dict, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """Name -> the tensors that `reference_worker` returns for that (job, tensors); `folder` is for the exchange."""
    for name, (_, tensors) in jobs.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.in")
    (folder / "jobs.json").write_text(json.dumps([{**job, "name": name} for name, (job, _) in jobs.items()]))
    environment = {**os.environ, "PYTHONPATH": str(Path(REFERENCE) / "peft" / "src"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(WORKER), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert result.returncode == 0, result.stderr
    return {name: load_file(folder / f"{name}.out") for name in jobs}
