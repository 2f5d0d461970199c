"""Traffic of a step: bytes by formula, and what hpZ, quantisation and stages do to them."""

import pytest

from fvae_dist.planning.hardware import Cluster, find_gpu
from fvae_dist.planning.traffic import estimate_traffic, gathered_by_pass
from tests.planned import choice, subject

H100 = find_gpu("h100-80")


def traffic(name="zero3", recompute="full", nodes=4, gpus=8, accumulation=1, of=None, gpu=H100, **zero):
    of = of or subject()
    return estimate_traffic(of, choice(of, name, recompute, **zero), Cluster(gpu, nodes, gpus), accumulation)


def test_all_gathers_of_two_gpus():
    of, norms = subject(), 65 * 4096
    t = traffic(nodes=1, gpus=2)
    layers = 32 * (sum(of.layer_sizes) - 2 * 4096)
    embedding = 128256 * 4096
    assert of.base_parameters == layers + 2 * embedding + norms
    assert t.gathered["forward"] == layers + 2 * embedding
    assert t.gathered["recompute"] == layers
    # Half of the reuse distance (1e8) is still there when a layer's backward pass begins; the embedding is not needed.
    assert t.gathered["backward"] == layers - 32 * 50_000_000 + embedding
    adapters = 2 * 4 * of.trainable_parameters  # gradients reduced, parameters gathered, in fp32
    assert t.in_node_bytes == pytest.approx((2 * sum(t.gathered.values()) + adapters) / 2)
    assert t.between_nodes_bytes == t.host_bytes == 0


def test_layers_within_the_reuse_distance_are_gathered_twice():
    small = subject("tiny", 4096)
    passes = gathered_by_pass(small, choice(small, stage3_param_persistence_threshold=0))
    assert passes["recompute"] > 0
    assert passes["backward"] == small.head_size + small.hidden  # and the final norm


def test_without_recomputation_there_are_two_passes():
    passes = traffic(recompute="none").gathered
    assert passes["recompute"] == 0 and passes["backward"] > traffic().gathered["backward"]


def test_resident_weights_move_adapters_alone():
    of = subject()
    resident = traffic(resident=True)
    assert resident.gathered == {"forward": 0, "recompute": 0, "backward": 0}
    assert resident.in_node_bytes == pytest.approx(8 * of.trainable_parameters * 31 / 32)
    assert resident.latency_s < 0.1 * traffic().latency_s


def test_lower_stages_move_gradients_alone():
    of = subject()
    share = 31 / 32
    assert traffic("zero2").gathered == {"forward": 0, "recompute": 0, "backward": 0}
    assert traffic("zero2").in_node_bytes == pytest.approx(8 * of.trainable_parameters * share)
    assert traffic(None).in_node_bytes == pytest.approx(8 * of.trainable_parameters * share)
    assert traffic("zero2", stage=1).in_node_bytes == pytest.approx(8 * of.trainable_parameters * share)
    # Stages 2 and 3 reduce every micro-step's gradients.
    assert traffic("zero2", accumulation=4).in_node_bytes == pytest.approx(20 * of.trainable_parameters * share)


def test_hpz_keeps_gathers_in_the_node():
    plain, hpz = traffic(), traffic("zero3_hpz")
    assert hpz.between_nodes_bytes < 0.05 * plain.between_nodes_bytes
    assert hpz.in_node_bytes < plain.in_node_bytes
    assert hpz.latency_s < plain.latency_s
    gradients = 8 * subject().trainable_parameters
    assert hpz.between_nodes_bytes == pytest.approx(gradients * 3 / 4 / 8)
    assert traffic(nodes=1).between_nodes_bytes == traffic("zero3_hpz", nodes=1).between_nodes_bytes == 0


def test_quantised_gathers_are_half_as_large():
    plain, quantised = traffic(), traffic(zero_quantized_weights=True)
    adapters = 8 * subject().trainable_parameters * 31 / 32
    assert (quantised.in_node_bytes - adapters) / (plain.in_node_bytes - adapters) == pytest.approx(0.51)


def test_weights_between_nodes_are_what_a_node_lacks():
    of = subject()
    t = traffic()
    weights = 2 * sum(t.gathered.values()) + 8 * of.trainable_parameters
    assert 8 * t.between_nodes_bytes == pytest.approx(weights * 3 / 4)


def test_one_gpu_has_no_traffic():
    t = traffic(nodes=1, gpus=1)
    assert t.in_node_bytes == t.between_nodes_bytes == t.seconds == t.update_s == 0


def test_offload_reads_shards_from_the_host():
    t = traffic("zero3_cpu_offload")
    assert t.host_bytes == pytest.approx(2 * sum(t.gathered.values()) / 32)
    assert t.nvme_bytes == 0
    drives = traffic("zero3_nvme_offload")
    assert drives.nvme_bytes == pytest.approx(8 * drives.host_bytes)
    assert drives.host_s > t.host_s > 0


def test_grows_with_accumulation():
    once, thrice = traffic(), traffic(accumulation=3)
    assert thrice.gathered["forward"] == 3 * once.gathered["forward"]
    assert thrice.seconds == pytest.approx(3 * once.seconds, rel=0.05)


def test_latency_grows_with_the_ring():
    times = [traffic(nodes=nodes).latency_s for nodes in (1, 2, 16, 128)]
    assert times == sorted(times)
    # 1,023 hops, as NCCL's tuning model counts them: (1024 - 128) x 3.4 us + 127 x 14 us, and 8.4 us to start.
    per_gather = (896 * 3.4 + 127 * 14 + 8.4) * 1e-6
    assert times[-1] / per_gather == pytest.approx(round(times[-1] / per_gather))


def test_without_nvlink_the_node_is_slow():
    assert traffic(gpu=find_gpu("l40s")).in_node_s > 5 * traffic().in_node_s
