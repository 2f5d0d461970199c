"""`compare --jobs`: which trials run at once, where, behind which launchers, and what ends them. Nothing is trained."""

import json
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from fvae_dist.cli import compare_command
from fvae_dist.comparison import command, processes, report, running
from fvae_dist.comparison.jobs import ALONE, Running, Slot, slots_of, visible_gpus
from fvae_dist.comparison.launchers import check_several_at_once, launcher_words, starts_one_process
from fvae_dist.comparison.study import load_study
from fvae_dist.training.recipe import RecipeError
from tests.comparing import LORA, write_comparison

COST = {"trainable_parameters": 10, "inference_parameters": 4, "tokens_per_s_per_gpu": 5.0, "step_s": 1.0}
METHODS = {"lora": LORA, "dora": {**LORA, "use_dora": True}}


class Processes:
    """Takes run_logged's place: writes what a process leaves; `meet` processes wait until they run at once."""

    def __init__(self, meet: int, fails: str | None = None):
        self.gate = threading.Barrier(meet)
        self.fails = fails
        self.calls: list[tuple[str, Slot]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def run(self, command: list[str], log: Path, slot: Slot = ALONE) -> int:
        with self.lock:
            self.calls.append((str(log.relative_to(log.parents[2])), slot))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.gate.wait(60)
        with self.lock:
            self.at_once -= 1
        log.write_text(f"$ {shlex.join(command)}\nValueError: as asked for\n")
        if log.stem == "train":
            (log.parent / "train").mkdir()
            (log.parent / "train" / "metrics.json").write_text("{}")
        else:
            (log.parent / log.stem).mkdir(exist_ok=True)
            metrics = {"loss": {"value": 1.0}, "accuracy": {"value": 0.5}}
            suites = {"perplexity": {"eval": metrics}, "groups": {"groups": metrics}}
            (log.parent / log.stem / "results.json").write_text(json.dumps({"suites": suites}))
        return int(self.fails is not None and self.fails in str(log))


@pytest.fixture
def stubbed(monkeypatch):
    """stubbed(meet, fails) -> Processes, in place of real ones."""
    monkeypatch.setattr(running, "measured_in", lambda recipe, run: {**COST, "peak_gib": 1.0})

    def stub(meet: int, fails: str | None = None) -> Processes:
        stand_in = Processes(meet, fails)
        monkeypatch.setattr(processes, "run_logged", stand_in.run)
        return stand_in

    return stub


@pytest.fixture
def gpus(monkeypatch):
    """gpus("0,1"): the visible ones."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    return lambda text: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)


# ---------------------------------------------------------------------------------------------------------- scheduling


def test_two_jobs_run_two_at_once_each_on_its_gpu_and_tests_after_all_trials(tmp_path, stubbed, gpus, capfd):
    gpus("4,7")
    path = write_comparison(tmp_path, methods=METHODS, seeds=[0, 1])
    began = stubbed(meet=2)
    assert compare_command(["--config", str(path), "--jobs", "2"]) == 0
    assert began.most_at_once == 2
    names = [name for name, _ in began.calls]
    assert len(names) == 12 and all(name.endswith("test.log") for name in names[8:])
    slots = {slot for _, slot in began.calls}
    assert {(slot.jobs, slot.gpu) for slot in slots} == {(2, "4"), (2, "7")}
    result = json.loads((tmp_path / "out" / "trials" / "lora" / "lr0.01-seed0" / "result.json").read_text())
    assert result["jobs"] == 2
    captured = capfd.readouterr()
    assert "at once: lora (2), dora (2)." in captured.out
    assert "at once: lora (2), dora (2)." in (tmp_path / "out" / "comparison.html").read_text()


def test_comparison_and_settings_are_those_of_one_job(tmp_path, stubbed, capfd):
    reports, settings = [], []
    for jobs in ("1", "4"):
        folder = tmp_path / jobs
        folder.mkdir()
        path = write_comparison(folder, methods=METHODS, seeds=[0, 1])
        stubbed(meet=1)
        assert compare_command(["--config", str(path), "--jobs", jobs]) == 0
        reports.append((folder / "out" / "comparison.md").read_text().replace(str(folder), ""))
        files = sorted((folder / "out").rglob("settings.json"))
        settings.append([file.read_text().replace(str(folder), "") for file in files])
        assert compare_command(["--config", str(path), "--list"]) == 0
        assert capfd.readouterr().out.count("\tfinished") == 8
    alone, beside = (text.splitlines() for text in reports)
    assert [line for line in beside if not line.startswith("* Trained beside other trials")] == alone
    assert len(beside) == len(alone) + 1 and settings[0] == settings[1]


def test_failures_are_told_in_order_and_the_others_go_on(tmp_path, stubbed, capfd, caplog):
    path = write_comparison(tmp_path, methods=METHODS, seeds=[0, 1])
    stubbed(meet=1, fails="seed1/train.log")
    assert compare_command(["--config", str(path), "--jobs", "3"]) == 1
    failed = [line for line in capfd.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert [line.split(":")[1].strip() for line in failed] == ["1", "3", "4", "5", "6", "7"]  # no rate has every seed
    assert failed[0].startswith("failed: 1: train lora learning_rate=0.01 seed=1: training: exit code 1: ValueError")
    assert "2: train dora learning_rate=0.01 seed=0: started" in caplog.messages
    assert "2: train dora learning_rate=0.01 seed=0: finished" in caplog.messages


def test_training_beside_others_is_marked_though_another_start_completes_it(tmp_path, stubbed):
    study = load_study(write_comparison(tmp_path, methods={"lora": LORA}))
    (trial,) = study.trials()
    stubbed(meet=1, fails="validation.log")
    assert "validation: exit code 1" in running.run_trial(study, trial, Slot(jobs=3))
    stubbed(meet=1)
    assert running.run_trial(study, trial) is None
    assert running.finished(study, trial)["jobs"] == 3
    assert "lora (3)." in report.write_report(study)


def test_result_of_an_earlier_version_was_measured_alone(tmp_path, stubbed):
    study = load_study(write_comparison(tmp_path, methods={"lora": LORA}))
    (trial,) = study.trials()
    stubbed(meet=1)
    running.run_trial(study, trial)
    path = study.folder(trial) / "result.json"
    result = json.loads(path.read_text())
    assert result.pop("jobs") == 1
    path.write_text(json.dumps(result))
    assert "beside other trials" not in report.write_report(study)


# ------------------------------------------------------------------------------------------------------------- signals


def sleepers(monkeypatch, program: str) -> None:
    """In place of trainings: processes that run until something ends them."""
    command = [sys.executable, "-c", program]
    monkeypatch.setattr(processes, "train_command", lambda *_: command)


def act_when(folder: Path, ready: str, number: int, act) -> None:
    """In a thread: act() once so many trainings have written `ready`."""

    def watch() -> None:
        while sum(ready in log.read_text() for log in folder.rglob("train.log")) < number:
            time.sleep(0.05)
        act()

    threading.Thread(target=watch, daemon=True).start()


READY = "print('here', flush=True)\ntime.sleep(600)\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_every_child_and_nothing_starts_any_more(tmp_path, monkeypatch, number):
    path = write_comparison(tmp_path)  # three trials
    sleepers(monkeypatch, f"import signal, sys, time\nsignal.signal({int(number)}, lambda *_: sys.exit(75))\n{READY}")
    before = signal.getsignal(number)
    main = threading.main_thread().ident
    act_when(tmp_path / "out", "\nhere", 2, lambda: signal.pthread_kill(main, number))
    assert compare_command(["--config", str(path), "--jobs", "2"]) == 75
    assert signal.getsignal(number) is before
    trials = tmp_path / "out" / "trials"
    assert len(list(trials.rglob("train.log"))) == len(list(trials.iterdir())) == 2
    assert not list(trials.rglob("error.json")) and not list(trials.rglob("result.json"))


@pytest.fixture
def default_sigint():
    """Processes of pytest-xdist ignore the signal, and so would what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_no_child(tmp_path, monkeypatch, default_sigint):
    path = write_comparison(tmp_path)
    sleepers(monkeypatch, f"import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{READY}")
    main = threading.main_thread().ident
    act_when(tmp_path / "out", "\nhere", 2, lambda: signal.pthread_kill(main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        compare_command(["--config", str(path), "--jobs", "2"])
    assert len(list((tmp_path / "out").rglob("train.log"))) == 2 and not list((tmp_path / "out").rglob("error.json"))


def test_an_error_that_ends_the_comparison_stops_the_others(tmp_path, monkeypatch, capfd):
    path = write_comparison(tmp_path)
    good = [sys.executable, "-c", "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(75))\n" + READY]
    begun = threading.Event()
    act_when(tmp_path / "out", "\nhere", 1, begun.set)
    run_trial = running.run_trial

    def second_cannot_run(study, trial, slot):
        if trial.index == 1:
            with slot.waiting():
                assert begun.wait(60)
            raise RecipeError("was run with another learning rate")
        return run_trial(study, trial, slot)

    monkeypatch.setattr(processes, "train_command", lambda *_: good)
    monkeypatch.setattr(command.running, "run_trial", second_cannot_run)
    assert compare_command(["--config", str(path), "--jobs", "2"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == "error: was run with another learning rate"
    assert not list((tmp_path / "out").rglob("error.json"))


def test_a_signal_before_the_process_is_known_ends_it_too(tmp_path):
    with Running() as shared:
        shared.stop()
        with pytest.raises(processes.Stopped):
            processes.run_logged(["sleep", "600"], tmp_path / "log", Slot(2, None, shared))
        assert (tmp_path / "log").read_text() == ""  # not even started


# ---------------------------------------------------------------------------------------------- arguments and launchers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "argument --jobs: must be a number >= 1, got 0 (see --help)"),
        (["--jobs", "two"], "argument --jobs: invalid number value: 'two' (see --help)"),
        (["--jobs", "2", "--list"], "--jobs goes with running everything, not with --list, --trial or --report"),
        (["--jobs", "2", "--trial", "0"], "--jobs goes with running everything, not with --list, --trial or --report"),
        (["--jobs", "2", "--report"], "--jobs goes with running everything, not with --list, --trial or --report"),
    ],
)
def test_bad_jobs_are_one_line_and_exit_2(tmp_path, capfd, arguments, message):
    assert compare_command(["--config", str(write_comparison(tmp_path)), *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_launcher_of_several_processes_is_refused_on_gpus_alone(tmp_path, gpus, monkeypatch, capfd):
    gpus("0,1")
    path = write_comparison(tmp_path, launcher="deepspeed --num_gpus 2")
    assert compare_command(["--config", str(path), "--jobs", "2"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: --jobs 2: launcher: deepspeed --num_gpus 2: trials at once on GPUs take one process")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_several_at_once("deepspeed --num_gpus 2", 2)


@pytest.mark.parametrize(
    "launcher", ["deepspeed --master_port 29501", "torchrun --rdzv-endpoint=localhost:29400 --rdzv-backend=c10d"]
)
def test_a_launcher_that_states_a_port_is_refused(launcher, gpus):
    gpus("")
    with pytest.raises(RecipeError, match=r"--jobs 3: launcher: .*: states a port"):
        check_several_at_once(launcher, 3)


@pytest.mark.parametrize(
    ("launcher", "with_one_gpu", "with_two"),
    [
        ("", True, True),
        ("python -u", True, True),
        ("env OMP_NUM_THREADS=1 nice -n 10 python", True, True),
        ("deepspeed", True, False),
        ("/opt/bin/deepspeed --num_gpus 1", True, True),
        ("deepspeed --num_gpus=1 --num_nodes=1", True, True),
        ("deepspeed --num_accelerators 2", False, False),
        ("deepspeed --num_nodes 1", True, False),
        ("deepspeed --include localhost:0", False, False),
        ("torchrun", True, True),
        ("torchrun --standalone --nproc-per-node=1 --nnodes 1:1", True, True),
        ("torchrun --standalone --nproc_per_node gpu", False, False),
        ("python -m torch.distributed.run --nproc-per-node=2", False, False),
        ("torchrun --nnodes=2", False, False),
        ("accelerate launch", True, False),
        ("accelerate launch --num_processes 1 --num_cpu_threads_per_process 4", True, True),
        ("srun python", False, False),
    ],
)
def test_what_a_launcher_says_of_its_processes(launcher, with_one_gpu, with_two):
    assert starts_one_process(launcher, 1) is with_one_gpu
    assert starts_one_process(launcher, 2) is with_two


def test_deepspeed_gets_a_port_and_its_gpu_only_beside_others():
    launcher = "deepspeed --num_gpus 1 --num_nodes=1 --no_local_rank"
    assert launcher_words(launcher, ALONE) == launcher.split()
    first, second = (launcher_words(launcher, Slot(2, gpu)) for gpu in ("0", "1"))
    assert first[:2] == ["deepspeed", "--master_port"] and first[3:] == ["--no_local_rank"]
    assert 0 < int(first[2]) < 2**16 and int(second[2]) > 0
    assert launcher_words(launcher, Slot(2))[3:] == launcher.split()[1:]  # one GPU, or none: nothing to choose
    assert launcher_words("torchrun --standalone", Slot(2, "1")) == ["torchrun", "--standalone"]
    assert launcher_words("", Slot(2, "1")) == [sys.executable]


def test_slots_go_round_the_visible_gpus(gpus, monkeypatch):
    gpus(" 2, GPU-a,-1,5")
    assert visible_gpus() == ["2", "GPU-a"]
    assert [slot.gpu for slot in slots_of(Running(), 3)] == ["2", "GPU-a", "2"]
    gpus("3")
    assert [slot.gpu for slot in slots_of(Running(), 2)] == [None, None]
    gpus("")
    assert visible_gpus() == []
    gpus("0,1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert visible_gpus() == []


def test_process_gets_the_gpu_of_its_slot(tmp_path):
    program = "import os; print('on', os.environ['CUDA_VISIBLE_DEVICES'])"
    with Running() as shared:
        code = processes.run_logged([sys.executable, "-c", program], tmp_path / "log", Slot(2, "5", shared))
    lines = (tmp_path / "log").read_text().splitlines()
    assert code == 0 and lines[0].startswith("$ CUDA_VISIBLE_DEVICES=5 ") and lines[1] == "on 5"
