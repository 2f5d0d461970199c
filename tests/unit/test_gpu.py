"""What only a GPU shows; run with tests/run.sh -m gpu."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_flash_attn_2_available

from fvae_dist import FVAELoraConfig, side_loss
from fvae_dist.adapter import FVAELinear
from fvae_dist.training.implementations import lone_documents_through_sdpa
from fvae_dist.training.recipe import ModelSection
from tests.fused import FP32_RTOL, by_products, make, make_block, run, run_block, worst
from tests.models import LayerModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
BF16_RTOL = 1.6e-2


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm())


def run_layer(model: LayerModel, x: torch.Tensor, noise: list[torch.Tensor], monkeypatch) -> dict[str, torch.Tensor]:
    draws = iter(noise)
    monkeypatch.setattr(torch, "randn_like", lambda like: next(draws).to(like))
    x = x.detach().clone().requires_grad_(True)
    with side_loss.collect(model) as collected:
        y = model(x)
    (1000 * y.float().square().mean() + collected.neg_elbo).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "neg_elbo": collected.neg_elbo.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("num_tokens", [1, 125, 2048])
def test_layer_bf16_matches_float64(num_tokens, monkeypatch):
    torch.manual_seed(0)
    config = FVAELoraConfig(encoder_dropout=0.0, decoder_dropout=0.0, kernel="torch")  # the noise is given
    model = LayerModel(FVAELinear(nn.Linear(1024, 512), "default", config)).cuda()
    with torch.no_grad():
        for parameter in model.layer.fvae_vae.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    # Inputs and weights that bf16 holds exactly: the error is that of the computation, not of rounding the problem.
    x = torch.randn(1, num_tokens, 1024, device="cuda").bfloat16()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    reference = copy.deepcopy(model).double()
    model.layer.base_layer.bfloat16()
    noise = [torch.randn(1, num_tokens, 16, device="cuda") for _ in range(2)]
    expected = run_layer(reference, x.double(), noise, monkeypatch)
    actual = run_layer(model, x, noise, monkeypatch)
    errors = {name: relative_error(actual[name], value) for name, value in expected.items() if name in actual}
    assert set(expected) - set(actual) == set()
    # A lone token's ReLU pattern may flip in bf16; with more tokens the flips average out.
    limit = BF16_RTOL if num_tokens > 1 else 10 * BF16_RTOL
    assert max(errors.values()) < limit, {name: error for name, error in errors.items() if error >= limit}


def tiny_llama(attention: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention, dtype=torch.bfloat16).cuda()
    return get_peft_model(model, FVAELoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


def step(model: nn.Module, ids: torch.Tensor, **inputs) -> tuple[float, float, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(1)
    with side_loss.collect(model) as collected:
        loss = model(input_ids=ids, labels=ids, **inputs).loss
    (1000 * loss + collected.neg_elbo).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss), float(collected.neg_elbo), gradients


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_checkpointing_changes_nothing(attention):
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    model = tiny_llama(attention).train()
    ids = torch.randint(0, 256, (2, 384), device="cuda")
    loss, neg_elbo, gradients = step(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    loss2, neg_elbo2, gradients2 = step(model, ids)
    assert (loss, neg_elbo) == (loss2, neg_elbo2)
    # flash-attn's backward adds in no fixed order, hence the bf16 tolerance.
    errors = {name: relative_error(gradients2[name], value) for name, value in gradients.items() if value.norm() > 0}
    assert max(errors.values()) < BF16_RTOL


def test_packed_flash_attention_equals_separate_documents():
    if not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    model = tiny_llama("flash_attention_2").eval()
    documents = [torch.randint(0, 256, (1, length), device="cuda") for length in (64, 200, 1, 119)]
    lengths = torch.tensor([d.shape[1] for d in documents], dtype=torch.int32)
    borders = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]).cuda()
    with torch.no_grad():
        separate = torch.cat([model(input_ids=d).logits for d in documents], dim=1)
        packed = model(
            input_ids=torch.cat(documents, dim=1),
            position_ids=torch.cat([torch.arange(int(n)) for n in lengths])[None].cuda(),
            cu_seq_lens_q=borders,
            cu_seq_lens_k=borders,
            max_length_q=int(lengths.max()),
            max_length_k=int(lengths.max()),
        ).logits
    assert relative_error(packed, separate) < BF16_RTOL


def test_packed_row_of_one_document_is_the_same_through_sdpa():
    if not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    model = tiny_llama("flash_attention_2").train()
    ids = torch.randint(0, 256, (1, 384), device="cuda")
    borders = torch.tensor([0, 384], dtype=torch.int32, device="cuda")
    of_row = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 384, "max_length_k": 384}
    section = ModelSection(name_or_path="x", dtype="bfloat16", attention="flash_attention_2")
    through_flash = step(model, ids, position_ids=torch.arange(384, device="cuda")[None], **of_row)
    with lone_documents_through_sdpa("flash_attention_2", section, False, "packed"):
        through_sdpa = step(model, ids, position_ids=torch.arange(384, device="cuda")[None], **of_row)
    assert through_sdpa[:2] == pytest.approx(through_flash[:2], rel=1e-3)
    gradients = through_flash[2]
    errors = {name: relative_error(through_sdpa[2][name], value) for name, value in gradients.items() if value.any()}
    assert max(errors.values()) < 2 * BF16_RTOL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_tokens", "features", "settings"),
    [
        (1, 4096, {}),
        (3, 4096, {}),
        (125, 1000, {}),
        (2048, 4096, {}),
        (8192, 4096, {}),
        (500, 14336, {}),
        (500, 256, {}),  # sums over tokens in chunks
        (125, 520, {"r": 4, "encoder_hidden": 4, "decoder_layers": 1}),
        (125, 520, {"r": 8, "encoder_hidden": 8, "decoder_layers": 2, "latent_fusion": "average"}),
        (300, 1024, {"r": 64, "encoder_hidden": 64}),
        (300, 1024, {"r": 128, "encoder_hidden": 128}),
    ],
    ids=str,
)
def test_fused_kernels_match_float64(num_tokens, features, settings, dtype):
    module = make(
        features, **{"r": 16, "encoder_hidden": 16, "decoder_hidden": 128, "decoder_layers": 3, **settings}
    ).cuda()
    x = torch.randn(num_tokens, features, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    expected = run(copy.deepcopy(module).double(), x.double(), "torch")
    found, again = run(module, x, "fused"), run(module, x, "fused")
    assert all(torch.equal(value, again[name]) for name, value in found.items())
    error, name = worst(found, expected)
    assert error < (FP32_RTOL if dtype == torch.float32 else BF16_RTOL if num_tokens > 20 else 3 * BF16_RTOL), name


@pytest.mark.parametrize(
    ("num_tokens", "features", "settings", "rows"),
    [
        (1, 4096, {}, 8192),
        (125, 1001, {}, 8192),
        (300, 1024, {"r": 64, "encoder_hidden": 64}, 8192),
        (5000, 4096, {}, 2048),  # the last of three parts is short
        (2500, 14336, {"latent_fusion": "average", "decoder_layers": 1}, 1024),
    ],
    ids=str,
)
def test_backward_by_products_matches_float64(num_tokens, features, settings, rows):
    with by_products(rows):
        test_fused_kernels_match_float64(num_tokens, features, settings, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "rows"),
    [
        *((dtype, num_tokens, 0) for dtype in (torch.float32, torch.bfloat16) for num_tokens in (3, 125, 2048)),
        (torch.bfloat16, 2048, 768),
    ],
)
def test_layers_with_one_input_match_float64(dtype, num_tokens, rows):
    widths = {"q_proj": 1024, "k_proj": 256, "v_proj": 256}
    settings = {"r": 16, "encoder_hidden": 16, "decoder_hidden": 128, "decoder_layers": 3, "lora_alpha": 32}
    reference = make_block(1024, widths, "torch", **settings).cuda()
    for name, parameter in reference.named_parameters():
        if "base_layer" in name:
            parameter.data = parameter.data.bfloat16().float()
    model = make_block(1024, widths, "fused", **settings).cuda()
    model.load_state_dict(reference.state_dict())
    reference.double()
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            parameter.data = parameter.data.to(dtype)
    x = torch.randn(1, num_tokens, 1024, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    expected, _ = run_block(reference, x.double())
    with by_products(rows):
        (found, _), (again, _) = run_block(model, x), run_block(model, x)
    assert all(torch.equal(value, again[name]) for name, value in found.items())
    error, name = worst(found, expected)
    assert error < (FP32_RTOL if dtype == torch.float32 else BF16_RTOL if num_tokens > 20 else 3 * BF16_RTOL), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [300, 8192])
def test_flat_parameters_are_the_same_to_the_kernels(num_tokens, dtype):
    plain, flat = (make(1000, r=16, encoder_hidden=16, decoder_layers=3).cuda() for _ in range(2))
    flat.flatten()
    x = torch.randn(num_tokens, 1000, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    expected, found = run(plain, x, "fused"), run(flat, x, "fused")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    state = flat.state_dict()
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
    for value in state.values():
        value.zero_()
    assert not any(parameter.any() for parameter in flat.parameters())


@pytest.mark.parametrize("rows", [0, 512])
def test_fused_kernels_read_nothing_unwritten(rows):
    module = make(4096, r=16, encoder_hidden=16, decoder_layers=3).cuda()
    x = torch.randn(777, 4096, device="cuda").bfloat16()
    with by_products(rows):
        first = run(module, x, "fused")
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN
        try:
            second = run(module, x, "fused")
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, second[name]) and value.isfinite().all() for name, value in first.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_begin_anywhere_in_one_buffer(dtype):
    """As DeepSpeed's flat buffers hold them: the kernels are compiled for where they begin."""
    module = make(1000, r=5, encoder_hidden=7, decoder_hidden=33, decoder_layers=2).cuda()
    x = torch.randn(300, 1000, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    expected = run(copy.deepcopy(module).double(), x.double(), "torch")
    run(module, x, "fused")
    flat, at = torch.empty(1 + sum(p.numel() for p in module.parameters()), device="cuda"), 1
    for parameter in module.parameters():
        flat[at : at + parameter.numel()] = parameter.data.flatten()
        parameter.data = flat[at : at + parameter.numel()].view(parameter.shape)
        at += parameter.numel()
    error, name = worst(run(module, x, "fused"), expected)
    assert error < (FP32_RTOL if dtype == torch.float32 else BF16_RTOL), name
