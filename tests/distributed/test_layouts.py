"""The invariances of DESIGN.md: one global batch, any layout, the same losses and gradients (see layouts.py)."""

from __future__ import annotations

import pytest
import torch

from fvae_dist import side_loss
from fvae_dist.adapter.noise import TokenNoise
from fvae_dist.training.gradient_split import KINDS, kind_of
from tests.distributed import layouts, resident
from tests.distributed.tiny import attach, load, pad_rows, rows

pytestmark = pytest.mark.distributed

RTOL = 1e-5  # fp32: sums over tokens and ranks are added in another order
RESIDENT = [f"resident_{layout}" for layout in resident.LAYOUTS]
LAYOUTS = [
    *layouts.LAYOUTS,
    "offload",
    "hpz",
    *layouts.SEQUENCE_PARALLEL,
    "sp_resident",
    *layouts.TILED,
    *RESIDENT,
    *resident.FUSED,
]


@pytest.fixture(scope="module")
def reference(two_ranks):
    """Losses, terms and gradients of the documents as one padded batch in one process, without any trainer."""
    model = attach(load(two_ranks.folder / "model")).train()
    return layouts.reference_step(model, pad_rows(layouts.documents()))


def test_every_pair_of_factors_is_covered():
    assert layouts.uncovered_pairs() == set()


def test_the_documents_are_a_hard_case(two_ranks):
    """Ranks hold different numbers of rows, tokens and labels, in different proportions; one row has no label."""
    by_first_token = {row["input_ids"][0]: row for row in layouts.documents()}
    assert any(set(row["labels"]) == {-100} for row in by_first_token.values())
    counts = []
    for rank in range(2):
        first_tokens = two_ranks.result("z3_sft_full", rank)["seen"][0][0]
        held = [by_first_token[t] for t in first_tokens]
        num_labels = sum(label != -100 for row in held for label in row["labels"])
        counts.append((len(held), sum(len(row["input_ids"]) for row in held), num_labels))
    # The second rank's last row only fills the batch: it is one of the first rank's.
    assert counts[0][0] == counts[1][0] == 4
    seen = [two_ranks.result("z3_sft_full", rank)["seen"][0][0] for rank in range(2)]
    assert seen[1][-1] in seen[0]
    assert counts[0][1] * counts[1][2] != counts[1][1] * counts[0][2]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_equals_one_process(two_ranks, reference, layout, rank):
    result = two_ranks.result(layout, rank)
    log = result["log"][0]
    assert log["loss/task"] == pytest.approx(reference["task"], rel=RTOL)
    assert log["loss/neg_elbo"] == pytest.approx(reference["neg_elbo"], rel=RTOL)
    assert set(result["gradients"]) == set(reference["gradients"])
    for name, expected in reference["gradients"].items():
        scale = expected.abs().max().item()
        assert scale > 0, f"{name} has no gradient: the comparison would be empty"
        torch.testing.assert_close(
            result["gradients"][name], expected, rtol=0, atol=RTOL * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logs_equal_direct_computation(two_ranks, reference, layout):
    log = two_ranks.result(layout)["log"][0]
    total = 1000 * reference["task"] + reference["neg_elbo"]
    assert log["loss/total"] == pytest.approx(total, rel=RTOL)
    assert log["loss"] == pytest.approx(total, rel=RTOL)
    for term in ("nll", "kl_z1", "z1_sq", "z2_sq", "gamma", "wasserstein", "clamped"):
        assert log[f"elbo/{term}"] == pytest.approx(reference["terms"][term], rel=RTOL), term
    assert log["elbo/r2"] == pytest.approx(reference["terms"]["r2"], rel=1e-4)
    assert log["elbo/active_units"] == pytest.approx(reference["terms"]["active_z1"])
    assert log["elbo/active_units_z2"] == pytest.approx(reference["terms"]["active_z2"])
    assert log["perf/tokens_per_s_per_gpu"] > 0


def test_layouts_ran_as_they_are_named(two_ranks):
    for layout, (_, stage, checkpointing, _, _) in layouts.LAYOUTS.items():
        result = two_ranks.result(layout)
        assert result["stage"] == (None if stage == "ddp" else stage)
        keywords = result["checkpointing"]
        assert bool(keywords) == (checkpointing != "off")
        assert all(entry["use_reentrant"] is False for entry in keywords)
        assert any("context_fn" in entry for entry in keywords) == (checkpointing == "selective")
        assert len(result["seen"][0]) == layouts.settings(layout)["accumulation"]


def test_whole_run_equals_one_process(two_ranks, tmp_path):
    """Two epochs with their incomplete last steps, AdamW, noise and dropout: step by step, and the final weights."""
    trainer = layouts.one_process(
        two_ranks.folder / "model",
        tmp_path,
        rows(11),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        lr_scheduler_type="linear",
    )
    expected = [row for row in trainer.state.log_history if "loss/task" in row]
    assert len(expected) == 6 and [len(step[0]) for step in trainer.seen] == [4, 4, 3] * 2
    for rank in range(2):
        result = two_ranks.result("whole_run", rank)
        logs = [row for row in result["log"] if "loss/task" in row]
        for key in ("loss/task", "loss/neg_elbo", "grad_norm", "learning_rate", "elbo/nll"):
            assert [row[key] for row in logs] == pytest.approx([row[key] for row in expected], rel=1e-4), key
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                assert not torch.equal(result["start"][name], result["final"][name])
                torch.testing.assert_close(result["final"][name], parameter.detach(), rtol=0, atol=1e-5)


def test_gradient_norms_of_the_losses_apart_are_those_of_one_process(two_ranks):
    model = attach(load(two_ranks.folder / "model")).train()
    batch = pad_rows(layouts.documents())
    expected: dict[str, float] = {}
    with side_loss.collect(model, noise=TokenNoise(batch, seed=layouts.SEED, step=0)) as collected:
        losses = {"task": 1000 * layouts.task_loss(model, batch)}
    losses["side"] = collected.neg_elbo
    for part, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                key = f"gradient/{part}/{kind_of(name)}"
                expected[key] = expected.get(key, 0.0) + parameter.grad.square().sum().item()
    log = two_ranks.result("gradient_split")["log"][0]
    logged = {key: value for key, value in log.items() if key.startswith("gradient/")}
    assert set(logged) == {f"gradient/{part}/{kind}" for part in ("task", "side") for kind in KINDS}
    for key, value in logged.items():
        assert value == pytest.approx(expected.get(key, 0.0) ** 0.5, rel=RTOL), key


def test_gradients_of_the_losses_apart_add_nothing_to_the_step(two_ranks):
    for rank in range(2):
        without, with_split = (two_ranks.result(name, rank) for name in ("z3_sft_off", "gradient_split"))
        for key in ("loss", "loss/task", "loss/neg_elbo", "grad_norm"):
            assert without["log"][0][key] == with_split["log"][0][key], key
        for name, value in without["final"].items():
            assert torch.equal(value, with_split["final"][name]), name
