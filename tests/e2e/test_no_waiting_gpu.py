"""A training step launches all of its work without waiting for the GPU once; `tests/waits.py` is what would say so."""

import json
import random
import subprocess

import pytest
import torch

from fvae_dist.benchmarking.trial import ROOT, Setting, torchrun, write_inputs

pytestmark = pytest.mark.gpu
LENGTH = 256
COMMON = {"logging.steps": 100, "training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 2}
# Rows padded on the right; resident weights, all recomputed; packed rows, whose documents flash-attn is told.
RUNS = {
    "padded": {"training.deepspeed": "null"},
    "zero3": {"training.deepspeed": "ds_configs/zero3.json", "training.resident_weights": "true"},
    "packed": {"training.deepspeed": "null", "data.packing": "true", "model.attention": "flash_attention_2"},
}


@pytest.mark.parametrize("name", RUNS)
def test_steps_do_not_wait(tmp_path, name):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if name == "packed":
        pytest.importorskip("flash_attn")
    recipe = write_inputs(Setting("tiny", LENGTH, name == "zero3", attention="auto", steps=1), 1, tmp_path)
    generator = random.Random(0)
    with open(tmp_path / "data.jsonl", "w") as data:
        for _ in range(80):
            words = (f"w{generator.randrange(1000)}" for _ in range(generator.randrange(60, LENGTH)))
            data.write(json.dumps({"text": " ".join(words)}) + "\n")
    changes = COMMON | RUNS[name] | {"training.max_steps": 7}
    overrides = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    command = [*torchrun(1), "-m", "tests.waits", "--config", str(recipe), *overrides]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-5000:]
    assert "steps 4 to 5: no wait" in ended.stdout
    assert "head: fused" in ended.stdout + ended.stderr
