"""The batch scripts: their arguments everywhere, their jobs on a real two-node SLURM where one can be had.

Jobs run where SLURM is installed, or with FVAE_SLURM=install (root, apt-get); elsewhere, and with FVAE_SLURM=off, these
tests skip and say why.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.recipes import make_model_folder, recipe_values, write_recipe, write_records
from tests.slurm import Cluster, NoSlurm, cluster, find_or_install

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.distributed
SCRIPTS = ("train.sbatch", "array_sweep.sbatch", "interactive.sh")
QUICKSTART = "launch/recipes/quickstart.yaml"
NUM_STEPS = 45

ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
}

SLOW_TRAIN = '''\
"""launch/train.py, with a second's rest after each step while there is a file `slow`: time for the signal."""

import time
from pathlib import Path

from transformers import TrainerCallback

from fvae_dist.cli import train_command
from fvae_dist.training.leaving import leave
from fvae_dist.training import run


class Rest(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if Path(args.output_dir, "slow").exists():
            time.sleep(1)


build_trainer = run.build_trainer


def build_slow_trainer(*args):
    trainer = build_trainer(*args)
    trainer.add_callback(Rest())
    return trainer


run.build_trainer = build_slow_trainer
leave(train_command())
'''

STAND_IN = '''\
"""Stands in for launch/train.py: ends with the code that its recipe gives for its rank; when stopped, with 75."""

import os
import signal
import sys
import time
from pathlib import Path

recipe = Path(sys.argv[2]).read_text().split()
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], *sys.argv[2:], flush=True)
code = recipe[int(os.environ["RANK"])]
if code == "wait":
    time.sleep(600)
sys.exit(int(code))
'''


@pytest.fixture(scope="module")
def running_slurm(tmp_path_factory) -> Iterator[Cluster]:
    try:
        find_or_install()
        with cluster(tmp_path_factory.mktemp("slurm")) as running:
            running.environment |= ENVIRONMENT
            yield running
    except NoSlurm as reason:
        pytest.skip(str(reason))
    assert not running.processes()


@pytest.fixture
def slurm(running_slurm) -> Iterator[Cluster]:
    """Without jobs, whatever the test before left."""
    yield running_slurm
    running_slurm.cancel_all()


def make_project(folder: Path, train: str) -> Path:
    for name in ("launch", "slurm", "ds_configs"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "launch" / "train.py").write_text(train)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """The project's folder with a stand-in for training."""
    return make_project(tmp_path_factory.mktemp("project"), STAND_IN)


@pytest.fixture
def login(tmp_path, project) -> Callable[..., subprocess.CompletedProcess]:
    """Calls a script as on a login node, where sbatch prints what it was called with."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\necho sbatch "$@"\n')
    sbatch.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | ENVIRONMENT
    environment["PATH"] = f"{sbatch.parent}:{environment['PATH']}"

    def call(script: str, *arguments: str, folder: Path = project, **more: str) -> subprocess.CompletedProcess:
        command = [str(project / "slurm" / script), *arguments]
        return subprocess.run(
            command, cwd=folder, env=environment | more, capture_output=True, text=True, timeout=60, check=False
        )

    return call


def write_ends(project: Path, ends: str) -> str:
    """A recipe for the stand-in: the exit code of each rank, or `wait`."""
    name = f"{ends.replace(' ', '-')}.txt"
    (project / name).write_text(ends)
    return name


def log_of(project: Path, number: str) -> str:
    logs = list((project / "logs").glob(f"*-{number}.out"))
    return logs[0].read_text() if logs else ""


def wait_for(text: str, project: Path, number: str, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while text not in log_of(project, number):
        assert time.monotonic() < deadline, f"no {text!r} in {log_of(project, number)}"
        time.sleep(0.2)


# ---- arguments ----


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_usage(login, script):
    result = login(script, "--help")
    assert result.returncode == 0 and f"slurm/{script} --nodes=" in result.stdout
    assert not any(line.startswith("#") for line in result.stdout.splitlines())


def test_train_submits_what_it_checked(login):
    result = login("train.sbatch", "--nodes=2", QUICKSTART, "--set", "training.learning_rate=1e-3", "--resume", "auto")
    script = result.stdout.split()[2]
    assert result.returncode == 0, result.stderr
    assert Path(script).name == "train.sbatch"
    expected = f"sbatch --nodes=2 {script} {QUICKSTART} --set training.learning_rate=1e-3 --resume auto\n"
    assert result.stdout == expected


def test_sweep_is_an_array_of_recipes_and_seeds(login):
    recipes = [QUICKSTART, "launch/recipes/lora_baseline.yaml"]
    result = login("array_sweep.sbatch", "--time=10", *recipes, "--set", "adapter.r=8", SEEDS="3 5 8")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("sbatch --array=0-5 --time=10 ")
    assert result.stdout.endswith(f" {' '.join(recipes)} --set adapter.r=8\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe"),
        (["--nodes", "2", QUICKSTART], "--nodes: options of sbatch, before the recipe, are written --option=value"),
        (["missing.yaml"], "missing.yaml: cannot read the recipe"),
        ([QUICKSTART, "launch/recipes/lora_baseline.yaml"], "one recipe, not 2"),
        ([QUICKSTART, "--set", "training.learning_rat=1"], "did you mean learning_rate"),
        ([QUICKSTART, "--set", "adapter.r"], "--set adapter.r: write section.key=value"),
        ([QUICKSTART, "--set"], "argument --set: expected one argument"),
        ([QUICKSTART, "--nodes=2"], "unrecognized arguments: --nodes=2"),
    ],
)
def test_bad_arguments_are_refused_before_sbatch(login, arguments, message):
    result = login("train.sbatch", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "sbatch" not in result.stdout


def test_bad_seeds_and_folders_are_refused(login, tmp_path):
    assert "SEEDS: x is not a number" in login("array_sweep.sbatch", QUICKSTART, SEEDS="1 x").stderr
    assert "start it in the project's folder" in login("train.sbatch", QUICKSTART, folder=tmp_path).stderr
    assert "start it in the project's folder" in login("interactive.sh", folder=tmp_path).stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_clean():
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "slurm").iterdir())]
    result = subprocess.run(["shellcheck", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


# ---- jobs ----


def test_sbatch_test_only_accepts_the_scripts(slurm, project):
    for script in ("slurm/train.sbatch", "slurm/array_sweep.sbatch"):
        result = slurm.try_run("sbatch", "--test-only", "--nodes=2", script, QUICKSTART, folder=project)
        assert result.returncode == 0 and "to start at" in result.stderr, result.stderr


def test_run_stopped_by_the_time_limit_ends_as_an_uninterrupted_one(slurm, tmp_path):
    """Two nodes, one CPU rank each. A job without interruption runs meanwhile: they share nodes, not ports."""
    project = make_project(tmp_path / "project", SLOW_TRAIN)
    write_records(project / "data.jsonl")
    values = recipe_values(
        project,
        make_model_folder(project / "model"),
        training={"output_dir": "runs/stopped", "max_steps": NUM_STEPS, "per_device_train_batch_size": 1},
        logging={"steps": 1, "tensorboard": False},
    )
    recipe = write_recipe(project, values).name
    slow = project / "runs" / "stopped" / "slow"
    slow.parent.mkdir(parents=True)
    slow.touch()
    submit = ["slurm/train.sbatch", "--nodes=2", "--parsable", recipe]
    stopped = slurm.run(*submit, folder=project).strip()
    wait_for(f"step 2/{NUM_STEPS}", project, stopped)
    # The signal is due 180 s before the end, that is now; SLURM looks every 30 s.
    hours, minutes, _ = map(int, slurm.job(stopped)["RunTime"].split(":"))
    slurm.run("scontrol", "update", f"JobId={stopped}", f"TimeLimit={60 * hours + minutes + 2}")
    whole = slurm.run(*submit, "--set", "training.output_dir=runs/whole", folder=project).strip()
    wait_for("stopped with a complete checkpoint; requeueing", project, stopped, timeout_s=60)
    slow.unlink()
    slurm.run("scontrol", "update", f"JobId={stopped}", "TimeLimit=60")
    slurm.wait_for_end(stopped, whole)

    log = log_of(project, stopped)
    for number in (stopped, whole):
        assert slurm.job(number)["JobState"] == "COMPLETED", log_of(project, number)
    assert log.count("start: n1 n2") == 1
    assert log.count("restart 1 of at most 20: n1 n2") == 1
    (step,) = re.findall(r"resuming from runs/stopped/checkpoint-(\d+)", log)
    assert 2 <= int(step) < NUM_STEPS
    history, expected = (
        json.loads((project / "runs" / name / "metrics.json").read_text())["history"] for name in ("stopped", "whole")
    )
    assert [row["step"] for row in history] == list(range(1, NUM_STEPS + 1))
    for key in ("loss/task", "loss/neg_elbo"):
        assert [row[key] for row in history] == [row[key] for row in expected]
    adapters = [
        load_file(project / "runs" / name / "adapter" / "adapter_model.safetensors") for name in ("stopped", "whole")
    ]
    assert all(tensor.equal(adapters[1][name]) for name, tensor in adapters[0].items())


@pytest.fixture(scope="module")
def finished(running_slurm, project) -> Callable[[str], tuple[dict[str, str], str]]:
    """Jobs of every end, run side by side; gives what SLURM says of one, and its log."""
    submit = ["sbatch", "--parsable"]
    commands = {
        "crashed": [*submit, "--nodes=2", "slurm/train.sbatch", write_ends(project, "wait 7")],
        "refused": [*submit, "slurm/train.sbatch", write_ends(project, "2")],
        "stalled": [*submit, "--export=ALL,MAX_RESTARTS=1", "slurm/train.sbatch", write_ends(project, "76")],
        "cancelled": [*submit, "slurm/train.sbatch", write_ends(project, "wait")],
        "killed": [*submit, "slurm/train.sbatch", write_ends(project, "wait")],
    }
    sweep = ["slurm/array_sweep.sbatch", write_ends(project, "75"), "--set", "adapter.r=8"]
    commands["sweep"] = [*submit, "--export=ALL,MAX_RESTARTS=1,SEEDS=3 5", "--array=0-1", *sweep]
    (project / "logs").mkdir(exist_ok=True)
    numbers = {name: running_slurm.run(*command, folder=project).strip() for name, command in commands.items()}
    array = numbers.pop("sweep")
    numbers |= {"sweep 0": f"{array}_0", "sweep 1": f"{array}_1"}
    wait_for("rank 0 of 1 wait.txt", project, numbers["cancelled"])
    running_slurm.run("scancel", numbers["cancelled"])
    wait_for("rank 0 of 1 wait.txt", project, numbers["killed"])
    running_slurm.run("scancel", "--signal=KILL", f"{numbers['killed']}.0")
    running_slurm.wait_for_end(*numbers.values())
    jobs = {name: running_slurm.job(number) for name, number in numbers.items()}
    return lambda name: (jobs[name], log_of(project, jobs[name]["JobId"]))


def test_crash_on_one_node_ends_the_job_and_is_not_requeued(finished):
    job, log = finished("crashed")
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), log
    assert "a crash: not requeued" in log


def test_stalled_run_is_requeued_in_bounds(finished):
    job, log = finished("stalled")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "76:0", "1"), log
    assert "stood still for training.stall_timeout_s; requeueing" in log and "restart 1 of at most 1" in log


def test_bad_recipe_is_not_requeued(finished):
    job, log = finished("refused")
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), log


@pytest.mark.parametrize(("task", "seed"), [("sweep 0", 3), ("sweep 1", 5)])
def test_sweep_task_keeps_seed_and_folder_and_restarts_are_bounded(finished, task, seed):
    job, log = finished(task)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "1"), log
    overrides = f"--set adapter.r=8 --set training.seed={seed} --set training.output_dir=runs/sweep/75-seed{seed}"
    for more in ("", " --resume auto"):
        assert log.count(f"rank 0 of 1 75.txt {overrides}{more}\n") == 1
    assert "MAX_RESTARTS=1 reached: not requeued" in log


def test_cancelled_job_stays_cancelled(finished):
    job, log = finished("cancelled")
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), log
    assert "requeueing" not in log


def test_killed_launcher_takes_its_ranks_along(finished, running_slurm):
    job, log = finished("killed")
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), log
    commands = [Path("/proc", str(pid), "cmdline") for pid in running_slurm.processes()]
    assert not [path for path in commands if path.exists() and b"launch/train.py" in path.read_bytes()]


def test_allocation_trains_at_once(slurm, project):
    command = ["slurm/interactive.sh", "--nodes=2", "--", "slurm/train.sbatch", write_ends(project, "0 0")]
    assert "rank 1 of 2 0-0.txt" in slurm.run(*command, folder=project)
