"""The real command, disturbed: signals, kills, damaged checkpoints, a second run. Nothing may be lost or wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from fvae_dist.training.checkpoint_files import problem_with
from fvae_dist.training.checkpoints import list_checkpoints
from fvae_dist.training.control import EXIT_RESUME
from tests.recipes import SIZES, byte_tokenizer, recipe_values, write_recipe, write_records

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed
STEPS = 12
KEYS = ("step", "loss/task", "loss/neg_elbo", "loss", "grad_norm", "learning_rate", "elbo/nll", "elbo/active_units")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Model, data and recipe; 12 steps of 4 rows over 10 rows, so that epochs end in mid-run."""
    folder = tmp_path_factory.mktemp("interruptions")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    words = ["red", "green", "blue", "sun", "moon"]
    records = [{"instruction": f"Say {w}.", "output": f"{w} {i}" * (i + 1)} for i, w in enumerate(words * 2)]
    write_records(folder / "data.jsonl", records)
    values = recipe_values(
        folder,
        folder / "model",
        model={"random_weights": False},
        data={"cache_dir": str(folder / "cache")},
        training={
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "save_steps": 3,
            "save_total_limit": None,
            "learning_rate": 1e-3,
            "use_cpu": True,
        },
        logging={"steps": 1, "tensorboard": False},
    )
    write_recipe(folder, values)
    return folder


def start(place: Path, output: str, *settings: str, resume: bool = False) -> subprocess.Popen:
    overrides = [f"training.output_dir={place / output}", *settings]
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(place / "recipe.yaml")]
    command += [part for setting in overrides for part in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*command, *(["--resume", "auto"] if resume else [])],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output[-4000:]
    return output


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Read the process's output up to a line that has `text`."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} never came:\n{seen[-4000:]}")


def results(folder: Path) -> tuple[list, dict]:
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return [[row[key] for key in KEYS] for row in history], load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_run(folder: Path, expected: tuple[list, dict]) -> None:
    history, adapter = results(folder)
    assert history == expected[0]
    assert all(torch.equal(adapter[name], value) for name, value in expected[1].items())


@pytest.fixture(scope="module")
def uninterrupted(place) -> tuple[list, dict]:
    finish(start(place, "whole"))
    expected = results(place / "whole")
    assert len(expected[0]) == STEPS
    return expected


def test_signal_saves_stops_with_75_and_the_run_goes_on_bit_for_bit(place, uninterrupted):
    name, number = "signalled", signal.SIGUSR1  # SIGTERM: tests/e2e/test_slurm.py
    process = start(place, name)
    wait_for(process, "step 4/")
    process.send_signal(number)
    output = finish(process, EXIT_RESUME)
    assert f"{number.name}: saving and stopping after step" in output
    newest = list_checkpoints(place / name)[-1]
    assert problem_with(newest) == "" and int(newest.name.rpartition("-")[2]) not in (3, 6, 9)
    assert not (place / name / "adapter").exists()
    output = finish(start(place, name, resume=True))
    assert f"resuming from {newest}" in output
    assert_same_run(place / name, uninterrupted)


def test_killed_at_random_moments_it_still_ends_right(place, uninterrupted):
    """SIGKILL twice, also while it saves (every step here); FVAE_KILLS=N by hand for more."""
    draw, name = random.Random(7), "killed"
    settings = ("training.save_steps=1",)
    for _ in range(int(os.environ.get("FVAE_KILLS", "2"))):
        process = start(place, name, *settings, resume=True)
        seen = ""
        for line in process.stdout:
            seen += line
            if line.startswith("step ") and draw.random() < 0.4:
                time.sleep(draw.random() * 0.1)
                break
        process.kill()
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), seen[-3000:]
    finish(start(place, name, *settings, resume=True))
    assert_same_run(place / name, uninterrupted)
    assert not list((place / name).glob(".checkpoint-*"))


def test_damaged_newest_checkpoint_is_skipped_with_the_reason(place, uninterrupted):
    shutil.copytree(place / "whole", place / "damaged")
    shutil.rmtree(place / "damaged" / "checkpoint-12")
    path = place / "damaged" / "checkpoint-9" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    output = finish(start(place, "damaged", resume=True))
    assert "checkpoint-9: optimizer.safetensors is not what was written" in output
    assert "checkpoint-6" in output.partition("resuming from ")[2].splitlines()[0]
    assert_same_run(place / "damaged", uninterrupted)


def test_second_run_on_the_folder_is_refused(place):
    first = start(place, "shared", "training.max_steps=100000", "training.save_steps=100000")
    try:
        wait_for(first, "step 1/")
        output = finish(start(place, "shared", resume=True), 2)
        assert f"is in use by process {first.pid} on " in output
    finally:
        first.kill()
        first.communicate()
