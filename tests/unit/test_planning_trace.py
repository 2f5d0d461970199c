"""Tracing one layer on the meta device: equals what autograd really keeps, and works for models nobody described."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

from fvae_dist.adapter import side_loss
from fvae_dist.adapter.noise import TokenNoise
from fvae_dist.kernels import launching
from fvae_dist.planning.hardware import PlanError
from fvae_dist.planning.memory import estimate_memory
from fvae_dist.planning.stand_ins import Kernels
from fvae_dist.planning.subject import Settings
from fvae_dist.planning.trace import base_of, find_layers, trace_layer
from fvae_dist.training.modeling import attach_adapter
from tests.planned import SIZES, choice, subject, subject_of_config

TARGETS = ["q_proj", "v_proj"]
SETTINGS = Settings("bfloat16", 1, 256)


def test_llama_layer_keeps_what_its_formula_says():
    """Bytes a token and feature of a bf16 Llama-3-8B layer, counted by hand."""
    traces = subject().traces(zero3=False)
    unit = 8192 * 4096
    # Two norms' fp32 inputs; gate, its activation and up, 3.5 wide each.
    assert traces.bare.saved_bytes / unit == pytest.approx(2 * 4 + 3 * 3.5 * 2, rel=1e-3)
    # q, k, v and the output in 16 bits, a fp32 log-sum-exp for each of 32 heads.
    attention = 2 * (1 + 0.25 + 0.25 + 1) + 4 * 32 / 4096
    assert (traces.whole.saved_bytes - traces.adapted.saved_bytes) / unit == pytest.approx(attention, rel=1e-3)
    assert traces.whole.input_bytes == 2 * unit
    # DeepSpeed's linear keeps the inputs of frozen products too: of q, k and v together, of o, gate and up, down.
    sharded = subject().traces(zero3=True)
    assert (sharded.bare.saved_bytes - traces.bare.saved_bytes) / unit == pytest.approx(2 * (1 + 1 + 1 + 3.5), rel=1e-3)


def test_llama_layer_computes_what_its_formula_says():
    trace = subject().traces(zero3=True).bare
    weights = sum(subject().layer_sizes) - 2 * 4096  # norms multiply no matrix
    assert trace.forward.flops == pytest.approx(2 * weights * 8192, rel=1e-3)
    assert trace.backward.flops == pytest.approx(2 * weights * 8192, rel=1e-3)  # frozen: the input's gradient alone
    assert trace.forward.attention_flops == pytest.approx(2 * 8192**2 * 4096, rel=1e-3)  # two products, half masked
    assert trace.backward.attention_flops == pytest.approx(2.5 * trace.forward.attention_flops)


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"peft_type": "LORA"}, "float32"),
        ({"peft_type": "FVAE_LORA"}, "float32"),
        ({"peft_type": "FVAE_LORA", "kernel": "fused"}, "bfloat16"),
    ],
    ids=str,
)
def test_real_autograd_keeps_as_much(settings, dtype):
    """The same model with weights, on the CPU: storages that autograd saved for one layer."""
    is_fused = settings.get("kernel") == "fused"
    if is_fused and not launching.kernels().INTERPRETED:
        pytest.skip("Triton's interpreter is off: it is for machines without a GPU")
    adapter = settings | {"r": 4, "target_modules": TARGETS}
    config = LlamaConfig(**SIZES["tiny"])
    planned = Settings(dtype, 2, 96, "sdpa", fused_adapters=is_fused)
    traced = subject_of_config(config, adapter, planned).traces(zero3=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=getattr(torch, dtype))
    model = attach_adapter(model, adapter).train()
    backbone = base_of(model).base_model
    layers = list(backbone.layers)
    kept = []
    for count in (1, 2):
        backbone.layers = torch.nn.ModuleList([layers[0]] * count)
        kept.append(_saved_bytes(model, backbone, (2, 96)))
    assert traced.whole.saved_bytes == pytest.approx(kept[1] - kept[0], rel=0.03)


def _saved_bytes(model, backbone, shape) -> int:
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage  # alive, so that its address is not used twice
        return tensor

    dtype = backbone.embed_tokens.weight.dtype
    hidden = torch.randn(*shape, backbone.config.hidden_size, dtype=dtype, requires_grad=True)
    known.add(hidden.untyped_storage().data_ptr())
    noise = TokenNoise({"input_ids": torch.ones(shape, dtype=torch.long)}, seed=0, step=0)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        side_loss.collect(model, token_mask=torch.ones(shape), terms=False, noise=noise),
    ):
        out = backbone(inputs_embeds=hidden, use_cache=False)[0]
    del out
    return sum(storage.nbytes() for storage in saved.values())


def test_scales_with_tokens():
    once, twice = (subject("tiny", length, "LORA").traces(zero3=True).whole for length in (4096, 8192))
    assert twice.saved_bytes == pytest.approx(2 * once.saved_bytes, rel=1e-3)
    assert twice.peak_bytes == pytest.approx(2 * once.peak_bytes, rel=0.02)
    assert twice.forward.attention_flops == pytest.approx(4 * once.forward.attention_flops)
    batch = subject("tiny", 4096, "LORA", sequences=2).traces(zero3=True).whole
    assert batch.forward.attention_flops == pytest.approx(2 * once.forward.attention_flops)


def test_liger_keeps_less():
    plain, fused = (subject("8b", 8192, "LORA", liger=liger).traces(zero3=False).bare for liger in (False, True))
    # The norms' inputs in 16 bits, the activation not at all.
    assert (plain.saved_bytes - fused.saved_bytes) / (8192 * 4096) == pytest.approx(2 * 2 + 2 * 3.5, rel=1e-3)
    assert fused.forward.num_kernels < plain.forward.num_kernels
    assert fused.forward.flops == plain.forward.flops


def test_leaves_no_trace():
    linear, autocast, enabled = F.linear, torch.autocast, torch.is_autocast_enabled
    config = LlamaConfig(**SIZES["tiny"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False)
    holder, name = find_layers(model, config.num_hidden_layers)
    layers = getattr(holder, name)
    trace_layer(model, layers[0], (1, 32), Kernels(), zero3=True)
    assert (F.linear, torch.autocast, torch.is_autocast_enabled) == (linear, autocast, enabled)
    assert getattr(holder, name) is layers and len(layers) == config.num_hidden_layers
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not layers[0]._forward_hooks and not layers[0]._forward_pre_hooks


_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2, "head_dim": 16}
ARCHITECTURES = {
    "gpt2": (lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320), ["c_attn"]),
    "opt": (
        lambda: transformers.OPTConfig(
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=64,
            vocab_size=320,
        ),
        TARGETS,
    ),
    "bloom": (
        lambda: transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=320),
        ["query_key_value"],
    ),
    "falcon": (
        lambda: transformers.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=320),
        ["query_key_value"],
    ),
    "gemma2": (lambda: transformers.Gemma2Config(**_GROUPED), TARGETS),
    "mixtral": (
        lambda: transformers.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
        TARGETS,
    ),
    "qwen3_moe": (
        lambda: transformers.Qwen3MoeConfig(**_GROUPED, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
        TARGETS,
    ),
    "phi3": (lambda: transformers.Phi3Config(**_SMALL, num_key_value_heads=2, pad_token_id=0), ["qkv_proj"]),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_can_be_planned(name):
    make_config, targets = ARCHITECTURES[name]
    of = subject_of_config(make_config(), {"peft_type": "LORA", "r": 4, "target_modules": targets}, SETTINGS)
    assert of.adapted_layers == of.num_layers == 2
    traces = of.traces(zero3=True)
    assert 0 < traces.bare.saved_bytes < traces.whole.saved_bytes < traces.whole.peak_bytes
    assert traces.bare.forward.flops > 0
    assert estimate_memory(of, choice(of), 8).total_gib > 0


def test_mixture_counts_the_experts_that_run():
    config = transformers.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)
    of = subject_of_config(config, {"peft_type": "LORA", "target_modules": TARGETS}, SETTINGS)
    expert = 3 * 64 * 128
    assert sum(of.layer_sizes) > 4 * expert
    # Two of four experts multiply each token; attention and router beside them.
    assert 2 * 2 * expert * 256 < of.traces(zero3=True).bare.forward.flops < 2 * 3 * expert * 256


@pytest.mark.parametrize(
    "adapter",
    [
        {"peft_type": "LORA", "use_dora": True, "target_modules": TARGETS},
        {"peft_type": "LORA", "target_modules": "all-linear"},
        {"peft_type": "VERA", "target_modules": TARGETS},
        {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
        {"peft_type": "FVAE_LORA", "target_modules": TARGETS, "layers_to_transform": [2]},
        {"peft_type": "FVAE_LORA", "target_modules": TARGETS, "detach_input": True},
        {"peft_type": "FVAE_LORA", "target_modules": TARGETS, "encoder_layers": 0},
    ],
    ids=lambda adapter: "-".join(str(value) for key, value in adapter.items() if key != "target_modules"),
)
def test_adapters_can_be_planned(adapter):
    of = subject_of_config(LlamaConfig(**SIZES["tiny"]), adapter, SETTINGS)
    memory = estimate_memory(of, choice(of, None), 1)
    assert memory.total_gib > 0
    assert of.trainable_parameters > 0
    assert of.adapted_layers == {"PROMPT_TUNING": 0}.get(
        adapter["peft_type"], len(adapter.get("layers_to_transform", range(4)))
    )


def test_only_adapted_layers_pay_for_adapters():
    adapter = {"peft_type": "LORA", "r": 4, "target_modules": TARGETS}
    one = subject_of_config(LlamaConfig(**SIZES["tiny"]), adapter | {"layers_to_transform": [1]}, SETTINGS)
    every = subject_of_config(LlamaConfig(**SIZES["tiny"]), adapter, SETTINGS)
    of_one, of_all = (estimate_memory(of, choice(of, None, "none"), 1).adapter_activations_gib for of in (one, every))
    assert 2 * of_one < of_all


def test_model_without_a_list_of_layers_is_refused():
    config = LlamaConfig(**SIZES["tiny"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="no list of 7 layers"):
        find_layers(model, 7)
    assert issubclass(PlanError, Exception)
