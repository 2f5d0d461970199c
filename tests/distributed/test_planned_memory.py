"""The planned memory of every part against what two ZeRO-3 ranks on CPU really take.

Run as a module, this file is one of the ranks: python -m tests.distributed.test_planned_memory FOLDER RANK. It trains a
toy whose weights and activations outweigh what the libraries allocate for themselves.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.recipes import make_model_folder, make_recipe

ROOT = Path(__file__).parents[2]
NUM_RANKS = 2
TIMEOUT_S = 240
STEPS = 2  # DeepSpeed prefetches from the second on
LENGTH = 512
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
ADAPTER = {"r": 64, "encoder_hidden": 128, "target_modules": ["q_proj", "v_proj"], "decoder_hidden": 128}
# The planner's own limits, at a toy's size: two layers may be whole at a time.
ZERO = {
    "stage": 3,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": 1_000_000,
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 12_000_000,
    "stage3_max_reuse_distance": 1_000_000,
}
TOLERANCE = 0.1


def write_inputs(folder: Path) -> None:
    make_model_folder(folder / "model", **SIZES)
    make_model_folder(folder / "small", **SIZES | SMALL)
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": ZERO}))
    text = "".join(chr(97 + i % 26) for i in range(LENGTH - 2))
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": f"{i}{text}"}) + "\n" for i in range(2 * STEPS)))


def recipe_of(folder: Path, model: str = "model") -> Any:
    return make_recipe(
        folder,
        folder / model,
        adapter=ADAPTER,
        data={"train": [{"path": str(folder / "data.jsonl"), "format": "text"}], "max_length": LENGTH},
        training={
            "output_dir": str(folder / "runs" / model),
            "deepspeed": str(folder / "ds.json"),
            "max_steps": STEPS,
            "use_cpu": True,
            "save_strategy": "no",
            "learning_rate": 1e-4,
        },
        logging={"tensorboard": False, "telemetry": False},
    )


# ------------------------------------------------------------------------------------------------------------ one rank


def private_bytes() -> int:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class Peak:
    """Samples private memory every millisecond from `restart` on."""

    def __init__(self) -> None:
        self.value = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.value = max(self.value, private_bytes())
            time.sleep(0.001)

    def restart(self) -> None:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.value = private_bytes()


def train(folder: Path, model: str, peak: Peak) -> dict[str, int]:
    """Private memory at four moments of a run through the project's own steps."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers import TrainerCallback
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from fvae_dist.training import run

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    prepared = run.prepare(recipe_of(folder, model))
    args = run.build_arguments(prepared)
    run.start_process_group(args)
    peak.restart()
    seen = {"start": private_bytes()}
    base = run.load_base_model(prepared.recipe, prepared.config, prepared.attention)
    peak.restart()
    seen["loaded"] = private_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_base_model", lambda *_: base)
        trainer = run.build_trainer(prepared, args, run.build_model(prepared, args))

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == STEPS - 1:
                peak.restart()
                seen["between_steps"] = private_bytes()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == STEPS:
                seen["peak"] = peak.value

    trainer.add_callback(Watch())
    trainer.train()
    trainer.accelerator.free_memory()
    return seen


def run_rank(folder: Path, rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS)
    peak = Peak()
    train(folder, "small", peak)  # takes what the libraries allocate for good
    seen = train(folder, "model", peak)
    (folder / f"seen.{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), int(sys.argv[2]))
