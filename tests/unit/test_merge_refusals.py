"""What cannot be merged, and that nothing has changed after the refusal."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from fvae_dist.adapter import FVAELinear
from tests.adapted import add_trained, assert_same_weights, base_weights, fvae_layers, logits, trained
from tests.models import randomise, tiny_adapter, tiny_model

D_IN, D_OUT = 6, 5


def linear(**settings):
    return trained(encoder_layers=0, **settings)


def refuse(model, message, **settings):
    """No way to merge works, the message says why, and nothing has changed."""
    weights, expected = base_weights(model), logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=message):
            merge(**settings)
        assert not any(layer.merged for layer in fvae_layers(model).values())
        assert_same_weights(base_weights(model), weights)
        assert torch.equal(logits(model), expected)


def test_non_linear_encoder_is_refused_with_what_to_do():
    refuse(
        trained(), r"q_proj: FVAE-LoRA adapter 'default' cannot be merged.*non-linear encoder.*Keep the adapter beside"
    )
    refuse(trained(), r"inference_only=True.*encoder_layers=0")
    with pytest.raises(ValueError, match="non-linear encoder"):
        next(iter(fvae_layers(trained()).values())).merge()


def test_one_layer_that_cannot_be_merged_stops_all():
    model = add_trained(linear(target_modules=["q_proj"]), "other", target_modules=["v_proj"])
    model.base_model.set_adapter(["default", "other"])
    refuse(model, r"layers\.0\.self_attn\.v_proj: FVAE-LoRA adapter 'other'")
    refuse(model, r"v_proj: FVAE-LoRA adapter 'other'", adapter_names=["default", "other"])
    model.merge_adapter(adapter_names=["default"])
    model.unmerge_adapter()


def test_broken_adapter_is_refused_by_a_safe_merge():
    model = linear()
    *_, last = fvae_layers(model).values()
    with torch.no_grad():
        last.fvae_lora_B["default"].weight[0, 0] = float("inf")
    weights = base_weights(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj: NaN or infinite values.*default"):
            merge(safe_merge=True)
        assert_same_weights(base_weights(model), weights)
    model.merge_adapter()
    assert last.merged


def test_overflow_in_16_bit_is_refused_by_a_safe_merge():
    layer = randomise(FVAELinear(nn.Linear(D_IN, D_OUT).half(), "default", tiny_adapter(encoder_layers=0)))
    layer.scaling["default"] = 1e6
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.merge(safe_merge=True)
    layer.scaling["default"] = 1.0
    layer.fvae_vae["default"].encoder1.mean.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.merge(safe_merge=True)


class Packed(nn.Parameter):
    """Stands for a quantised weight: a parameter that says less than its forward knows."""


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 32, 32
        self.weight = nn.Parameter(torch.eye(32), requires_grad=False)

    def forward(self, x):
        return x @ self.weight.exp()


def with_weight(weight) -> nn.Linear:
    layer = nn.Linear(32, 32, bias=False)
    layer.weight = weight
    return layer


def parametrized():
    layer = nn.Linear(32, 32)
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer.requires_grad_(False)


def partitioned():
    layer = nn.Linear(32, 32)
    layer.weight.ds_id = 1
    return layer


UNMERGEABLE = {
    "own_forward": (lambda: OwnForward(32, 32), "a OwnForward, is neither"),
    "opaque": (Opaque, "a Opaque, is neither"),
    "packed": (lambda: with_weight(Packed(torch.eye(32))), "is a Packed of torch.float32, not a plain"),
    "parametrized": (parametrized, "a ParametrizedLinear, is a Tensor of torch.float32, not a plain"),
    "partitioned": (partitioned, "base weight is partitioned by ZeRO-3"),
}


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_base_layer_that_cannot_be_merged_into(kind):
    make, message = UNMERGEABLE[kind]
    base = tiny_model("llama")
    torch.manual_seed(0)
    base.model.layers[1].self_attn.q_proj = make()
    model = randomise(get_peft_model(base, tiny_adapter(encoder_layers=0))).eval()
    refuse(
        model,
        rf"layers\.1\.self_attn\.q_proj: FVAE-LoRA cannot be merged into this layer: .*{message}.*neither quantised",
    )


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(D_OUT, D_IN, dtype=torch.int8), "Parameter of torch.int8, not a plain"),
        (torch.zeros(D_OUT, D_IN, dtype=torch.float8_e4m3fn), "Parameter of torch.float8_e4m3fn, not a plain"),
        (torch.zeros(D_OUT * D_IN // 2, 1), "not a plain floating-point matrix"),
        (torch.zeros(D_IN, D_OUT), "not a plain floating-point matrix"),
        (torch.zeros(D_OUT, D_IN, device="meta"), "on the meta device"),
    ],
    ids=lambda value: str(getattr(value, "dtype", ""))[6:],
)
def test_weight_that_is_no_plain_matrix(weight, message):
    base = nn.Linear(D_IN, D_OUT, bias=False)
    layer = FVAELinear(base, "default", tiny_adapter(encoder_layers=0))
    base.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=message):
        layer.merge()
    assert not layer.merged and base.bias is None


def test_partitioned_adapter_is_refused():
    layer = FVAELinear(nn.Linear(D_IN, D_OUT), "default", tiny_adapter(encoder_layers=0))
    layer.fvae_lora_B["default"].weight.ds_id = 3
    with pytest.raises(ValueError, match="the adapter is partitioned by ZeRO-3"):
        layer.merge()


def test_names_must_exist():
    model = linear()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): typo"):
        model.merge_adapter(adapter_names=["default", "typo"])
    with pytest.raises(TypeError, match="should be a list of strings, got 'default'"):
        model.merge_and_unload(adapter_names="default")
    assert not any(layer.merged for layer in fvae_layers(model).values())
