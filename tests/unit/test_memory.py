"""The memory estimate: grows with what it should grow with, shrinks with sharding."""

from types import SimpleNamespace

import pytest

from fvae_dist.planning.memory import GIB, MemoryEstimate, estimate_memory

LLAMA3_8B = SimpleNamespace(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256)
BASE = {
    "base_parameters": 8_030_261_248,
    "trainable_parameters": 47_500_000,
    "bytes_per_weight": 2,
    "num_tokens": 4096,
    "stage": 3,
    "world_size": 8,
    "checkpointing": True,
}


def estimate(**changes) -> MemoryEstimate:
    return estimate_memory(LLAMA3_8B, **{**BASE, **changes})


def test_total_is_the_sum_of_its_parts():
    e = estimate()
    parts = (e.base_weights_gib, e.gathered_weights_gib, e.adapter_states_gib, e.activations_gib)
    assert e.total_gib == pytest.approx(sum(parts))
    assert all(part > 0 for part in parts)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("base_parameters", [8e9, 9e9, 16e9]),
        ("trainable_parameters", [1e6, 1e7, 1e8]),
        ("bytes_per_weight", [2, 4]),
        ("num_tokens", [1, 1024, 2048, 131072]),
        ("checkpointing", [True, False]),
    ],
)
def test_total_grows(key, values):
    totals = [estimate(**{key: value}).total_gib for value in values]
    assert totals == sorted(totals)
    assert len(set(totals)) == len(totals)


def test_base_weights_are_sharded_at_stage_three_only():
    assert estimate(world_size=1).base_weights_gib == pytest.approx(2 * 8_030_261_248 / GIB)
    assert estimate(world_size=8).base_weights_gib == pytest.approx(estimate(world_size=1).base_weights_gib / 8)
    for stage in (0, 1, 2):
        e = estimate(stage=stage, world_size=8)
        assert e.base_weights_gib == estimate(world_size=1).base_weights_gib
        assert e.gathered_weights_gib == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_total_falls_with_world_size(stage):
    totals = [estimate(stage=stage, world_size=size).total_gib for size in (1, 2, 8, 64)]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)


def test_stage_zero_shards_nothing():
    assert estimate(stage=0, world_size=8) == estimate(stage=0, world_size=1)


def test_adapter_and_activations_are_the_devices_own():
    assert estimate(world_size=8).activations_gib == estimate(world_size=1).activations_gib
    # Parameter and gradient whole, 16 bytes of states in shards.
    assert estimate(world_size=8).adapter_states_gib == pytest.approx(47_500_000 * (8 + 16 / 8) / GIB)
