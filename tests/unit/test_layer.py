import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fvae_dist import side_loss
from fvae_dist.adapter import FVAELinear
from fvae_dist.adapter.layer import linear_features
from fvae_dist.adapter.telemetry import TokenStatistics
from tests.models import randomise, tiny_adapter

D_IN, D_OUT = 6, 5


class Frozen(nn.Module):
    """A base layer as opaque as a quantised one: no weight, no parameter, only sizes and a forward."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = D_IN, D_OUT

    def forward(self, x):
        return torch.stack([x.sum(-1) * (i + 1) for i in range(D_OUT)], dim=-1)


class Int8(Frozen):
    """Integer weights in a buffer, under a name of its own."""

    def __init__(self):
        super().__init__()
        codes = torch.randint(-128, 128, (D_OUT, D_IN), generator=torch.Generator().manual_seed(0))
        self.register_buffer("codes", codes.to(torch.int8))

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) / 128).T


def dynamically_quantised():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(D_IN, D_OUT)))[0]


BASE_LAYERS = {
    "linear": lambda: nn.Linear(D_IN, D_OUT),
    "no_bias": lambda: nn.Linear(D_IN, D_OUT, bias=False),
    "conv1d": lambda: Conv1D(D_OUT, D_IN),
    "frozen_function": Frozen,
    "int8_buffer": Int8,
    "torch_quantised": dynamically_quantised,
}


def adapted(base, name="default", **settings) -> FVAELinear:
    torch.manual_seed(0)
    return randomise(FVAELinear(base, name, tiny_adapter(**settings)))


def inputs(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("kind", BASE_LAYERS)
def test_output_is_base_plus_scaled_update(kind):
    base = BASE_LAYERS[kind]().eval()
    layer, x = adapted(base, lora_alpha=3.0), inputs(2, 3, D_IN)
    z1 = layer.fvae_vae["default"].encoder1.mean_only(x)
    update = 3.0 / (4 + 1e-5) * z1 @ layer.fvae_lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), base(x) + update)
    assert not torch.allclose(layer(x), base(x))


@pytest.mark.parametrize("kind", BASE_LAYERS)
def test_any_base_layer_works_through_peft(kind):
    torch.manual_seed(0)
    base = nn.ModuleDict({"a": BASE_LAYERS[kind](), "b": nn.Linear(D_OUT, 3)}).eval()
    base.forward = lambda x: base["b"](base["a"](x))
    x = inputs(2, 3, D_IN)
    expected = base.forward(x)
    model = get_peft_model(base, tiny_adapter(target_modules=["a"]))
    assert model.base_model.targeted_module_names == ["a"]
    assert torch.equal(model(x), expected)
    randomise(model).train()
    with side_loss.collect(model) as collected:
        loss = model(x).square().mean()
    (loss + collected.neg_elbo).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients and all(g is not None and g.any() for g in gradients.values())
    assert all("fvae_" in name for name in gradients)


@pytest.mark.parametrize(
    ("layer", "features"),
    [
        (nn.Linear(2, 3), (2, 3)),
        (Conv1D(3, 2), (2, 3)),
        (Frozen(), (D_IN, D_OUT)),
        (nn.LayerNorm(3), None),
        (nn.Embedding(3, 2), None),
        (nn.Conv1d(2, 3, 1), None),
        (nn.Bilinear(2, 2, 3), None),
        (nn.ModuleList(), None),
        (nn.MultiheadAttention(4, 2).out_proj, None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_linear_features(layer, features):
    assert linear_features(layer) == features


def test_linear_features_of_a_zero3_shard():
    layer = Conv1D(3, 2)
    layer.weight = nn.Parameter(torch.empty(0))
    layer.weight.ds_shape = torch.Size([2, 3])
    assert linear_features(layer) == (2, 3)


def test_layer_without_features_is_refused():
    with pytest.raises(ValueError, match="LayerNorm has no in_features and out_features"):
        FVAELinear(nn.LayerNorm(3), "default", tiny_adapter())


def test_extra_arguments_reach_the_base_layer():
    class Scaled(Frozen):
        def forward(self, x, factor, *, shift):
            return super().forward(x) * factor + shift

    layer, x = adapted(Scaled().eval()), inputs(2, D_IN)
    update = layer(x, 1, shift=0) - Frozen()(x)
    torch.testing.assert_close(layer(x, 2, shift=1) - update, Frozen()(x) * 2 + 1)


@pytest.mark.parametrize("training", [True, False])
def test_new_adapter_takes_the_mode_of_its_layer(training):
    layer = FVAELinear(nn.Linear(D_IN, D_OUT).train(training), "first", tiny_adapter())
    layer.update_layer("second", tiny_adapter())
    assert layer.training == training
    assert all(module.training == training for vae in layer.fvae_vae.values() for module in vae.modules())


def test_training_adds_noise_and_reports_once():
    layer = adapted(nn.Linear(D_IN, D_OUT), encoder_dropout=0.0).train()
    x = inputs(2, 3, D_IN)
    torch.manual_seed(1)
    with side_loss.collect(layer) as collected:
        first = layer(x)
    second = layer.eval()(x)
    assert not torch.allclose(first, second)
    assert collected.num_tokens == 6 and collected.layer_names == [""]


def test_several_active_adapters_add_up():
    layer, x = adapted(nn.Linear(D_IN, D_OUT).eval(), "a"), inputs(3, D_IN)
    layer.update_layer("b", tiny_adapter(r=2, lora_alpha=4.0))
    randomise(layer, seed=2)
    base = layer.base_layer(x)
    updates = {}
    for name in ("a", "b"):
        layer.set_adapter(name)
        updates[name] = layer(x) - base
    layer.set_adapter(["a", "b"])
    torch.testing.assert_close(layer(x), base + updates["a"] + updates["b"])
    layer.set_adapter([])
    assert torch.equal(layer(x), base)


def test_only_active_adapters_require_gradients():
    layer = adapted(nn.Linear(D_IN, D_OUT), "a")
    layer.update_layer("b", tiny_adapter())
    for active in (["a"], ["b"], ["a", "b"], []):
        layer.set_adapter(active)
        trainable = {n.split(".")[1] for n, p in layer.named_parameters() if "fvae_" in n and p.requires_grad}
        assert trainable == set(active)


def test_disabled_adapters_are_not_computed():
    layer, x = adapted(nn.Linear(D_IN, D_OUT)).train(), inputs(3, D_IN)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "fvae_" in name:
                parameter.fill_(float("nan"))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_output_has_the_dtype_of_the_base_layer(base_dtype, training):
    layer = adapted(nn.Linear(D_IN, D_OUT).to(base_dtype)).train(training)
    with side_loss.collect(layer) as collected:
        assert layer(inputs(3, D_IN, dtype=base_dtype)).dtype == base_dtype
    assert {p.dtype for name, p in layer.named_parameters() if "fvae_" in name} == {torch.float32}
    if training:
        assert collected.neg_elbo.dtype == torch.float32
        assert {value.dtype for value in collected.terms.values()} == {torch.float32}


def test_adapter_is_fp32_under_a_16_bit_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = FVAELinear(nn.Linear(D_IN, D_OUT), "default", tiny_adapter())
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert {p.dtype for name, p in layer.named_parameters() if "fvae_" in name} == {torch.float32}


def test_base_layer_decides_the_dtype_of_the_output():
    class Narrow(Frozen):
        def forward(self, x):
            return super().forward(x).bfloat16()

    assert adapted(Narrow().eval())(inputs(3, D_IN)).dtype == torch.bfloat16


def test_statistics_are_fp32_under_autocast():
    layer = adapted(nn.Linear(D_IN, D_OUT), encoder_dropout=0.0, decoder_dropout=0.0).train()
    x = inputs(3, 65, D_IN)
    outputs = []
    layer.fvae_vae["default"].register_forward_hook(lambda module, args, out: outputs.append(out))

    def collect(autocast):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), side_loss.collect(layer) as collected:
            y = layer(x)
        return y, collected

    y, collected = collect(autocast=True)
    _, exact = collect(autocast=False)
    assert y.dtype == torch.bfloat16
    for name, value in collected.terms.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact.terms[name], rtol=1.6e-2, atol=1e-3)
    # Only the products over D are rounded to bf16: the latents and each term have more than the 8 bits of bf16.
    z1, neg_elbo, *statistics = outputs[0]
    of_tokens = TokenStatistics(*statistics)
    narrow = {id(of_tokens.x), id(of_tokens.xhat), id(of_tokens.squared_error)}
    assert all(value.dtype == torch.float32 for value in outputs[0] if id(value) not in narrow)
    for value in (z1, neg_elbo, *of_tokens[:9]):
        assert (value != value.bfloat16()).float().mean() > 0.9
    sums = collected.sums()
    combined = sums["nll"] + sums["z2_sq"] - sums["z1_sq"] + sums["kl_z1"]
    torch.testing.assert_close(combined, sums["neg_elbo"], rtol=1e-5, atol=0)


def test_evaluation_compiles_in_one_graph():
    layer, x = adapted(nn.Linear(D_IN, D_OUT).eval()), inputs(3, D_IN)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("call", [lambda layer: layer.merge(), lambda layer: layer.unmerge()])
def test_merging_is_refused(call):
    with pytest.raises(ValueError, match="merge"):
        call(adapted(nn.Linear(D_IN, D_OUT)))


def test_replaced_adapter_starts_afresh():
    layer = adapted(nn.Linear(D_IN, D_OUT).eval())
    layer.update_layer("default", tiny_adapter(r=2))
    x = inputs(3, D_IN)
    assert layer.r == {"default": 2} and torch.equal(layer(x), layer.base_layer(x))


def test_meta_base_gives_adapter_that_can_be_loaded():
    with torch.device("meta"):
        layer = FVAELinear(nn.Linear(D_IN, D_OUT), "default", tiny_adapter())
    assert all(parameter.is_meta for parameter in layer.parameters())
