"""Time of a step: measured runs, arithmetic by formula, and what bounds a step under which circumstances."""

from dataclasses import replace

import pytest

from fvae_dist.planning.hardware import Cluster, constant, find_gpu
from fvae_dist.planning.timing import StepTime, estimate_step
from tests.planned import choice, subject

H200, H100 = find_gpu("h200"), find_gpu("h100-80")


def step(of=None, name="zero3", recompute="full", nodes=1, gpus=8, accumulation=1, gpu=H100, shape=None) -> StepTime:
    of = of or subject()
    return estimate_step(of, choice(of, name, recompute), Cluster(gpu, nodes, gpus), accumulation, shape)


@pytest.mark.parametrize(
    ("liger", "length", "recompute", "measured_s"),
    [
        (False, 8192, "full", 0.887),
        (False, 8192, "none", 0.663),
        (True, 8192, "full", 0.725),
        (True, 8192, "none", 0.547),
        (True, 16384, "none", 1.308),
    ],
)
def test_measured_steps_of_plain_peft(liger, length, recompute, measured_s):
    """PEFT LoRA, Llama-3-8B shape, one H200, SDPA (cuDNN), without DeepSpeed.

    What `elementwise_in_model` was fitted to; our stack adds casts for fp32 adapters and makes the logits once more.
    """
    of = subject("8b", length, "LORA", attention="sdpa", liger=liger)
    planned = step(of, None, recompute, gpus=1, gpu=H200)
    assert planned.seconds == pytest.approx(measured_s, rel=0.08)
    assert planned.bound.startswith("arithmetic")


@pytest.mark.parametrize(("peft_type", "measured_s"), [("FVAE_LORA", 2.938), ("LORA", 1.251)])
def test_measured_steps_of_two_gpus(peft_type, measured_s):
    """ZeRO-3, T = 8192, 2 x H200 (docs/planner.md): bound by the host, whose two constants were fitted to these."""
    planned = step(subject(peft_type=peft_type), gpus=2, gpu=H200)
    assert planned.seconds == pytest.approx(measured_s, rel=0.08)
    assert planned.bound == "the host (Python and kernel launches)"


def test_products_are_three_passes_over_the_weights():
    """Forward, recomputation and the inputs' gradient; the head makes its logits twice and their gradient once."""
    of = subject(peft_type="LORA")
    layers = 32 * (sum(of.layer_sizes) - 2 * 4096)
    flops = 8192 * (3 * 2 * layers + 6 * of.hidden * of.vocabulary)
    assert step(of).products_s == pytest.approx(flops / H100.matmul_flops, rel=0.01)
    without = step(of, "zero2", "none").products_s
    assert step(of, "zero2").products_s - without == pytest.approx(8192 * 2 * layers / H100.matmul_flops, rel=0.01)


def test_attention_is_computed_at_its_own_rate():
    of = subject(peft_type="LORA")
    forward = 32 * 2 * 8192**2 * 4096  # two products, half masked
    rate = H100.attention_flops("flash_attention_2", 8192)
    assert step(of).attention_s == pytest.approx(4.5 * forward / rate, rel=0.01)
    # Selective recomputation keeps attention's output.
    assert step(of, "zero2", "selective").attention_s == pytest.approx(3.5 * forward / rate, rel=0.01)


def test_adapters_cost_time():
    lora, fvae = step(subject(peft_type="LORA"), "zero2"), step(subject(), "zero2")
    assert fvae.compute_s > 1.1 * lora.compute_s
    assert fvae.host_s > lora.host_s


def test_step_is_its_slowest_part_and_the_update():
    for planned in (step(), step(nodes=64), step(name="zero2"), step(name="zero3_cpu_offload")):
        slowest = max(planned.compute_s, planned.host_s, planned.traffic.seconds)
        assert planned.seconds == slowest + planned.traffic.update_s
        assert planned.tokens_per_s_per_gpu == pytest.approx(8192 / planned.seconds)


def test_grows_with_accumulation_and_sequences():
    once, thrice = step(), step(accumulation=3)
    assert thrice.compute_s == pytest.approx(3 * once.compute_s)
    of_step = 1e-3 * constant("host_ms_per_step")
    assert thrice.host_s - of_step == pytest.approx(3 * (once.host_s - of_step))
    assert thrice.tokens == 3 * 8192
    # Time is for the data's mean length, memory for the longest.
    of = subject(peft_type="LORA")
    short = step(of, "zero2", shape=(1, 1024))
    assert short.tokens == 1024
    assert short.products_s == pytest.approx(step(of, "zero2").products_s / 8, rel=0.2)
    assert step(of, "zero2", shape=(4, 1024)).products_s == pytest.approx(4 * short.products_s, rel=0.05)


def test_without_zero_the_host_launches_kernels():
    of = subject("tiny", 64, "LORA")
    planned = step(of, None, "none", gpus=1)
    whole = of.traces(zero3=False).whole
    kernels = 4 * (whole.forward.num_kernels + whole.backward.num_kernels)
    launches, others = 1e-6 * constant("host_us_per_kernel") * kernels, 1e-3 * constant("host_ms_per_step")
    assert planned.host_s == pytest.approx(launches + others)
    assert planned.bound == "the host (Python and kernel launches)"


@pytest.mark.parametrize(
    ("bound", "arguments"),
    [
        ("arithmetic, most of it attention", {"of": ("8b", 524_288, "LORA")}),
        ("arithmetic, most of it matrix products", {"of": ("8b", 8192, "LORA"), "name": "zero2"}),
        ("the host (Python and kernel launches)", {}),
        ("traffic between nodes", {"nodes": 4, "gpu": find_gpu("h100-80", 10)}),
        ("traffic inside the node", {"gpu": find_gpu("l40s"), "of": ("70b", 1024, "LORA")}),
        ("weights from host memory", {"gpus": 1, "name": "zero3_cpu_offload", "of": ("70b", 1024, "LORA")}),
        ("weights from the drives", {"name": "zero3_nvme_offload", "of": ("70b", 1024, "LORA")}),
        ("latency of collectives", {"nodes": 2048, "of": ("70b", 1024, "LORA")}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bound_names_what_is_slowest(bound, arguments):
    planned = step(**arguments | {"of": subject(*arguments.get("of", ()))})
    assert planned.bound == bound


def test_shared_sequences_share_attention():
    """Two GPUs, each with half the tokens and half the heads of all of them: half the work of one."""
    whole, part = subject(length=16384), subject(length=8192)
    part = replace(part, settings=replace(part.settings, sequence_parallel=2))
    assert step(part).attention_s == pytest.approx(step(whole).attention_s / 2, rel=0.01)
    assert step(part).products_s == pytest.approx(step(whole).products_s / 2, rel=0.01)
