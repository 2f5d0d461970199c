"""The planned memory, part by part, against what two ranks on CPU really take.

Run as a module, this file is one of the ranks: python -m tests.distributed.test_planned_memory FOLDER RANK. The base
and the peak of a step are measured as growth of the rank's private memory; the adapters' states, beside which DeepSpeed
makes some 10 MB of Python objects, as the bytes of the tensors that are alive.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fvae_dist.planning.hardware import GIB
from fvae_dist.planning.memory import estimate_memory
from fvae_dist.training.deepspeed_config import load_deepspeed_config
from fvae_dist.training.leaving import leave
from fvae_dist.training.modeling import load_config
from fvae_dist.training.planned import choice_of, subject_of
from fvae_dist.training.recipe import Recipe
from tests.recipes import make_model_folder, make_recipe

ROOT = Path(__file__).parents[2]
NUM_RANKS = 2
TIMEOUT_S = 300  # ~30 s on two free cores, most of it imports; the first run on a machine compiles for ~90 s
STEPS = 2  # DeepSpeed prefetches from the second on
LENGTH = 384
TOLERANCE = 0.1
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
}
ADAPTER = {"r": 64, "encoder_hidden": 128, "target_modules": ["q_proj", "v_proj"], "decoder_hidden": 128}
# Name -> recomputation, ZeRO section; weights are resident where the name says so. DeepSpeed's limits at a toy's size:
# three of four layers may be whole at a time; no overlap at stage 2, whose second bucket would be allocated and never
# written to.
SETTINGS = {
    "zero3": (
        True,
        {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": 1_000_000,
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 8_000_000,
            "stage3_max_reuse_distance": 1_000_000,
        },
    ),
    "zero2": (False, {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False}),
    "zero3_resident": (False, {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}),
}


def write_inputs(folder: Path) -> None:
    make_model_folder(folder / "model", **SIZES)
    for name, (_, section) in SETTINGS.items():
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": section}))
    text = "".join(chr(97 + i % 26) for i in range(LENGTH - 3))
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": f"{i}{text}"}) + "\n" for i in range(2 * STEPS)))


def recipe_of(folder: Path, setting: str) -> Recipe:
    return make_recipe(
        folder,
        folder / "model",
        adapter=ADAPTER,
        data={"train": [{"path": str(folder / "data.jsonl"), "format": "text"}], "max_length": LENGTH},
        training={
            "output_dir": str(folder / "runs" / setting),
            "deepspeed": str(folder / f"{setting}.json"),
            "recompute": "full" if SETTINGS[setting][0] else "none",
            "resident_weights": setting.endswith("resident"),
            "max_steps": STEPS,
            "use_cpu": True,
            "save_strategy": "no",
            "learning_rate": 1e-4,
        },
        logging={"tensorboard": False, "telemetry": False},
    )


# ------------------------------------------------------------------------------------------------------------ one rank


class PrivateMemory:
    """Anonymous resident memory of this process, sampled every 2 ms for its peak."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.002)

    @staticmethod
    def now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("no RssAnon in /proc/self/status")

    def settle(self) -> int:
        """Give back what is free, start the peak anew, and say what is held."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.peak = self.now()
        return self.peak


def tensor_bytes() -> int:
    """Of all storages that a living tensor or gradient refers to."""
    storages = {}
    for candidate in gc.get_objects():
        if isinstance(candidate, torch.Tensor):
            for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def run_rank(folder: Path, rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS)
    memory = PrivateMemory()
    for setting in SETTINGS:
        seen = measure(recipe_of(folder, setting), memory)
        (folder / f"{setting}.{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def measure(recipe: Recipe, memory: PrivateMemory) -> dict[str, int]:
    """Train through the project's own steps; bytes that base, adapters' states and the last step took."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers import TrainerCallback
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from fvae_dist.training import run

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    prepared = run.prepare(recipe)
    args = run.build_arguments(prepared)
    run.start_process_group(args)
    seen: dict[str, int] = {}

    def load() -> torch.nn.Module:
        return run.load_base_model(prepared.recipe, prepared.config, prepared.attention)

    load()  # and away with it: what the libraries allocate for good on first use
    before, tensors = memory.settle(), tensor_bytes()
    base = load()
    seen["base_weights"] = memory.settle() - before
    with_base = tensor_bytes()
    assert with_base - tensors > 0.9 * seen["base_weights"]

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == STEPS - 1:
                self.before = memory.settle()
                seen["adapter_states"] = tensor_bytes() - with_base

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == STEPS:
                seen["step"] = memory.peak - self.before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_base_model", lambda *_: base)
        model = run.build_model(prepared, args)
    trainer = run.build_trainer(prepared, args, model)
    trainer.add_callback(Watch())
    trainer.train()
    return seen


# ------------------------------------------------------------------------------------------------------------- the test


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which both ranks left what they measured."""
    folder = tmp_path_factory.mktemp("planned_memory")
    write_inputs(folder)
    processes = [_start(folder, rank) for rank in range(NUM_RANKS)]
    deadline = time.monotonic() + TIMEOUT_S
    failed: dict[int, int] = {}  # rank -> code, before any is killed
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline and not failed:
            time.sleep(0.1)
            failed = {rank: code for rank, process in enumerate(processes) if (code := process.poll())}
    finally:
        late = [rank for rank, process in enumerate(processes) if process.poll() is None]
        for rank in late:  # without the failed one it would wait
            os.killpg(processes[rank].pid, signal.SIGKILL)
            processes[rank].wait()
    for rank in failed or late:
        code = failed.get(rank, f"nothing in {TIMEOUT_S} s")
        pytest.fail(f"rank {rank} ended with {code}; its log ends\n{_log(folder, rank)[-3000:]}")
    return folder


def _start(folder: Path, rank: int) -> subprocess.Popen:
    of_rank = {"RANK": rank, "LOCAL_RANK": rank}
    of_all = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), NUM_RANKS)
    environment = os.environ | {
        **{key: str(value) for key, value in (of_rank | of_all).items()},
        # Never used: the ranks meet in a file. accelerate only wants them to be there.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        # Freed memory goes back to the system at once: what is resident is what is held.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
        # ninja, for DeepSpeed's operator, lies beside the interpreter.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "tests.distributed.test_planned_memory", str(folder), str(rank)]
    with open(folder / f"log.{rank}", "w") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def _log(folder: Path, rank: int) -> str:
    return (folder / f"log.{rank}").read_text(errors="replace")


@pytest.mark.distributed
@pytest.mark.parametrize("setting", SETTINGS)
def test_memory_is_planned_within_a_tenth(finished, setting):
    recipe = recipe_of(finished, setting)
    subject = subject_of(recipe, load_config(recipe.model), attention="sdpa", liger=False)
    deepspeed, training = load_deepspeed_config(recipe, NUM_RANKS), recipe.training
    choice = choice_of(recipe, subject, deepspeed, training.recompute, training.resident_weights)
    planned = estimate_memory(subject, choice, NUM_RANKS)
    sizes = {name: GIB * size for name, size in planned.parts.items()}
    base, states = sizes["base_weights"], sizes["adapter_states"]
    # Between the steps: at stage 3 the gradient bucket stays, at stage 2 the rank's share of the gradients goes too.
    elements = subject.trainable_parameters
    states += 4 * choice.size("reduce_bucket_size") if choice.is_zero3 else -4 * elements / NUM_RANKS
    step = sum(sizes.values()) - base - states
    for rank in range(NUM_RANKS):
        seen = json.loads((finished / f"{setting}.{rank}.json").read_text())
        if choice.resident:  # loaded in shards, whole before the first step
            assert seen["base_weights"] == pytest.approx(base / NUM_RANKS, rel=TOLERANCE)
            seen["adapter_states"] -= round(base / NUM_RANKS)
            seen["base_weights"] += round(base / NUM_RANKS)
        assert seen["base_weights"] == pytest.approx(base, rel=TOLERANCE)
        assert seen["adapter_states"] == pytest.approx(states, rel=TOLERANCE)
        assert seen["step"] == pytest.approx(step, rel=TOLERANCE)
        assert sum(seen.values()) == pytest.approx(GIB * planned.total_gib, rel=TOLERANCE)
    # None of the three is there by name only.
    assert min(base, states, step) > 0.1 * GIB * planned.total_gib


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), int(sys.argv[2]))
    leave(0)
