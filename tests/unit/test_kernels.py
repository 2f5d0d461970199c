"""The fused kernels in Triton's interpreter, beside their plain-torch reference. On a GPU: test_gpu.py."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys

import pytest
import torch

from fvae_dist import side_loss
from fvae_dist.adapter import vae as vae_module
from fvae_dist.adapter.noise import LayerNoise, TokenNoise
from fvae_dist.adapter.objective import TokenTerms, coefficients, neg_elbo
from fvae_dist.adapter.telemetry import TokenStatistics, sums_over_tokens
from tests.adapted import IDS
from tests.fused import BF16_RTOL, FP32_RTOL, SALT, by_products, make, run, worst
from tests.models import named_gradients, randomise, tiny_adapter, tiny_model

pytest.importorskip("triton", minversion="3.7", reason="Triton 3.7 or newer is not installed: pip install triton")
from peft import get_peft_model

from fvae_dist.kernels import fused_vae, launching

pytestmark = pytest.mark.skipif(
    not launching.kernels().INTERPRETED, reason="Triton's interpreter is off: it is for machines without a GPU"
)
OBJECTIVES = ("official", "paper", "vae2lat", "beta_vae2lat")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "features", "settings"),
    [
        (1, 40, {}),
        (3, 70, {"encoder_hidden": 5, "decoder_hidden": 20, "decoder_layers": 3}),
        (50, 16, {}),  # sums over tokens in two chunks
        (125, 33, {"decoder_layers": 1, "latent_fusion": "average"}),
        (37, 96, {"r": 16, "encoder_hidden": 16, "decoder_hidden": 128, "decoder_layers": 3}),
        (20, 64, {"r": 40, "encoder_hidden": 36, "decoder_layers": 3}),
        (5, 32, {"r": 128, "encoder_hidden": 128, "latent_fusion": "average"}),
        (9, 48, {"encoder_dropout": 0.0, "decoder_dropout": 0.3}),
        (9, 48, {"encoder_dropout": 0.5, "decoder_dropout": 0.0, "encoder_hidden": 3}),
        *((17, 48, {"objective": objective}) for objective in OBJECTIVES),
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_float64(num_tokens, features, settings, dtype):
    module = make(features, **settings)
    x = torch.randn(num_tokens, features, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = run(copy.deepcopy(module).double(), x.double(), "torch")
    found = run(module, x, "fused")
    assert found["x"].dtype == dtype and all(value.dtype == torch.float32 for n, value in found.items() if n != "x")
    error, name = worst(found, expected)
    # A few tokens' ReLU patterns may flip in bf16; with more of them the flips average out.
    limit = FP32_RTOL if dtype == torch.float32 else BF16_RTOL if num_tokens > 20 else 3 * BF16_RTOL
    assert error < limit, name


@pytest.mark.parametrize(
    ("num_tokens", "features", "settings", "rows"),
    [
        (1, 40, {}, 64),
        (50, 33, {}, 64),
        (125, 70, {"decoder_layers": 1, "latent_fusion": "average"}, 48),  # the last of three parts is short
        (37, 96, {"r": 16, "encoder_hidden": 16, "decoder_hidden": 128, "decoder_layers": 3}, 16),
        (40, 64, {"r": 40, "encoder_hidden": 36, "decoder_layers": 3}, 40),
    ],
    ids=str,
)
def test_backward_by_products_is_that_of_float64(num_tokens, features, settings, rows):
    module = make(features, **settings)
    x = torch.randn(num_tokens, features, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = run(copy.deepcopy(module).double(), x.double(), "torch")
    with by_products(rows):
        found = run(module, x, "fused")
    error, name = worst(found, expected)
    assert error < (BF16_RTOL if num_tokens > 20 else 3 * BF16_RTOL), name


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.bfloat16, 8)])
def test_two_runs_are_equal_and_nothing_is_read_before_it_is_written(dtype, rows):
    module = make(40, decoder_layers=3)
    x = torch.randn(19, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    with by_products(rows):
        first = run(module, x, "fused")
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        try:
            second = run(module, x, "fused")
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, second[name]) and value.isfinite().all() for name, value in first.items())


def test_outlier_features_and_clamped_variances():
    """Channels a thousand times the others, and log-variances at their limits, where no gradient passes."""
    module = make(64, encoder_dropout=0.0, decoder_dropout=0.0)
    with torch.no_grad():
        for encoder, limit in ((module.encoder1, 25.0), (module.encoder2, -30.0)):
            encoder.logvar.weight.zero_()
            encoder.logvar.bias.fill_(limit)
    x = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    x[:, :3] *= 1000
    expected = run(copy.deepcopy(module).double(), x.double(), "torch")
    found = run(module, x, "fused")
    clamped = [name for name, value in expected.items() if not value.any()]
    assert clamped and all(not found[name].any() for name in clamped)
    assert worst(found, expected)[0] < FP32_RTOL


@pytest.mark.parametrize("rows", [0, 3])
def test_input_without_gradient(rows):
    module = make(40)
    module.config.kernel = "fused"
    x, noise = torch.randn(5, 40), LayerNoise(torch.arange(5), SALT)
    x = x.bfloat16() if rows else x
    results = []
    for needs_gradient in (True, False):
        module.zero_grad()
        with by_products(rows):
            z1, loss = module(x.clone().requires_grad_(needs_gradient), noise)
            (z1.sum() + loss.sum()).backward()
        results.append({name: parameter.grad for name, parameter in module.named_parameters()})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize(("num_tokens", "dtype"), [(7, torch.float32), (600, torch.float32), (600, torch.bfloat16)])
def test_statistics_are_those_of_the_plain_path(num_tokens, dtype):
    module, sums = make(24), {}
    x = torch.randn(1, num_tokens, 24, generator=torch.Generator().manual_seed(1))
    x, tolerance = x.to(dtype), 1e-4 if dtype == torch.float32 else BF16_RTOL
    mask = torch.arange(num_tokens).remainder(3).gt(0).float()[None]
    for kernel in ("torch", "fused"):
        module.config.kernel = kernel
        _, _, *statistics = module(x, LayerNoise(torch.arange(num_tokens) * 77, SALT), True)
        sums[kernel] = sums_over_tokens([TokenStatistics(*statistics)], mask)
    assert sums["fused"].keys() == sums["torch"].keys()
    for key, value in sums["torch"].items():
        found = sums["fused"][key]
        torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_coefficients_are_the_objective(objective):
    config = tiny_adapter(objective=objective, z2_prior_std=1.7, z2_prior_mean=0.4)
    terms = torch.rand(5, 11, dtype=torch.double)
    nll, kl_z1, z1_sq, z2_sq, kl_z2 = terms
    has_kl_z2 = objective in ("vae2lat", "beta_vae2lat")
    expected = neg_elbo(TokenTerms(nll, kl_z1, z1_sq, z2_sq, kl_z2 if has_kl_z2 else None), config)
    c = coefficients(config)
    found = c.nll * nll + c.kl_z1 * kl_z1 + c.kl_z2 * kl_z2 + c.z1_sq * z1_sq + c.z2_sq * z2_sq + c.constant
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------------------------- in a model


def model_step(kernel: str, checkpointing: bool = False, keyed: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = randomise(
        get_peft_model(tiny_model("llama"), tiny_adapter(kernel=kernel, target_modules=["q_proj", "v_proj"]))
    )
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    noise = TokenNoise({"input_ids": IDS}, seed=3, step=4) if keyed else None
    torch.manual_seed(5)
    with side_loss.collect(model, noise=noise) as collected:
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    (loss + collected.neg_elbo).backward()
    gradients = named_gradients(model)
    return {"loss": loss.detach(), "neg_elbo": collected.neg_elbo.detach(), **gradients, **collected.terms}


def test_model_does_not_depend_on_the_kernel():
    expected, found = model_step("torch"), model_step("fused")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = 1e-5 * float(value.abs().max())
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("keyed", [True, False])
def test_checkpointing_changes_no_bit(keyed):
    plain, recomputed = (model_step("fused", checkpointing, keyed) for checkpointing in (False, True))
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(value, recomputed[name]) for name, value in plain.items())


def test_no_tokens_are_no_error():
    """As an expert of a mixture may have them."""
    module = make(24)
    module.config.kernel = "fused"
    z1, loss = module(torch.randn(0, 24, requires_grad=True))
    (z1.sum() + loss.sum()).backward()
    assert z1.shape == (0, 4) and loss.shape == (0,)


def test_noise_of_the_generator_is_new_in_each_layer_and_forward():
    module = make(24)
    module.config.kernel = "fused"
    torch.manual_seed(1)
    x = torch.randn(6, 24)
    first, second = module(x)[0], module(x)[0]
    torch.manual_seed(1)
    x = torch.randn(6, 24)
    assert torch.equal(module(x)[0], first) and not torch.equal(first, second)


# --------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"encoder_layers": 2}, "encoder_layers 2 is not 1"),
        ({"encoder_shared_trunk": False}, "encoder_shared_trunk is off"),
        ({"detach_input": True}, "detach_input is on"),
        ({"decoder_layers": 0}, r"decoder_layers 0 is not in 1 \.\. 3"),
        ({"decoder_layers": 4}, r"decoder_layers 4 is not in 1 \.\. 3"),
        ({"r": 129}, "r 129 is above 128"),
        ({"decoder_hidden": 200}, "decoder_hidden 200 is above 128"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_do_is_refused_with_its_reason(settings, reason):
    module = make(16, **settings, kernel="fused")
    with pytest.raises(ValueError, match=f"kernel 'fused' cannot be used: {reason}"):
        module(torch.randn(3, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_refused(dtype):
    module = make(16, kernel="fused").to(dtype)
    with pytest.raises(ValueError, match="bf16 and fp32, not in"):
        module(torch.randn(3, 16).to(dtype))


def test_cpu_is_refused_unless_interpreted(monkeypatch):
    monkeypatch.setattr(launching.kernels(), "INTERPRETED", False)
    fused_vae.problem.cache_clear()
    with pytest.raises(ValueError, match="need a GPU, the input is on cpu"):
        make(16, kernel="fused")(torch.randn(3, 16))
    fused_vae.problem.cache_clear()


def test_each_choice_is_logged_once(caplog):
    vae_module._log_kernel.cache_clear()
    module = make(16, kernel="fused")
    with caplog.at_level(logging.INFO, logger="fvae_dist"):
        module(torch.randn(3, 16))
        module(torch.randn(3, 16))
        for _ in range(2):
            make(16, kernel="auto")(torch.randn(3, 16))
        make(16, kernel="torch")(torch.randn(3, 16))
    assert [record.getMessage() for record in caplog.records] == [
        "adapter kernel: fused (Triton)",
        "adapter kernel: torch (auto: float32 on cpu)",
    ]


# ---------------------------------------------------------------------------------------------- what the compiler makes

COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fvae_dist.kernels import launching
from fvae_dist.kernels.spec import Coefficients, Spec

FP32 = {"partial_ptr", "parameters_ptr", "latents_ptr", "terms_ptr", "d_loss_ptr", "d_z1_ptr", "d_posterior_ptr",
        "sums_ptr", "out_ptr"}
INTEGERS = {"T": "i32", "D": "i32", "stride": "i32", "out_stride": "i32", "chunk": "i32", "num_blocks": "i32",
            "first": "i32", "count": "i32", "size": "i32",
            "salt0": "i64", "salt1": "i64", "salt2": "i32",
            "num_up_0": "i32", "num_up_1": "i32", "num_up_2": "i32"}
def of_plan(r, num_tokens, shared_memory):
    launching.shared_memory = lambda device: shared_memory
    spec = Spec(r, r, 0.1, 128, 3, 0.1, True, 1.5, 1.0, Coefficients(1, 1, 0, -1, 1, 0))
    plan = launching.Plan(spec, torch.bfloat16, (num_tokens, 4096), 3, torch.device("meta"))
    return {plan.pack((1, 1, 1))} | {part for part in vars(plan).values() if isinstance(part, launching.Launch)}
def compiled(launch, capability):
    kernel, constants = launch._kernel, dict(launch._constants)
    options = {n: constants.pop(n) for n in ("num_warps", "num_stages") if n in constants}
    def type_of(n):
        if n in constants: return "constexpr"
        if n in INTEGERS: return INTEGERS[n]
        if n == "keys_ptr": return "*i64"
        if n in FP32 or n.startswith(("weights_", "biases_", "up_")): return "*fp32"
        return "*bf16" if n.endswith("_ptr") else "fp32"
    signature = {n: type_of(n) for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
               if signature[n][0] == "*" or n in ("D", "chunk")}
    source = ASTSource(fn=kernel, signature=signature, attrs=aligned,
                       constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()})
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)
"""
WITHOUT_WARP_GROUPS = (
    COMPILE
    + """
seen = set()
for r, num_tokens in ((16, 2048), (16, 8192), (64, 8192)):
    for launch in of_plan(r, num_tokens, 232448):
        name = launch._kernel.__name__
        if r == 16 or name == "backward_latents_kernel":
            assert "wgmma" not in compiled(launch, 90).asm["ptx"], (name, r)
            seen.add(name)
assert len(seen) == len(launching.NARROW_TILES) + 1, seen
"""
)
# Bytes of shared memory: on the GPUs of workstations, and on an A100.
WITHIN_SHARED_MEMORY = (
    COMPILE
    + """
found = {}
for r, capability, limit in ((16, 89, 101376), (128, 89, 101376), (128, 80, 166912)):
    for num_tokens in (2048, 8192):
        for launch in of_plan(r, num_tokens, limit):
            name, tokens = launch._kernel.__name__, launch._constants.get("BT")
            is_large = name in ("encode_kernel", "backward_latents_kernel", "backward_features_kernel")
            if is_large and (name, r, capability, tokens) not in found:
                found[name, r, capability, tokens] = compiled(launch, capability).metadata.shared
                assert found[name, r, capability, tokens] <= limit, found
assert found["backward_features_kernel", 128, 80, 128] > 101376  # as much as there is
assert len(found) == 10, found
"""
)
# What stands between the head's products, on an A100, a 4090, an H100 and a B200.
OF_HEAD = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fvae_dist.kernels.triton_head import cross_entropy_kernel as kernel
types = {"logits_ptr": "*bf16", "labels_ptr": "*i64", "found_ptr": "*fp32", "T": "i32", "V": "i32"}
constants = {"IGNORED": -100, "INTERPRETED": False, "BV": 4096}
signature = types | {name: "constexpr" for name in constants}
for capability in (80, 89, 90, 100):
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert made.metadata.shared < 1024 and "st.local" not in made.asm["ptx"]
"""


@pytest.mark.parametrize(
    "code", [WITHOUT_WARP_GROUPS, WITHIN_SHARED_MEMORY, OF_HEAD], ids=["warp groups", "shared memory", "head"]
)
def test_compiled_kernels(tmp_path, code):
    """No warp-group products for Hoppers: Triton 3.6 and 3.7 bring an assembler that makes wrong code of them. No more
    shared memory than there is. Compiles for GPUs that need not be here."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
