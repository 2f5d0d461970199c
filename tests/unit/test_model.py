import re
from collections import Counter

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from fvae_dist import FVAELoraConfig
from fvae_dist.adapter import FVAELinear
from tests.models import ARCHITECTURES, randomise, tiny_adapter, tiny_model, token_ids

IDS = token_ids()
# How many modules of each name a two-layer model has.
ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 2)
MLP = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 2)
DEFAULT_TARGETS = {name: {"q_proj": 2, "v_proj": 2} for name in ARCHITECTURES} | {"gpt2": {"c_attn": 2}}
# PEFT allows any name without a dot that nn.ModuleDict has not taken.
ODD_NAMES = ["other", "my-adapter", "a b", "a+b", "[x]", "été", "0", "mean", "q_proj", "$", "fvae_vae"]


def adapted(name="llama", dtype=torch.float32, adapter_name="default", **settings) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_model(name, dtype), tiny_adapter(**settings), adapter_name=adapter_name)


def trained(*args, **settings) -> PeftModel:
    """Stands for an adapter after training: no parameter is at its initial value."""
    return randomise(adapted(*args, **settings))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def fvae_parameters(model) -> dict[str, nn.Parameter]:
    found = {name: parameter for name, parameter in model.named_parameters() if ".fvae_" in name}
    assert found
    return found


def adapted_names(model) -> set[str]:
    return {name for name, module in model.get_base_model().named_modules() if isinstance(module, FVAELinear)}


def last_parts(names) -> list[str]:
    return [name.rpartition(".")[2] for name in names]


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        *((name, {}, targets) for name, targets in DEFAULT_TARGETS.items()),
        *((name, {"target_modules": "all-linear"}, ATTENTION | MLP) for name in ARCHITECTURES if name != "gpt2"),
        ("gpt2", {"target_modules": "all-linear"}, {"c_attn": 2, "c_proj": 4, "c_fc": 2}),
        ("gpt2", {"target_modules": ["c_fc", "attn.c_proj"]}, {"c_fc": 2, "c_proj": 2}),
        ("llama", {"target_modules": ["k_proj", "down_proj"]}, {"k_proj": 2, "down_proj": 2}),
        ("llama", {"target_modules": ("k_proj",)}, {"k_proj": 2}),
        ("llama", {"target_modules": ["model.layers.1.self_attn.k_proj"]}, {"k_proj": 1}),
        ("llama", {"target_modules": r".*\.self_attn\.[kv]_proj"}, {"k_proj": 2, "v_proj": 2}),
        ("llama", {"target_modules": ["lm_head"]}, {"lm_head": 1}),
        (
            "llama",
            {"target_modules": "all-linear", "exclude_modules": ["down_proj", "up_proj", "gate_proj"]},
            ATTENTION,
        ),
        ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}, ATTENTION),
        ("gpt2", {"exclude_modules": ["h.0.attn.c_attn"]}, {"c_attn": 1}),
    ],
    ids=str,
)
def test_targets_are_adapted(name, settings, expected):
    model = adapted(name, **settings)
    assert Counter(last_parts(adapted_names(model))) == expected
    assert adapted_names(model) == set(model.base_model.targeted_module_names)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"layers_to_transform": 1}, {1}),
        ({"layers_to_transform": [0]}, {0}),
        ({"layers_to_transform": [0, 1], "layers_pattern": "layers"}, {0, 1}),
        ({"layers_to_transform": [1], "target_modules": ["k_proj"]}, {1}),
        ({"exclude_modules": ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]}, {0}),
        ({"exclude_modules": r".*layers\.0\..*"}, {1}),
    ],
    ids=str,
)
def test_layers_are_chosen(settings, layers):
    names = adapted_names(adapted(**settings))
    assert {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in names} == layers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["query"]},
            "'query' matches no module of LlamaForCausalLM; could match: .*k_proj, .*v_proj",
        ),
        ({"target_modules": ["q_proj", "query"]}, "'query' matches no module.* could match: .*q_proj"),
        ({"target_modules": ["proj"]}, "'proj' matches no module"),
        ({"target_modules": r"q_proj"}, "'q_proj' matches no module.* could match: .*q_proj"),
        ({"target_modules": r".*\.attn\..*"}, "matches no module"),
        ({"target_modules": ["input_layernorm"]}, "input_layernorm is a LlamaRMSNorm, not a linear.* match: .*q_proj"),
        ({"target_modules": ["q_proj", "self_attn"]}, "self_attn is a LlamaAttention, not a linear"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is a Embedding, not a linear"),
        ({"target_modules": r".*(q_proj|act_fn)"}, "act_fn is a SiLU.*, not a linear"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "target_modules.*exclude_modules"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, "layers_to_transform: 2 matches no module"),
        ({"layers_to_transform": [0], "layers_pattern": "h", "target_modules": ["q_proj"]}, "layers_to_transform: 0"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_bad_target_is_named_and_leaves_the_model_alone(settings, message):
    base = tiny_model("llama")
    before = [(name, type(module)) for name, module in base.named_modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, tiny_adapter(**settings))
    assert [(name, type(module)) for name, module in base.named_modules()] == before


def test_architecture_without_default_needs_targets():
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), tiny_adapter())


def test_inside_of_an_adapter_is_no_target_of_the_next():
    model = adapted()
    with pytest.raises(ValueError, match=r"'mean' matches no module.*could match: down_proj, gate_proj, k_proj"):
        model.add_adapter("other", tiny_adapter(target_modules=["q_proj", "mean"]))
    assert set(model.peft_config) == {"default"}
    model.add_adapter("other", tiny_adapter(target_modules="all-linear"))
    assert Counter(last_parts(adapted_names(model))) == ATTENTION | MLP


# --------------------------------------------------------------------------------------------------- parameters, dtypes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_only_adapters_train(name, capsys):
    model = adapted(name)
    trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == fvae_parameters(model).keys()
    model.print_trainable_parameters()
    total = sum(parameter.numel() for parameter in model.parameters())
    expected = f"trainable params: {sum(trainable.values()):,} || all params: {total:,} || trainable%: "
    assert capsys.readouterr().out.startswith(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_evaluation_before_training_is_the_base_model(name, dtype):
    expected = logits(tiny_model(name, dtype))
    model = adapted(name, dtype)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.train().eval()), expected)
    assert not torch.equal(logits(model.train()), expected), "training adds noise"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_evaluation_computes_neither_decoder_nor_encoder_2(name):
    model = trained(name).eval()
    expected = logits(model)
    unused = re.compile(r"\.(decoder|encoder2|logvar)\b")
    ran = []
    for module_name, module in model.named_modules():
        if unused.search(module_name):
            module.register_forward_hook(lambda *_, module_name=module_name: ran.append(module_name))
    with torch.no_grad():
        poisoned = [p.fill_(float("nan")) for n, p in fvae_parameters(model).items() if unused.search(n)]
    assert poisoned and torch.equal(logits(model), expected) and ran == []


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "inner": lambda model: model.get_base_model().to(dtype=torch.bfloat16) and model,
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapter_stays_fp32_whatever_the_base(name, cast):
    model = trained(name, torch.bfloat16)
    assert {parameter.dtype for parameter in fvae_parameters(model).values()} == {torch.float32}
    model = trained(name)
    before = {n: p.detach().clone() for n, p in fvae_parameters(model).items()}
    CASTS[cast](model)
    after = fvae_parameters(model)
    assert all(after[n].dtype == torch.float32 and torch.equal(after[n], value) for n, value in before.items())
    others = {p.dtype for n, p in model.named_parameters() if n not in after}
    assert others == {torch.float16 if cast == "half" else torch.bfloat16}
    assert logits(model).isfinite().all()


def test_double_casts_the_adapter_too():
    model = trained().double()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert logits(model).dtype == torch.float64


# ------------------------------------------------------------------------------------------------------ saving, loading


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_adapter_loads_bit_for_bit(name, dtype, low_cpu_mem_usage, tmp_path):
    model = trained(name, dtype)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    own = {key.replace(".default", ""): value for key, value in fvae_parameters(model).items()}
    assert saved.keys() == own.keys()
    assert all(saved[key].dtype == torch.float32 and torch.equal(saved[key], own[key]) for key in saved)
    expected = logits(model.eval())
    for adapter_name in ("default", "other"):
        loaded = PeftModel.from_pretrained(
            tiny_model(name, dtype), tmp_path, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
        )
        parameters = fvae_parameters(loaded)
        assert all(p.dtype == torch.float32 and not p.requires_grad and not p.is_meta for p in parameters.values())
        assert {key.replace(f".{adapter_name}", "") for key in parameters} == saved.keys()
        assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_file_in_16_bit_loads_as_fp32(tmp_path, low_cpu_mem_usage):
    trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    narrow = {key: value.bfloat16() for key, value in load_file(path).items()}
    save_file(narrow, path, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for key, parameter in fvae_parameters(loaded).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, narrow[key.replace(".default", "")].float())


@pytest.mark.parametrize("adapter_name", ODD_NAMES)
def test_any_adapter_name_saves_and_loads(adapter_name, tmp_path):
    model = trained(adapter_name=adapter_name)
    model.save_pretrained(tmp_path)
    (folder,) = {path.parent for path in tmp_path.rglob("adapter_model.safetensors")}
    keys = load_file(folder / "adapter_model.safetensors").keys()
    assert keys == get_peft_model_state_dict(adapted()).keys()
    loaded = PeftModel.from_pretrained(tiny_model("llama"), folder, adapter_name="loaded")
    assert torch.equal(logits(loaded), logits(model.eval()))
    again = PeftModel.from_pretrained(tiny_model("llama"), folder, adapter_name=adapter_name)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("other", ["decoder", "encoder1", "mean", "weight", "0", "layers", "q_proj"])
def test_adapter_name_that_would_lose_parameters_of_another_is_refused(other):
    """PEFT saves `default` by dropping every key with `.NAME.` in it, NAME being any other adapter."""
    model = adapted()
    with pytest.raises(ValueError, match=f"adapter name '{other}'"):
        model.add_adapter(other, tiny_adapter())
    assert set(model.peft_config) == {"default"}
    model.add_adapter("another", tiny_adapter())
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(adapted()).keys()
    with pytest.raises(ValueError, match=f"adapter name '{other}'"):
        adapted(adapter_name=other).add_adapter("another", tiny_adapter())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_auto_class_loads_base_and_adapter(name, low_cpu_mem_usage, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(base, tiny_adapter(task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert isinstance(loaded.peft_config["default"], FVAELoraConfig) and loaded.peft_config["default"].r == 4
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_adapter_trains_only_on_request(is_trainable, tmp_path):
    trained().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=is_trainable)
    assert {p.requires_grad for p in fvae_parameters(loaded).values()} == {is_trainable}


# ----------------------------------------------------------------------------------------------------- several adapters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_several_adapters(name, tmp_path):
    trained(name, r=3).save_pretrained(tmp_path)  # comes in below as "loaded"
    model = trained(name).eval()
    base, default = logits(tiny_model(name)), logits(model)

    model.add_adapter("added", tiny_adapter(r=2, encoder_layers=2))
    assert torch.equal(logits(model), default), "adding one must not touch the active one"
    model.set_adapter("added")
    assert torch.equal(logits(model), base), "a new adapter is exact in evaluation, without another call of eval()"
    randomise_only(model, "added")
    added = logits(model)

    model.load_adapter(tmp_path, "loaded")
    assert torch.equal(logits(model), added)
    model.set_adapter("loaded")
    loaded = logits(model)
    assert torch.equal(loaded, logits(PeftModel.from_pretrained(tiny_model(name), tmp_path)))

    for adapter, expected in {"default": default, "added": added, "loaded": loaded}.items():
        model.set_adapter(adapter)
        assert torch.equal(logits(model), expected) and not torch.equal(expected, base)
        assert {n.split(".fvae_")[1].split(".")[1] for n, p in model.named_parameters() if p.requires_grad} == {adapter}
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), expected)

    model.set_adapter("default")
    model.delete_adapter("added")
    assert set(model.peft_config) == {"default", "loaded"}
    assert not [n for n, _ in model.named_parameters() if ".added." in n]
    for module in model.modules():
        if isinstance(module, FVAELinear):
            assert {*module.r} == {*module.scaling} == {*module.fvae_config} == {"default", "loaded"}
    assert torch.equal(logits(model), default)
    model.set_adapter("loaded")
    assert torch.equal(logits(model), loaded)
    with pytest.raises(ValueError, match="added"):
        model.set_adapter("added")


def randomise_only(model, adapter):
    others = {n: p.detach().clone() for n, p in fvae_parameters(model).items() if f".{adapter}." not in n}
    randomise(model, seed=2)
    with torch.no_grad():
        for name, value in others.items():
            model.get_parameter(name).copy_(value)


def test_adapters_save_side_by_side(tmp_path):
    model = trained()
    model.add_adapter("other", tiny_adapter(r=2))
    randomise_only(model, "other")
    model.save_pretrained(tmp_path)
    for folder, adapter in ((tmp_path, "default"), (tmp_path / "other", "other")):
        model.set_adapter(adapter)
        loaded = PeftModel.from_pretrained(tiny_model("llama"), folder)
        assert torch.equal(logits(loaded), logits(model.eval()))


def test_adapters_on_different_modules_do_not_mix():
    model = trained(target_modules=["q_proj"]).eval()
    default = logits(model)
    model.add_adapter("other", tiny_adapter(target_modules=["k_proj"]))
    randomise_only(model, "other")
    assert torch.equal(logits(model), default)
    model.set_adapter("other")
    only_other = logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert not torch.equal(only_other, both) and not torch.equal(default, both)
    model.delete_adapter("other")
    assert torch.equal(logits(model), default)


# -------------------------------------------------------------------------------------------- modules_to_save, merging


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_modules_to_save_train_and_travel_along(name, tmp_path):
    def base():
        return tiny_model(name, tie_word_embeddings=False)

    torch.manual_seed(0)
    model = randomise(get_peft_model(base(), tiny_adapter(modules_to_save=["lm_head"])))
    head = model.get_output_embeddings().modules_to_save["default"].weight
    assert head.requires_grad
    with torch.no_grad():
        head.mul_(2.0)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.lm_head.weight"], head)
    assert len(saved) == len(fvae_parameters(model)) + 1
    loaded = PeftModel.from_pretrained(base(), tmp_path, adapter_name="other")
    assert torch.equal(logits(loaded), logits(model.eval()))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))


def test_merging_is_refused_and_unloading_gives_the_base_back():
    model = trained().eval()
    expected = logits(tiny_model("llama"))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    base = model.unload()
    assert torch.equal(logits(base), expected)
    assert not [name for name, _ in base.named_modules() if "fvae" in name]


def test_generation_uses_the_adapter():
    model = trained(lora_alpha=400.0).eval()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(input_ids=IDS, **settings)
    expected = IDS
    for _ in range(4):
        with torch.no_grad():
            step = model(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, step], dim=1)
    assert torch.equal(generated, expected[:, : generated.shape[1]]) and generated.shape[1] > IDS.shape[1]
    assert not torch.equal(generated, tiny_model("llama").generate(input_ids=IDS, **settings))


def test_adapted_model_compiles_in_evaluation():
    model = trained().eval()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(compiled), logits(model))
