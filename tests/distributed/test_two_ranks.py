"""ZeRO on two ranks, through the real trainers, against one process that computes the same thing directly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file

from fvae_dist.training.checkpoint_files import problem_with
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.resumable import OPTIMIZER_FILE
from fvae_dist.training.saving import ADAPTER_FILE
from tests.distributed.layouts import one_process, task_loss
from tests.distributed.tiny import load, pad_rows, rows
from tests.recipes import rewrite_manifest

pytestmark = pytest.mark.distributed


def assert_close(actual: torch.Tensor, expected: torch.Tensor, name: str, rtol: float) -> None:
    """Equal up to rtol of the tensor's largest entry."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * scale, msg=lambda text: f"{name}: {text}")


def adapter_on_disk(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTER_FILE)


def on_disk_name(name: str) -> str:
    return name.replace(".default", "")


# ------------------------------------------------------------------------------------- checkpointing


def test_checkpointing_is_non_reentrant(two_ranks):
    """TRL forces reentrant checkpointing under PEFT and ZeRO-3; the side loss would have no gradient then."""
    for scenario in ("five_steps", "lora"):
        keywords = two_ranks.result(scenario)["checkpointing"]
        assert keywords and all(entry["use_reentrant"] is False for entry in keywords)


def test_recomputation_leaves_no_modules_on_the_stack(two_ranks):
    """forty_steps runs without checkpointing; five_steps with it: DeepSpeed would leak modules every step."""
    assert two_ranks.result("five_steps")["forward_stack"] <= 1


# ------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("scenario", ["z3_sft_full", "z2_sft_full", "five_steps"])
def test_ranks_start_from_the_same_adapter(two_ranks, scenario):
    first, second = (two_ranks.result(scenario, rank)["start"] for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ranks_draw_different_noise(two_ranks):
    first, second = (two_ranks.result("five_steps", rank)["seed_draw"] for rank in range(2))
    assert not torch.isclose(first, second).any()


def test_data_order_is_that_of_one_rank_with_accumulation(two_ranks, tmp_path):
    """Two ranks x two rows see in each step, in the same order, what one rank with two micro-batches of two sees."""

    trainer = one_process(
        two_ranks.folder / "model",
        tmp_path,
        rows(20),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
    )
    first, second = (two_ranks.result("five_steps", rank)["seen"] for rank in range(2))
    assert trainer.seen == [[a[0], b[0]] for a, b in zip(first, second, strict=True)]


# ------------------------------------------------------------------------------------- frozen weights, precision


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scenario", ["five_steps", "whole_run", "half_precision"])
def test_frozen_weights_are_bit_identical_after_training(two_ranks, scenario, rank):
    result = two_ranks.result(scenario, rank)
    on_disk = load_file(two_ranks.folder / "model" / "model.safetensors")
    assert len(result["frozen_after"]) == len(on_disk)
    for name, value in result["frozen_after"].items():
        assert torch.equal(value, result["frozen"][name]), name
        original = on_disk[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        assert torch.equal(value, original.to(value.dtype)), name


def test_adapters_are_fp32_around_a_bf16_base(two_ranks):
    result = two_ranks.result("five_steps")
    assert result["shards"] == {"torch.float32"} and result["frozen_shards"] == {"torch.bfloat16"}
    assert result["communication"] == result["accumulation"] == "torch.float32"
    assert result["buckets"] == ["torch.float32"]
    for name, value in result["final"].items():
        assert value.dtype == result["gradients"][name].dtype == torch.float32
        assert torch.equal(value, result["masters"][name]), f"{name}: the parameter differs from its master weight"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("no_communication_dtype", "reduced in torch.bfloat16"),
        ("no_accumulation_dtype", "accumulated in torch.bfloat16"),
        ("narrow_adapter", "is torch.bfloat16, not float32"),
    ],
)
def test_start_refuses_lost_precision(two_ranks, broken, message):
    for rank in range(2):
        assert message in two_ranks.result("unsafe_precision", rank)[broken]


def test_small_updates_are_not_lost(two_ranks):
    """Forty AdamW steps of 1e-4 on the decoders' scales, which are about 1: in bf16 (spacing 0.004 to 0.008) each
    would round away. Where the gradient keeps its sign, the whole 4e-3 must arrive, in the file too."""
    result = two_ranks.result("forty_steps")
    saved = adapter_on_disk(two_ranks.folder / "out" / "forty_steps" / "adapter")
    for name in (name for name in result["final"] if name.endswith("scale")):
        moved = (saved[on_disk_name(name)] - result["start"][name]).abs()
        assert torch.equal(saved[on_disk_name(name)], result["masters"][name])
        assert 3.2e-3 < moved.max() < 4.04e-3
        assert (moved > 2e-3).float().mean() > 0.5, f"{name}: {moved}"


def test_half_precision_base_trains(two_ranks):
    """DeepSpeed derives its loss scaler from the first trained parameter: fp32, so nothing is scaled."""
    result = two_ranks.result("half_precision")
    trained = {dtype for name, dtype in result["dtypes"].items() if name in result["final"]}
    assert trained == {"torch.float32"}
    assert set(result["dtypes"].values()) == {"torch.float16", "torch.float32"}
    assert result["loss_scale"] == 1
    for name, gradient in result["gradients"].items():
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name
    assert all(math.isfinite(row["loss"]) for row in result["log"] if "loss" in row)


# ------------------------------------------------------------------------------------- save, load, resume


def test_saved_adapter_holds_the_live_values(two_ranks):
    result = two_ranks.result("five_steps")
    saved = adapter_on_disk(two_ranks.folder / "out" / "five_steps" / "adapter")
    assert set(saved) == {on_disk_name(name) for name in result["final"]}
    for name, value in result["final"].items():
        written = saved[on_disk_name(name)]
        assert written.dtype == torch.float32 and written.numel() > 0
        assert torch.equal(written, value), name


def test_saved_adapter_loads_in_plain_peft(two_ranks):
    result = two_ranks.result("five_steps")
    base = load(two_ranks.folder / "model", torch.bfloat16)
    model = PeftModel.from_pretrained(base, two_ranks.folder / "out" / "five_steps" / "adapter").eval()
    batch = pad_rows(rows(3, seed=3))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    kept = batch["attention_mask"].bool()
    # DeepSpeed's linear rounds the product to bf16 before it adds the encoder's bias; torch's rounds once.
    assert_close(logits[kept], result["eval_logits"][kept], "logits", rtol=1.6e-2)


def test_eval_loss_is_the_task_loss_alone(two_ranks):
    result = two_ranks.result("five_steps")
    base = load(two_ranks.folder / "model", torch.bfloat16)
    model = PeftModel.from_pretrained(base, two_ranks.folder / "out" / "five_steps" / "adapter").eval()
    evaluation_rows = rows(6, seed=3)
    # The trainer averages batches of two rows a rank, each over its own labels.
    batches = [pad_rows(evaluation_rows[start : start + 2]) for start in range(0, 6, 2)]
    with torch.no_grad():
        losses = [task_loss(model, batch).item() for batch in batches]
    # A side loss or a task weight of 1000 would show; how the last, incomplete round of batches is padded does not.
    assert min(losses) <= result["evaluation"]["eval_loss"] <= max(losses)
    assert not any(key.startswith("eval_elbo") or "neg_elbo" in key for key in result["evaluation"])


def test_resume_continues_bit_for_bit(two_ranks):
    """Same losses, gradient norms, learning rates and final weights, though noise and dropout are random."""
    for rank in range(2):
        result = two_ranks.result("resume", rank)
        uninterrupted, resumed = result["uninterrupted"], result["resumed"]
        keys = ("step", "loss", "loss/task", "loss/neg_elbo", "grad_norm", "learning_rate", "elbo/nll")
        logs = [
            [[row[key] for key in keys] for row in run["log"] if "loss/task" in row] for run in (uninterrupted, resumed)
        ]
        assert len(logs[0]) == len(logs[1]) == 4  # the resumed history begins with the checkpoint's
        assert logs[0] == logs[1]
        assert uninterrupted["seen"][2:] == resumed["seen"]
        for name, value in uninterrupted["final"].items():
            assert torch.equal(value, resumed["final"][name]), name
            assert not torch.equal(value, uninterrupted["start"][name]), f"{name} never moved"


def test_checkpoint_holds_adapters_only(two_ranks):
    checkpoint = two_ranks.folder / "out" / "resume" / "checkpoint-2"
    assert problem_with(checkpoint) == ""
    trained = two_ranks.result("resume")["resumed"]["final"]
    assert set(adapter_on_disk(checkpoint)) == {on_disk_name(name) for name in trained}
    moments = load_file(checkpoint / OPTIMIZER_FILE)
    assert {key: value.shape for key, value in moments.items()} == {
        f"{moment}/{name}": value.shape for moment in ("exp_avg", "exp_avg_sq") for name, value in trained.items()
    }
    assert not [path for path in checkpoint.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]


ELASTIC_RTOL = 1e-5


def losses(log):
    keys = ("step", "loss/task", "loss/neg_elbo", "loss", "learning_rate")
    return [[row[key] for key in keys] for row in log if "loss/task" in row]


@pytest.mark.parametrize("layout", ["zero3", "resident", "zero2", "zero0", "ddp", "flat_ddp", "flat_resident"])
def test_one_rank_goes_on_as_two(two_ranks, layout):
    """Four steps in one process against two in it and two on two ranks, with other micro-batches and accumulation."""
    output = two_ranks.folder / "out" / "one_rank"
    expected = losses(json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["log_history"])
    final = adapter_on_disk(output / "checkpoint-4")
    for rank in range(2):
        result = two_ranks.result("elastic", rank)[layout]
        stages = {"zero3": 3, "resident": 3, "zero2": 2, "zero0": 0, "ddp": None}
        assert result["stage"] == stages[layout.removeprefix("flat_")]
        for actual, wanted in zip(losses(result["log"]), expected, strict=True):
            assert actual == pytest.approx(wanted, rel=ELASTIC_RTOL)
        for name, value in result["final"].items():
            torch.testing.assert_close(value, final[on_disk_name(name)], rtol=0, atol=ELASTIC_RTOL)


@pytest.mark.parametrize("step", [2, 4])
def test_two_ranks_go_on_as_one(two_ranks, tmp_path, step):
    """From the middle of the first epoch and of the second; the last steps of both are incomplete."""
    trainer = one_process(
        two_ranks.folder / "model",
        tmp_path,
        rows(11),
        resume=two_ranks.folder / "out" / "whole_run" / f"checkpoint-{step}",
        per_device_train_batch_size=4,
        num_train_epochs=2,
        lr_scheduler_type="linear",
    )
    result = two_ranks.result("whole_run")
    for actual, wanted in zip(losses(trainer.state.log_history), losses(result["log"]), strict=True):
        assert actual == pytest.approx(wanted, rel=ELASTIC_RTOL)
    for name, value in result["final"].items():
        final = trainer.model.get_parameter(name).detach()
        torch.testing.assert_close(value, final, rtol=0, atol=ELASTIC_RTOL)


def test_other_base_model_or_global_batch_is_refused(two_ranks, tmp_path):
    checkpoint = two_ranks.folder / "out" / "one_rank" / "checkpoint-2"
    with pytest.raises(RecipeError, match="a global batch of 8 sequences, this run has 4"):
        one_process(two_ranks.folder / "model", tmp_path, rows(40), resume=checkpoint, per_device_train_batch_size=4)
    other = shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    rewrite_manifest(other, base_fingerprint="another")
    with pytest.raises(RecipeError, match="was trained on another base model"):
        one_process(two_ranks.folder / "model", tmp_path, rows(40), resume=other, per_device_train_batch_size=8)


def test_lora_baseline_trains_logs_and_saves(two_ranks):
    result = two_ranks.result("lora")
    rows_logged = [row for row in result["log"] if "loss/task" in row]
    assert len(rows_logged) == 3
    for row in rows_logged:
        assert row["loss/total"] == row["loss/task"] and "loss/neg_elbo" not in row
        assert row["perf/tokens_per_s_per_gpu"] > 0
    folder = two_ranks.folder / "out" / "lora" / "adapter"
    assert isinstance(PeftConfig.from_pretrained(folder), LoraConfig)
    saved = adapter_on_disk(folder)
    for name, value in result["final"].items():
        assert torch.equal(saved[on_disk_name(name)], value) and value.dtype == torch.float32
    assert any(not torch.equal(result["final"][name], result["start"][name]) for name in result["final"])


# ------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_holds_the_whole_model_while_loading(two_ranks, rank):
    """257 MB in bf16: measured 129 MB of shards a rank, and a peak of 142 MB (a few whole tensors on top)."""
    result, whole = two_ranks.result("loading", rank), two_ranks.large_model_bytes
    assert result["dtypes"] == {"torch.bfloat16"}
    assert result["shard_bytes"] == pytest.approx(whole / 2, rel=0.01)
    assert result["peak_growth_bytes"] < 0.65 * whole


# ------------------------------------------------------------------------------------- failure


def test_non_finite_loss_on_one_rank_stops_all(two_ranks):
    errors = [two_ranks.result("non_finite", rank) for rank in range(2)]
    by_first_token = {row["input_ids"][0]: index for index, row in enumerate(rows(20))}
    # Rows of a dozen tokens do not occur inside one another, so the records named are exactly those of the batch.
    records = sorted(by_first_token[token] for token in errors[1]["seen"][2][0])
    for error in errors:
        assert error["error"] == "NonFiniteLossError"
        assert "in step 3 on rank(s) 1" in error["message"]
        assert f"rank 1 was at training records {records}" in error["message"]
    assert all(code not in (0, None) for code in two_ranks.exit_codes), "a rank ended well, or hung"
    assert two_ranks.seconds_after_error < 30
    for log in two_ranks.logs:
        assert "NonFiniteLossError: non-finite loss in step 3" in log


def test_last_checkpoint_before_a_non_finite_loss_loads(two_ranks):
    output = two_ranks.folder / "out" / "non_finite"
    assert not (output / "checkpoint-3").exists()
    assert problem_with(output / "checkpoint-2") == ""
    model = PeftModel.from_pretrained(load(two_ranks.folder / "model"), output / "checkpoint-2")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("case", ["sharded", "sharded_tied", "shared"])
def test_the_fused_head_is_trls(two_ranks, case, rank):
    """Whether ZeRO-3 gathers a head of its own or the embedding, or rows are shared; evaluated between the steps."""
    logs = two_ranks.result("fused_head", rank)
    for key in ("loss", "grad_norm", "eval_loss", "entropy", "mean_token_accuracy"):
        trl, fused = ([row[key] for row in logs[f"{case}_{head}"] if key in row] for head in ("trl", "fused"))
        assert len(fused) >= 2 and fused == pytest.approx(trl, rel=1e-5), key
