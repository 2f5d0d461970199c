"""Adapters on bitsandbytes' 4-bit and 8-bit linears. bitsandbytes runs on CPUs too; the GPU runs need -m gpu."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fvae_dist import side_loss
from fvae_dist.adapter.layer import linear_features
from tests.adapted import IDS, fvae_layers, trainable_names
from tests.models import named_gradients, randomise, tiny_adapter, tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install bitsandbytes)")

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
pytestmark = [
    pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)]),
    pytest.mark.parametrize("kind", ["nf4", "int8"]),
]
LINEARS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def no_packing(monkeypatch):
    """On CPUs with bf16 units bitsandbytes packs 4-bit weights anew in evaluation, and not back as they were."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_model("llama", torch.bfloat16, hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def quantized(checkpoint, kind, device):
    settings = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        "int8": {"load_in_8bit": True},
    }
    config = BitsAndBytesConfig(**settings[kind])
    base = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, device_map={"": device})
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == LINEARS[kind]
    return base


def adapted(checkpoint, kind, device, checkpointing=False, **settings) -> PeftModel:
    base = prepare_model_for_kbit_training(
        quantized(checkpoint, kind, device),
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    torch.manual_seed(0)
    return randomise(get_peft_model(base, tiny_adapter(**{"target_modules": TARGETS, **settings})))


def packed_weights(model) -> dict[str, torch.Tensor]:
    """The frozen values, quantisation constants included: both kinds of linear put these into their state dict."""
    state = {name: value for name, value in model.state_dict().items() if ".fvae_" not in name}
    return {name: value.detach().cpu().clone() for name, value in state.items() if torch.is_tensor(value)}


def step(model) -> dict[str, torch.Tensor]:
    ids = IDS.to(model.device)
    model.train()
    model.zero_grad()
    torch.manual_seed(1)
    with side_loss.collect(model) as collected:
        loss = model(input_ids=ids, labels=ids).loss
    (1000 * loss + collected.neg_elbo).backward()
    assert len(collected.layer_names) == len(fvae_layers(model))
    return named_gradients(model)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS.to(model.device)).logits


def test_trains_and_leaves_the_base_alone(kind, device, checkpoint):
    model = adapted(checkpoint, kind, device)
    before = packed_weights(model)
    constants = {"nf4": "q_proj.base_layer.weight.absmax", "int8": "q_proj.base_layer.SCB"}
    assert any(name.endswith(constants[kind]) for name in before)
    assert any(value.dtype in (torch.uint8, torch.int8) for value in before.values())
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    gradients = step(model)
    assert gradients.keys() == trainable_names(model) == {n for n, _ in model.named_parameters() if ".fvae_" in n}
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.any(), name
    first = logits(model)
    optimizer.step()
    assert not torch.equal(logits(model), first)
    after = packed_weights(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_checkpointing_changes_nothing(kind, device, checkpoint):
    plain = step(adapted(checkpoint, kind, device))
    model = adapted(checkpoint, kind, device, checkpointing=True)
    assert model.get_base_model().model.gradient_checkpointing
    recomputed = step(model)
    assert recomputed.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_untrained_adapter_is_exact(kind, device, checkpoint):
    expected = logits(quantized(checkpoint, kind, device))
    model = get_peft_model(quantized(checkpoint, kind, device), tiny_adapter(target_modules=TARGETS))
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("inference_only", [False, True])
def test_save_and_load(kind, device, inference_only, checkpoint, tmp_path):
    model = adapted(checkpoint, kind, device)
    model.save_pretrained(tmp_path, inference_only=inference_only)
    base = prepare_model_for_kbit_training(quantized(checkpoint, kind, device), use_gradient_checkpointing=False)
    untouched = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(model), untouched)
    own = {name: p for name, p in loaded.named_parameters() if ".fvae_" in name}
    assert {p.dtype for p in own.values()} == {torch.float32} and {p.device.type for p in own.values()} == {device}


def test_merging_is_refused(kind, device, checkpoint):
    model = adapted(checkpoint, kind, device, encoder_layers=0)
    before, expected = packed_weights(model), logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=rf"q_proj: .*a {LINEARS[kind]}, is .*neither quantised"):
            merge()
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(value, before[name]) for name, value in packed_weights(model).items())


def test_every_linear_is_found(kind, device, checkpoint):
    layers = fvae_layers(adapted(checkpoint, kind, device, target_modules="all-linear"))
    assert len(layers) == 14
    sizes = {
        "k_proj": (64, 32),
        "v_proj": (64, 32),
        "up_proj": (64, 128),
        "gate_proj": (64, 128),
        "down_proj": (128, 64),
    }
    for name, layer in layers.items():
        assert type(layer.base_layer).__name__ == LINEARS[kind]
        assert linear_features(layer.base_layer) == sizes.get(name.rpartition(".")[2], (64, 64))


def test_mixed_batch(kind, device, checkpoint):
    model = adapted(checkpoint, kind, device).eval()
    with model.disable_adapter():
        base = logits(model)
    own, ids = logits(model), IDS.to(device)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([base[0], own[1]]), rtol=1e-2, atol=1e-3)
    assert not torch.allclose(mixed[0], own[0], rtol=1e-2, atol=1e-3)
