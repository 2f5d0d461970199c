"""The choice that is recommended, what does not fit and by how much, epochs, and the curve over nodes with its knee."""

from dataclasses import replace

import pytest

from fvae_dist.planning.hardware import Cluster, find_gpu
from fvae_dist.planning.planner import Load, epoch_of, find_knee, plan_choice, recommend, scale
from tests.planned import choice, subject

H100, H200 = find_gpu("h100-80"), find_gpu("h200")
LOAD = Load(accumulation=1, sequences=1, mean_length=8192)


def plan(name="zero3", recompute="full", nodes=1, gpus=8, of=None, gpu=H100, load=LOAD):
    of = of or subject(peft_type="LORA")
    return plan_choice(of, choice(of, name, recompute, hpz=gpus), Cluster(gpu, nodes, gpus), load)


def make_for(of):
    """As plan_command makes a choice for each number of nodes."""
    return lambda name, recompute, resident, cluster: choice(of, name, recompute, cluster.gpus_per_node, resident)


# ---------------------------------------------------------------------------------------------------------- recommended


def test_what_does_not_fit_says_by_how_much():
    fits, too_large = plan(), plan(of=subject("70b", 1024, "LORA"), name="zero2")
    assert fits.fits and fits.over_gib == pytest.approx(fits.memory.needed_gib - H100.memory_gib)
    assert not too_large.fits
    assert too_large.over_gib == pytest.approx(too_large.memory.needed_gib - H100.memory_gib)
    assert too_large.over_gib > 141e9 / 2**30 - H100.memory_gib  # 70.6e9 weights of two bytes alone


def test_nothing_that_fits_is_no_recommendation():
    assert recommend([plan(of=subject("70b", 1024, "LORA"), name=name) for name in ("zero2", None)]) is None
    assert recommend([]) is None


def test_fastest_that_fits_is_recommended():
    options = [
        plan(name, recompute) for name in ("zero2", "zero3", "zero3_cpu_offload") for recompute in ("full", "none")
    ]
    best = recommend(options)
    fitting = [option for option in options if option.fits]
    assert best in fitting
    assert best.step.seconds <= 1.03 * min(option.step.seconds for option in fitting)
    assert best.choice.name == "zero2"  # 8B beside its activations: nothing to gather
    assert recommend([replace(o, over_gib=1.0) if o is best else o for o in options]) is not best


def test_recipes_own_choice_stands_where_another_gains_little():
    faster, own = plan("zero2"), plan("zero3")
    seconds = faster.step.seconds
    near = replace(own, step=replace(faster.step, host_s=1.02 * seconds))
    far = replace(own, step=replace(faster.step, host_s=1.10 * seconds))
    assert recommend([faster, near], ("zero3", "full", False)) is near
    assert recommend([faster, far], ("zero3", "full", False)) is faster


def test_of_equally_fast_choices_the_plainest_is_taken():
    bound_by_host = plan("zero3").step
    options = [replace(plan(name), step=bound_by_host) for name in ("zero3_cpu_offload", "zero3_hpz", "zero3")]
    assert recommend(options).choice.name == "zero3"  # less memory than hpZ, no offload
    assert recommend(options[:2]).choice.name == "zero3_hpz"


def test_offload_fits_where_nothing_else_does():
    of, gpu = subject("70b", 1024, "LORA"), find_gpu("l40s")
    options = [plan(name, of=of, gpu=gpu, gpus=2) for name in ("zero2", "zero3", "zero3_cpu_offload")]
    best = recommend(options)
    assert best.choice.name == "zero3_cpu_offload"
    assert best.host_gib == pytest.approx(2 * of.base_parameters / 2**30)


# --------------------------------------------------------------------------------------------------------------- epochs


def test_epoch_of_counted_sequences():
    load = Load(accumulation=2, sequences=1, mean_length=8192, epoch_sequences=1000, epoch_tokens=4_000_000)
    option = plan(load=load)
    epoch = epoch_of(option, Cluster(H100, 1, 8), load)
    assert (epoch.steps, epoch.tokens) == (63, 4_000_000)  # 1000 / 16, the last one not full
    assert epoch.hours == pytest.approx(63 * option.step.seconds / 3600)
    assert epoch.gpu_hours == pytest.approx(8 * epoch.hours)


def test_epoch_of_stated_tokens():
    load = replace(LOAD, epoch_tokens=10 * 8 * 8192 + 1)
    assert epoch_of(plan(load=load), Cluster(H100, 1, 8), load).steps == 11
    assert epoch_of(plan(), Cluster(H100, 1, 8), LOAD) is None


# ------------------------------------------------------------------------------------------------------------ the curve


def test_knee_is_where_traffic_is_hidden_no_longer():
    of = subject("70b", 1024, "LORA")
    cluster = Cluster(H100, 4, 8)
    load = replace(LOAD, mean_length=1024)
    knee = find_knee(of, plan(of=of), make_for(of), cluster, load)
    assert knee.nodes > 0 and knee.world_size == 8 * knee.nodes

    def share(nodes):
        step = plan(of=of, nodes=nodes, load=load).step
        return step.traffic.seconds / max(step.compute_s, step.host_s)

    assert share(knee.nodes) <= 1 < share(knee.nodes + 1)
    assert knee.bound == plan(of=of, nodes=knee.nodes + 1, load=load).step.bound
    points = scale(of, plan(of=of), make_for(of), cluster, load, knee)
    assert {1, 2, 4, 128, knee.nodes, 2 * knee.nodes} <= {point.nodes for point in points}
    assert [point.traffic_share <= 1 for point in points] == [point.nodes <= knee.nodes for point in points]


def test_knee_moves_with_the_network():
    of = subject(peft_type="LORA")
    slow, fast = (
        find_knee(of, plan(), make_for(of), Cluster(find_gpu("h100-80", gbit), 1, 8), LOAD) for gbit in (50, 400)
    )
    assert slow.nodes < fast.nodes
    assert slow.bound in ("traffic between nodes", "latency of collectives")


def test_there_may_be_no_knee_or_nothing_before_it():
    of = subject(length=32768, peft_type="LORA")
    assert (
        find_knee(of, plan("zero2", of=of), make_for(of), Cluster(H100, 1, 8), replace(LOAD, mean_length=32768)) is None
    )
    of, load = subject("70b", 1024, "LORA"), replace(LOAD, mean_length=1024)
    knee = find_knee(of, plan(of=of), make_for(of), Cluster(find_gpu("l40s"), 1, 8), load)
    assert (knee.nodes, knee.world_size, knee.bound) == (0, 0, "traffic inside the node")


def test_knee_lies_beyond_the_few_nodes_that_wait_for_their_drives():
    """A slow GPU: 32 nodes read the weights in the time of its arithmetic, hundreds wait for each other."""
    of, load = subject("70b", 1024, "LORA"), replace(LOAD, mean_length=1024)
    cluster = Cluster(replace(H100, matmul_flops=H100.matmul_flops / 10), 1, 8)
    option = plan("zero3_nvme_offload", of=of, load=load, gpu=cluster.gpu)
    assert option.step.bound == "weights from the drives"
    knee = find_knee(of, option, make_for(of), cluster, load)
    assert knee.nodes > 32 and knee.bound == "latency of collectives"


def test_scales_to_1024_gpus_and_405b_parameters():
    of, load = subject("405b", 1024, "LORA"), replace(LOAD, mean_length=1024)
    assert of.base_parameters == pytest.approx(405e9, rel=0.01)
    make, cluster = make_for(of), Cluster(H100, 128, 8)
    option = plan(of=of, nodes=128, load=load)
    points = scale(of, option, make, cluster, load, find_knee(of, option, make, cluster, load))
    to_1024 = [point for point in points if point.world_size <= 1024]
    assert to_1024[0].nodes == 1 and to_1024[-1].world_size == 1024
    # 755 GiB of weights: not on one node of 8 x 80 GB, on many.
    assert not points[0].fits and points[0].needed_gib > 755 / 8
    assert to_1024[-1].fits
    needed = [point.needed_gib for point in points]
    assert needed == sorted(needed, reverse=True)
    assert max(point.efficiency for point in points if point.fits) == 1
    assert all(0 < point.efficiency <= 1.01 for point in points if point.fits)


def test_what_the_node_has_no_memory_for_does_not_fit():
    of = subject("8b", 131_072)
    of = replace(of, settings=replace(of.settings, activation_offload=True))
    full, none = (plan_choice(of, choice(of, "zero3", kind), Cluster(H200, 1, 2), LOAD) for kind in ("full", "none"))
    assert full.fits and full.host_gib == pytest.approx(2 * 32 * 131_072 * 4096 * 2 / 2**30, rel=0.05)
    assert none.over_gib < 0 and not none.fits
    assert none.lack == f"does not fit by {none.host_gib - 256:.0f} GiB of the node's memory"
    assert recommend([none, full]) is full
