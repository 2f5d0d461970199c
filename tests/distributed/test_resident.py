"""Frozen weights gathered once: the same run, no gather of them in a step. Losses and gradients: test_layouts.py."""

from __future__ import annotations

import pytest
import torch

from fvae_dist.adapter.export import read_tensors

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("rank", [0, 1])
def test_steps_follow_the_run_that_gathers_in_every_pass(two_ranks, rank):
    expected, found = (two_ranks.result(name, rank) for name in ("whole_run", "resident_run"))
    logs = [[row for row in result["log"] if "loss/task" in row] for result in (expected, found)]
    assert len(logs[0]) == len(logs[1]) == 6
    for key in ("loss/task", "loss/neg_elbo", "grad_norm", "elbo/nll"):
        assert [row[key] for row in logs[1]] == pytest.approx([row[key] for row in logs[0]], rel=1e-6), key
    for name, value in expected["final"].items():
        torch.testing.assert_close(found["final"][name], value, rtol=0, atol=1e-6)
        assert not torch.equal(found["start"][name], found["final"][name]), name


@pytest.mark.parametrize("rank", [0, 1])
def test_frozen_weights_are_whole_and_bit_identical(two_ranks, rank):
    result, sharded = two_ranks.result("resident_run", rank), two_ranks.result("whole_run", rank)
    assert len(result["frozen"]) == 21
    for name, value in sharded["frozen"].items():
        assert torch.equal(result["frozen"][name], value), name
        assert torch.equal(result["frozen_after"][name], value), name
    assert set(result["sharded"]) == set(result["final"])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_gathers_the_adapters_once_and_nothing_else(two_ranks, rank):
    """Step 1 is left out, whose gradients the test gathers, and step 5, which a checkpoint comes before."""
    result = two_ranks.result("resident_run", rank)
    adapters = sum(value.numel() for value in result["final"].values())
    assert [result["gathered"][done] for done in (1, 2, 3, 5)] == [adapters] * 4
    assert result["linear_was_put_back"]
    assert result["num_hooks"] < 10  # DeepSpeed's were four for each of some hundred modules


def test_checkpoint_and_saved_adapter_are_whole(two_ranks):
    result = two_ranks.result("resident_run")
    output = two_ranks.folder / "out" / "resident_run"
    saved = read_tensors(output / "adapter" / "adapter_model.safetensors")
    for name, value in result["final"].items():
        assert torch.equal(saved[name.replace(".default", "")], value), name
    assert (output / "checkpoint-4" / "manifest.json").is_file()


def test_evaluation_and_generation_go_on_as_before(two_ranks):
    result = two_ranks.result("resident_run")
    losses = [row["eval_loss"] for row in result["log"] if "eval_loss" in row]
    assert len(losses) == 4 and losses[-1] == losses[-2] == result["evaluation"]  # of step 6, twice
    assert torch.equal(result["generated"], two_ranks.result("resident_run", 1)["generated"])
    assert result["generated"].shape == (1, 5)


@pytest.mark.parametrize("rank", [0, 1])
def test_tensors_that_ranks_cannot_share_evenly(two_ranks, rank):
    """Gradients reduced and values gathered at once, padded, are those of DeepSpeed's way, tensor by tensor."""
    found, expected = (two_ranks.result("resident_odd", rank)[name] for name in ("resident", "gathered"))
    assert found["num_hooks"] == 0 < expected["num_hooks"]
    assert any(value.numel() % 2 for value in expected["final"].values())
    for name, value in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][name], value, rtol=0, atol=1e-5 * float(value.abs().max()))
    for name, value in expected["final"].items():
        torch.testing.assert_close(found["final"][name], value, rtol=0, atol=1e-6)
        assert not torch.equal(found["start"][name], found["final"][name]), name
    norms = [[row["grad_norm"] for row in run["log"] if "grad_norm" in row] for run in (found, expected)]
    assert len(norms[0]) == 2 and norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_whose_gradients_are_no_numbers_is_passed_over(two_ranks, rank):
    """By the optimizer itself, without DeepSpeed asking for the norm: weights, moments and their count stay."""
    result = two_ranks.result("resident_spoiled", rank)
    first, second, third = result["values"]
    assert len(first) >= 4 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(second, third, strict=True))
    assert all(value.isfinite().all() for value in third)
    assert result["passed_over"] == (1, 0)
    norms = [row["grad_norm"] for row in result["log"] if "grad_norm" in row]
    assert [norm < float("inf") for norm in norms] == [True, False, True]
