"""Batches whose samples use different adapters, as with PEFT's LoRA."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from fvae_dist.adapter import FVAELinear
from tests.adapted import add_trained, fvae_layers, logits, outputs_of, trained
from tests.models import randomise, tiny_adapter, tiny_model, token_ids

IDS = token_ids(batch=5)
NAMES = ["one", "__base__", "default", "one", "default"]


def with_two(name="llama", **settings):
    return add_trained(trained(name, **settings), "one", r=2, lora_alpha=8.0)


def rows(model, names, ids=IDS, base=None) -> torch.Tensor:
    """What each sample gets from its own adapter, one adapter at a time."""
    found = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                found.append(logits(model, row[None]))
        else:
            model.set_adapter(name)
            found.append(logits(model, row[None]))
    model.set_adapter("default")
    return torch.cat(found)


@pytest.mark.parametrize("settings", [{}, {"task_type": "CAUSAL_LM"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_sample_gets_its_adapter(name, settings):
    model = with_two(name, **settings)
    expected = rows(model, NAMES)
    for names in (NAMES, tuple(NAMES)):
        torch.testing.assert_close(logits(model, IDS, adapter_names=names), expected)
    for i in range(1, len(NAMES)):  # all five differ from what another sample's adapter would give
        assert not torch.allclose(logits(model, IDS, adapter_names=NAMES[i:] + NAMES[:i]), expected)
    before = logits(model)
    torch.testing.assert_close(logits(model, IDS, adapter_names=["default"] * 5), logits(model, IDS))
    with model.disable_adapter():
        base = logits(model, IDS)
    torch.testing.assert_close(logits(model, IDS, adapter_names=["__base__"] * 5), base)
    assert torch.equal(logits(model), before), "hooks must be gone"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_disabled_adapters_stay_disabled():
    model = with_two()
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS, adapter_names=NAMES), logits(tiny_model("llama"), IDS))


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"task_type": "CAUSAL_LM"}], ids=str)
def test_generate(settings, num_beams):
    model = add_trained(trained(lora_alpha=400.0, **settings), "one", lora_alpha=400.0)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": num_beams, "eos_token_id": None}
    expected = {}
    for name in ("default", "one"):
        model.set_adapter(name)
        expected[name] = model.generate(input_ids=IDS, **options)
    with model.disable_adapter():
        expected["__base__"] = model.generate(input_ids=IDS, **options)
    assert not torch.equal(expected["default"], expected["one"])
    generated = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
    assert torch.equal(generated, torch.stack([expected[name][i] for i, name in enumerate(NAMES)]))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_with_an_encoder(num_beams):
    """Beam search repeats the samples for the decoder only."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)).eval()
    model = randomise(get_peft_model(base, tiny_adapter(lora_alpha=100.0, task_type="SEQ_2_SEQ_LM")))
    add_trained(model.eval(), "one", lora_alpha=100.0)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams, "eos_token_id": None}
    expected = {}
    for name in ("default", "one"):
        model.set_adapter(name)
        expected[name] = model.generate(input_ids=IDS, **options)
    assert not torch.equal(expected["default"], expected["one"])
    names = ["one", "default", "default", "one", "default"]
    generated = model.generate(input_ids=IDS, adapter_names=names, **options)
    assert torch.equal(generated, torch.stack([expected[name][i] for i, name in enumerate(names)]))


def test_adapters_in_some_layers_only():
    model = add_trained(trained(target_modules=["q_proj"], layers_to_transform=[0]), "one", target_modules=["v_proj"])
    torch.testing.assert_close(logits(model, IDS, adapter_names=NAMES), rows(model, NAMES))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("active", ["default", "one"])
@pytest.mark.parametrize("both", [True, False])
def test_modules_to_save(active, both):
    model = trained("gpt2", modules_to_save=["lm_head"], model_settings={"tie_word_embeddings": False})
    add_trained(model, "one", modules_to_save=["lm_head"] if both else None)
    with torch.no_grad():
        for i, head in enumerate(model.get_base_model().lm_head.modules_to_save.values()):
            head.weight.mul_(2 + i)
    expected = rows(model, NAMES)
    model.set_adapter(active)
    torch.testing.assert_close(logits(model, IDS, adapter_names=NAMES), expected)


def test_pruned_and_full_adapter_in_one_batch(tmp_path):
    model = with_two()
    expected = rows(model, NAMES)
    model.save_pretrained(tmp_path, selected_adapters=["one"], inference_only=True)
    model.delete_adapter("one")
    model.load_adapter(tmp_path / "one", "one")
    torch.testing.assert_close(logits(model, IDS, adapter_names=NAMES), expected)


# ---------------------------------------------------------------------------------------------------- errors, as LoRA's


def lora():
    model = get_peft_model(tiny_model("llama"), LoraConfig())
    model.add_adapter("one", LoraConfig())
    return model.eval()


def merged(model):
    model.merge_adapter()
    return model


ERRORS = {
    "unknown": (lambda model: model, {"adapter_names": ["one", "typo", "nope", "one", "default"]}),
    "too_short": (lambda model: model, {"adapter_names": ["one"] * 4}),
    "too_long": (lambda model: model, {"adapter_names": ["one"] * 6}),
    "training": (lambda model: model.train(), {"adapter_names": NAMES}),
    "merged": (merged, {"adapter_names": NAMES}),
    "text": (lambda model: model, {"adapter_names": "default"}),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_those_of_lora(kind):
    prepare, arguments = ERRORS[kind]
    own = add_trained(trained(encoder_layers=0), "one", encoder_layers=0)
    messages = []
    for model in (lora(), own):
        with pytest.raises(ValueError) as error:
            prepare(model)(IDS, **arguments)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and len(messages[0]) > 20


@pytest.mark.parametrize("names", [["one"] * 4, ["one"] * 5], ids=len)
def test_hooks_are_gone_after_an_error(names):
    model = with_two()
    expected = logits(model, IDS)
    wrong = IDS if len(names) == 4 else IDS.float()
    with pytest.raises((ValueError, RuntimeError)):
        model(wrong, adapter_names=names)
    assert torch.equal(logits(model, IDS), expected)


# ------------------------------------------------------------------------------------------------------------ the layer


class Keeps(nn.Linear):
    """A base layer whose output is a view of something that must not change."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept.view_as(self.kept)


def test_base_output_is_not_written_to_and_gradients_flow():
    torch.manual_seed(0)
    base = Keeps(6, 5)
    layer = FVAELinear(base, "default", tiny_adapter())
    layer.update_layer("one", tiny_adapter(r=2))
    randomise(layer).eval()
    x = torch.randn(5, 3, 6, requires_grad=True)
    layer(x, adapter_names=NAMES).square().sum().backward()
    mixed, x.grad = x.grad, None
    assert torch.equal(base.kept, nn.Linear.forward(base, x))
    for i, name in enumerate(NAMES):
        layer.set_adapter([] if name == "__base__" else [name])
        layer(x[i : i + 1]).square().sum().backward()
    torch.testing.assert_close(x.grad, mixed)


def test_layers_run_each_adapter_once_on_its_own_samples():
    model = with_two()
    seen = []
    for layer in fvae_layers(model).values():
        for name, vae in layer.fvae_vae.items():
            vae.register_forward_hook(lambda module, args, out, name=name: seen.append((name, len(args[0]))))
    logits(model, IDS, adapter_names=NAMES)
    assert sorted(set(seen)) == [("default", 2), ("one", 2)] and len(seen) == 2 * len(fvae_layers(model))


def test_outputs_of_adapters_differ():
    """What the comparisons above rest on."""
    first, second = outputs_of(with_two(), ["default", "one"]).values()
    assert not torch.allclose(first, second)
