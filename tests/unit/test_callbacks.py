"""Callbacks: checks and noise at the start, utilisation and memory, profiles, the progress line, TensorBoard's tags."""

import gzip
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState

from fvae_dist.training.callbacks import (
    PROFILE_AFTER,
    PerformanceLogs,
    ProfileTrace,
    ProgressLine,
    StartupChecks,
    TensorBoardLogs,
    peak_memory_gib,
    recomputes,
)
from fvae_dist.training.checks import StartupError, check_resident
from fvae_dist.training.log_window import LOGGED_TERMS
from tests.models import tiny_adapter, tiny_model

LOGS = {
    "loss": 2.5,
    "loss/total": 2503.0,
    "loss/task": 2.5,
    "loss/neg_elbo": 3.0,
    "elbo/nll": 4.0,
    "learning_rate": 1e-4,
    "grad_norm": 0.5,
    "perf/tokens_per_s_per_gpu": 1000.0,
    "epoch": 0.5,
}
TERMS = tuple(LOGGED_TERMS.values())


def state(step: int = 3, rank: int = 0) -> TrainerState:
    return TrainerState(global_step=step, max_steps=10, is_world_process_zero=rank == 0)


def fake_trainer(**attributes) -> SimpleNamespace:
    return SimpleNamespace(
        args=SimpleNamespace(device=torch.device("cpu")),
        accelerator=SimpleNamespace(gather=lambda tensor: torch.cat([tensor, tensor + 1])),
        layer_terms={term: torch.arange(4.0) for term in TERMS},
        **attributes,
    )


# -------------------------------------------------------------------------------------------------------------- start


def begin(model, rank: int = 0) -> None:
    callback = StartupChecks(SimpleNamespace(model=model))
    callback.on_train_begin(SimpleNamespace(seed=5, process_index=rank), state(), TrainerControl())


def test_startup_gives_every_rank_its_own_noise():
    model = get_peft_model(tiny_model("llama"), tiny_adapter(target_modules=["q_proj"]))
    draws = []
    for rank in (0, 1, 0):
        begin(model, rank)
        draws.append(torch.randn(4))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_startup_refuses_adapters_in_16_bits_and_a_trainable_base():
    model = get_peft_model(tiny_model("llama"), tiny_adapter(target_modules=["q_proj"]))
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.data = parameter.data.bfloat16()
    with pytest.raises(StartupError, match="not float32"):
        begin(model)
    model = get_peft_model(tiny_model("llama"), tiny_adapter(target_modules=["q_proj"]))
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    with pytest.raises(StartupError, match="belongs to the frozen base"):
        begin(model)


def test_startup_refuses_a_resident_weight_that_is_a_shard():
    model = tiny_model("llama").requires_grad_(False)
    check_resident(model)
    model.lm_head.weight.ds_id = 5
    with pytest.raises(StartupError, match=r"1 frozen parameters are still ZeRO-3's, lm_head\.weight first"):
        check_resident(model)


# -------------------------------------------------------------------------------------------------------- performance


@pytest.mark.parametrize("recomputed", [False, True])
def test_performance_logs_add_utilisation_and_the_largest_memory(recomputed):
    logs = dict(LOGS)
    callback = PerformanceLogs(fake_trainer(), matmul_parameters=10**9, peak=100.0)
    callback.on_log(SimpleNamespace(gradient_checkpointing=recomputed), state(), TrainerControl(), logs=logs)
    assert logs["perf/mfu"] == pytest.approx(0.04)
    assert logs["perf/hfu"] == pytest.approx(0.06 if recomputed else 0.04)
    assert logs["mem/peak_gib"] == pytest.approx(peak_memory_gib(torch.device("cpu")) + 1, rel=0.05)


def test_performance_logs_without_a_known_peak_say_nothing_of_mfu():
    logs = dict(LOGS)
    PerformanceLogs(fake_trainer(), 10**9, None).on_log(SimpleNamespace(), state(), TrainerControl(), logs=logs)
    assert "perf/mfu" not in logs and "mem/peak_gib" in logs


@pytest.mark.parametrize("logs", [None, {}, {"eval_loss": 1.0}, {"train_runtime": 5.0}])
def test_performance_logs_leave_other_lines_alone(logs):
    before = None if logs is None else dict(logs)
    PerformanceLogs(fake_trainer(), 10**9, 100.0).on_log(SimpleNamespace(), state(), TrainerControl(), logs=logs)
    assert logs == before


def test_recomputes_knows_both_names():
    assert recomputes(SimpleNamespace(activation_checkpointing=True))
    assert recomputes(SimpleNamespace(gradient_checkpointing=True))
    assert not recomputes(SimpleNamespace(gradient_checkpointing=False))


# ------------------------------------------------------------------------------------------------------------- output


def log_all(callback, rank: int, *lines: dict) -> None:
    callback.on_train_begin(None, state(rank=rank), TrainerControl())
    for line in lines:
        callback.on_log(None, state(rank=rank), TrainerControl(), logs=line)
    callback.on_step_end(None, state(rank=rank), TrainerControl()) if hasattr(callback, "on_step_end") else None
    callback.on_train_end(None, state(rank=rank), TrainerControl())


def test_progress_is_plain_lines_in_a_log_file(capsys):
    log_all(ProgressLine(), 0, LOGS, {"eval_loss": 1.25}, {"train_runtime": 1.0})
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 2
    assert all(
        word in lines[0] for word in ("step 3/10", "loss 2.5000", "tok/s/device 1,000", "neg_elbo 3.0", "1.00e-04")
    )
    assert lines[1] == "step 3/10  eval_loss 1.2500"
    assert captured.err == ""


def test_other_ranks_print_and_write_nothing(capsys, tmp_path):
    log_all(ProgressLine(), 1, LOGS)
    log_all(TensorBoardLogs(fake_trainer(), tmp_path / "tb", True), 1, LOGS)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "tb").exists()


@pytest.mark.parametrize("histograms", [False, True])
def test_tensorboard_gets_the_documented_tags(tmp_path, histograms):
    log_all(TensorBoardLogs(fake_trainer(), tmp_path, histograms), 0, LOGS, {"eval_loss": 1.25, "eval_runtime": 9.0})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        *("loss/total", "loss/task", "loss/neg_elbo", "elbo/nll", "optim/lr", "optim/grad_norm"),
        *("perf/tokens_per_s_per_gpu", "eval/loss"),
    }
    scalar = events.Scalars("eval/loss")[0]
    assert (scalar.step, scalar.value) == (3, 1.25)
    assert set(events.Tags()["histograms"]) == ({f"elbo_layers/{term}" for term in TERMS} if histograms else set())


def test_tensorboard_of_a_resumed_run_drops_the_lost_steps(tmp_path):
    first = TensorBoardLogs(fake_trainer(), tmp_path, False)
    first.on_train_begin(None, state(step=0), TrainerControl())
    for step in (1, 2, 3, 4):
        first.on_log(None, state(step=step), TrainerControl(), logs={"loss/task": float(step)})
    first.writer.close()
    # Stopped after step 4, resumed from the checkpoint of step 2.
    second = TensorBoardLogs(fake_trainer(), tmp_path, False)
    second.on_train_begin(None, state(step=2), TrainerControl())
    second.on_log(None, state(step=3), TrainerControl(), logs={"loss/task": 30.0})
    second.writer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/task")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_folder_removed_in_mid_run_costs_points_alone(tmp_path, caplog):
    folder = tmp_path / "tensorboard"
    callback = TensorBoardLogs(fake_trainer(), folder, False)
    callback.on_train_begin(None, state(step=0), TrainerControl())
    for step in range(1, 7):
        if step == 3:
            shutil.rmtree(folder)
            folder.write_text("in the way")
        elif step == 5:
            folder.unlink()
        callback.on_log(None, state(step=step), TrainerControl(), logs={"loss/task": float(step)})
    callback.on_train_end(None, state(step=6), TrainerControl())
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/task")] == [5, 6]
    assert caplog.text.count("tensorboard: not written") == 1


# ------------------------------------------------------------------------------------------------------------ profiling


def run_steps(callback: ProfileTrace, count: int, rank: int = 0) -> None:
    args = SimpleNamespace(device=torch.device("cpu"))
    for step in range(count):
        callback.on_step_begin(args, state(step, rank), TrainerControl())
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(3).sum()
        callback.on_step_end(args, state(step + 1, rank), TrainerControl())
    callback.on_train_end(args, state(count, rank), TrainerControl())


def test_profile_holds_the_steps_asked_for(tmp_path):
    run_steps(ProfileTrace(tmp_path / "profile", 2), PROFILE_AFTER + 4)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == f"step{PROFILE_AFTER + 2}.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {name for name in names if name and name.startswith("step ")} == {
        f"step {PROFILE_AFTER + i}" for i in (0, 1)
    }
    assert "aten::sum" in names


def test_profile_of_a_run_that_ends_early(tmp_path, caplog):
    run_steps(ProfileTrace(tmp_path / "cut", 9), PROFILE_AFTER + 2)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [f"step{PROFILE_AFTER + 2}.json.gz"]
    with caplog.at_level(logging.WARNING):
        run_steps(ProfileTrace(tmp_path / "none", 1), PROFILE_AFTER)
    assert "nothing traced" in caplog.text and not (tmp_path / "none").exists()


def test_profile_is_of_the_first_rank_alone_and_no_error_ends_a_run(tmp_path, caplog):
    run_steps(ProfileTrace(tmp_path / "other", 1), PROFILE_AFTER + 2, rank=1)
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").write_text("")
    run_steps(ProfileTrace(tmp_path / "file" / "profile", 1), PROFILE_AFTER + 2)
    assert "logging.profile: not written" in caplog.text
