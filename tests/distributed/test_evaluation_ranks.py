"""The evaluate command on two ranks, whole and sharded by ZeRO-3, against one process: the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fvae_dist.cli import evaluate_command
from fvae_dist.training.process_group import free_port
from tests.evaluating import boolq, write_adapted, write_json
from tests.recipes import recipe_values, write_recipe, write_records

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300  # the first run on a machine compiles a DeepSpeed operator for ~90 s
PROGRAM = """
import json, sys
from fvae_dist.cli import evaluate_command
from fvae_dist.training.leaving import leave
leave(max([evaluate_command(command) for command in json.loads(sys.argv[1])]))
"""
RECORDS_OF = ("commonsense/boolq", "perplexity/train")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> dict[str, Path]:
    """The output folders of one process, of two that hold the whole model, and of two that share it."""
    folder = tmp_path_factory.mktemp("evaluation")
    # The base must outweigh the adapter, or ZeRO-3 would keep all of it on every rank.
    base, adapter = write_adapted(folder, intermediate_size=512)
    write_json(folder / "boolq.json", boolq("tfttfftft"))  # five batches: the ranks do not come out even
    write_records(folder / "data.jsonl")
    recipe = write_recipe(folder, recipe_values(folder, base))
    command = ["--model", base, "--adapter", adapter, "--suite", "commonsense,perplexity", "--batch-size", "2"]
    command += ["--data", f"commonsense={folder / 'boolq.json'}", "--data", f"perplexity={recipe}:train"]
    command += ["--max-new-tokens", "6", "--num-beams", "2"]
    outputs = {name: folder / name for name in ("one", "whole", "sharded")}
    arguments = {name: [*map(str, command), "--out", str(out)] for name, out in outputs.items()}
    assert evaluate_command(arguments["one"]) == 0
    run_two_ranks([[*arguments["whole"], "--deepspeed", "none"], arguments["sharded"]], folder)
    return outputs


def run_two_ranks(commands: list[list[str]], folder: Path) -> None:
    """Both evaluations in one launch: imports take most of the time."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # ninja, for DeepSpeed's operator, lies beside the interpreter.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    processes = []
    for rank in range(2):
        with open(folder / f"log.{rank}", "w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, json.dumps(commands)],
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=ROOT,
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        codes = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"log.{rank}").read_text()[-3000:] for rank in range(2))
    assert codes == [0, 0], logs


@pytest.mark.parametrize("layout", ["whole", "sharded"])
def test_two_ranks_write_the_bytes_of_one_process(outputs, layout):
    for name in RECORDS_OF:
        expected = (outputs["one"] / f"{name}.jsonl").read_text()
        assert (outputs[layout] / f"{name}.jsonl").read_text() == expected
        assert len(expected.splitlines()) == {"commonsense/boolq": 9, "perplexity/train": 3}[name]
    assert json.loads((outputs[layout] / "results.json").read_text()) == json.loads(
        (outputs["one"] / "results.json").read_text()
    )


def test_adapter_changes_what_is_measured(outputs):
    """Otherwise equal files would say little about adapters under ZeRO-3."""
    outputs_said = {
        json.loads(line)["output"] for line in (outputs["one"] / "commonsense" / "boolq.jsonl").read_text().splitlines()
    }
    assert len(outputs_said) > 1
