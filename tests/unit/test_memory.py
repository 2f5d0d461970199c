"""The memory estimate: measured figures, parts that sum to the whole, and what it grows and falls with."""

from dataclasses import replace

import pytest

from fvae_dist.planning.hardware import GIB, constant
from fvae_dist.planning.memory import PARTS, estimate_memory, estimate_moments, host_memory_gib
from tests.planned import choice, subject


def estimate(of=None, name="zero3", recompute="full", world_size=8, **zero):
    of = of or subject()
    return estimate_memory(of, choice(of, name, recompute, **zero), world_size)


# Llama-3-8B shape, T = 8192, 2 x H200, ZeRO-3, flash_attention_2, full recomputation (measured).
@pytest.mark.parametrize(("peft_type", "measured_gib"), [("FVAE_LORA", 14.5), ("LORA", 13.5)])
def test_measured_runs_of_two_gpus(peft_type, measured_gib):
    assert estimate(subject(peft_type=peft_type), world_size=2).total_gib == pytest.approx(measured_gib, rel=0.05)


@pytest.mark.parametrize(
    ("liger", "length", "recompute", "measured_gib"),
    [
        (False, 8192, "full", 28.9),
        (False, 8192, "none", 63.0),
        (True, 8192, "full", 18.1),
        (True, 8192, "none", 40.5),
        (True, 16384, "none", 65.9),
    ],
)
def test_measured_runs_of_plain_peft(liger, length, recompute, measured_gib):
    """PEFT LoRA on one H200 without DeepSpeed (measured). It differs from our stack in two known ways.

    Its adapters kept the base's 16-bit input (2 bytes a token and feature, once) where fp32 ones keep a copy each; and
    transformers' own loss held the logits: in 16 bits, in fp32, their log-softmax and its gradient. Liger's does not.
    """
    of = subject("8b", length, "LORA", attention="sdpa", liger=liger)
    hidden = length * of.hidden
    planned = GIB * estimate(of, None, recompute, world_size=1).total_gib
    traces = of.traces(zero3=False)
    layers = of.num_layers if recompute == "none" else 1
    planned += layers * (traces.bare.saved_bytes + traces.whole.saved_bytes - traces.adapted.saved_bytes + 2 * hidden)
    planned -= layers * traces.whole.saved_bytes
    if not liger:
        static = GIB * estimate_memory(of, choice(of, None, recompute), 1).parts["checkpoints"]
        static += 2 * of.base_parameters + 16 * of.trainable_parameters
        kept = layers * (traces.bare.saved_bytes + traces.whole.saved_bytes - traces.adapted.saved_bytes + 2 * hidden)
        planned = static + (kept if recompute == "none" else 0) + 12 * length * of.vocabulary
    assert planned / GIB == pytest.approx(measured_gib, rel=0.05)


@pytest.mark.parametrize("name", [None, "zero2", "zero3", "zero3_hpz", "zero3_cpu_offload"])
@pytest.mark.parametrize("recompute", ["full", "none"])
def test_total_is_the_sum_of_its_parts(name, recompute):
    e = estimate(name=name, recompute=recompute)
    assert tuple(e.parts) == PARTS
    assert e.total_gib == pytest.approx(sum(e.parts.values()))
    assert all(size >= 0 for size in e.parts.values())
    assert e.needed_gib == pytest.approx(e.total_gib * (1 + constant("fragmentation")) + constant("context_gib"))


def test_peak_is_the_largest_moment():
    of = subject()
    moments = estimate_moments(of, choice(of), 8)
    assert [m.moment for m in moments] == ["a layer's backward pass", "the loss", "the optimizer's step"]
    assert estimate().total_gib == max(m.total_gib for m in moments)
    # With few tokens and a large head the loss is the peak: TRL gathers the head beside the prefetched layers.
    assert estimate(subject("405b", 512, "LORA"), world_size=1024).moment == "the loss"


def test_resident_weights_are_whole_and_nothing_is_gathered():
    of, width = subject(), 2
    gathered, resident, zero2 = estimate(), estimate(resident=True), estimate(name="zero2")
    assert resident.base_weights_gib == zero2.base_weights_gib == pytest.approx(width * of.base_parameters / GIB)
    assert resident.gathered_weights_gib == 0 < gathered.gathered_weights_gib
    assert resident.communication_gib < gathered.communication_gib  # no buffer that gathers arrive in
    assert resident.adapter_states_gib == gathered.adapter_states_gib  # the shipped threshold keeps them whole anyway
    assert resident.adapter_states_gib < zero2.adapter_states_gib + 4 * of.trainable_parameters / GIB
    # Stock linears do not keep the inputs of frozen weights, as ZeRO-3's do.
    assert (
        estimate(recompute="none", resident=True).layer_activations_gib
        < estimate(recompute="none").layer_activations_gib
    )
    assert estimate(name="zero3_hpz", resident=True).hpz_copy_gib == 0


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_grows_with_the_length(name):
    totals = [estimate(subject(length=n, peft_type="LORA"), name).total_gib for n in (512, 8192, 524288)]
    assert totals == sorted(totals) and len(set(totals)) == len(totals)


def test_grows_with_less_recomputation():
    totals = [estimate(name="zero2", recompute=kind).total_gib for kind in ("full", "selective", "none")]
    assert totals == sorted(totals) and len(set(totals)) == 3


def test_falls_with_stage():
    totals = [
        estimate(name=name, **zero).total_gib
        for name, zero in ((None, {}), ("zero2", {"stage": 1}), ("zero2", {}), ("zero3", {}))
    ]
    # The base decides: DeepSpeed's buckets cost stages 1 and 2 more than their shards of adapter states save.
    assert totals[3] < min(totals[:3])
    states = [
        estimate(name=name, **zero).adapter_states_gib
        for name, zero in ((None, {}), ("zero2", {"stage": 1}), ("zero2", {}), ("zero3", {}))
    ]
    assert states[0] > states[1] > states[2]


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_cpu_offload"])
def test_falls_with_the_world(name):
    totals = [estimate(name=name, world_size=size).total_gib for size in (2, 8, 64, 1024)]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == len(totals)


def test_base_is_sharded_at_stage_three_alone():
    of = subject()
    whole = 2 * of.base_parameters / GIB
    assert of.base_parameters == 8_030_261_248
    assert estimate(name="zero2").base_weights_gib == pytest.approx(whole)
    assert estimate(name="zero2").gathered_weights_gib == 0
    assert estimate().base_weights_gib == pytest.approx(whole / 8, rel=1e-3)  # and 65 norms, which stay whole
    assert estimate(name="zero3_cpu_offload").base_weights_gib == 0


def test_one_rank_gathers_nothing():
    alone = estimate(world_size=1)
    assert alone.gathered_weights_gib == 0
    assert alone.base_weights_gib == pytest.approx(2 * 8_030_261_248 / GIB)
    assert estimate(name="zero3_cpu_offload", world_size=1).gathered_weights_gib > 1


def test_gathered_weights_follow_deepspeeds_limit():
    limits = (100_000_000, 1_000_000_000)
    small, large = (estimate(stage3_max_live_parameters=limit) for limit in limits)
    assert large.total_gib - small.total_gib == pytest.approx(2 * 9e8 / GIB)


def test_hpz_costs_a_copy():
    assert estimate().hpz_copy_gib == 0
    with_copy = estimate(name="zero3_hpz")
    assert with_copy.hpz_copy_gib == pytest.approx(2 * 8_030_261_248 / 8 / GIB)
    assert with_copy.total_gib == pytest.approx(estimate().total_gib + with_copy.hpz_copy_gib)


def test_adapter_states():
    of = subject()
    elements = of.trainable_parameters
    assert elements == 47_544_320
    # Whole on every rank; shard, master copy, gradient and two moments in shares.
    assert estimate(world_size=8).adapter_states_gib == pytest.approx(elements * (4 + 20 / 8) / GIB)
    sharded = estimate(world_size=8, stage3_param_persistence_threshold=0)
    assert sharded.adapter_states_gib == pytest.approx(elements * 20 / 8 / GIB)
    assert estimate(name="zero2").adapter_states_gib == pytest.approx(elements * (4 + 16 / 8) / GIB)
    assert estimate(name=None).adapter_states_gib == pytest.approx(elements * 16 / GIB)


def test_adapters_cost_what_they_add():
    lora, fvae = estimate(subject(peft_type="LORA")), estimate(subject())
    assert lora.layer_activations_gib == fvae.layer_activations_gib
    assert 0 < lora.adapter_activations_gib < fvae.adapter_activations_gib


def test_offloaded_weights_lie_on_the_host():
    of = subject()
    assert host_memory_gib(of, choice(of, "zero3_cpu_offload"), 16, 8) == pytest.approx(8_030_261_248 / GIB)
    assert host_memory_gib(of, choice(of), 16, 8) == 0
    assert host_memory_gib(of, choice(of, "zero3_nvme_offload"), 16, 8) == 0


def test_eager_attention_keeps_its_scores():
    flash, eager = (subject("tiny", 4096, "LORA", attention=kind) for kind in ("flash_attention_2", "eager"))
    scores = 4096**2 * 4 * 2 / GIB  # one matrix of four heads in 16 bits
    assert estimate(eager).total_gib > estimate(flash).total_gib + 2 * scores


def test_offloaded_activations_leave_one_input():
    of = subject("8b", 8192)
    away = replace(of, settings=replace(of.settings, activation_offload=True))
    with_full, with_none = (estimate_memory(away, choice(away, "zero2", kind), 2) for kind in ("full", "none"))
    checkpoints = estimate_memory(of, choice(of, "zero2"), 2).checkpoints_gib
    assert with_full.checkpoints_gib == pytest.approx(checkpoints / 32)
    assert with_none.layer_activations_gib < estimate(of, "zero2", "none").layer_activations_gib / 10
    assert host_memory_gib(away, choice(away, "zero2"), 2, 2) == pytest.approx(2 * checkpoints)
    assert host_memory_gib(of, choice(of, "zero2"), 2, 2) == 0


def test_tiled_mlps_leave_less_of_a_layer():
    of = subject("8b", 32768)
    tiled = subject("8b", 32768, tiled=True)
    whole, tiles = (estimate_memory(one, choice(one, "zero2"), 2) for one in (of, tiled))
    saved = whole.layer_activations_gib + whole.attention_gib - tiles.layer_activations_gib - tiles.attention_gib
    assert saved > 32768 * 14336 * 2 / 2**30  # one tensor of the gated unit, at least
    assert tiles.checkpoints_gib == whole.checkpoints_gib
