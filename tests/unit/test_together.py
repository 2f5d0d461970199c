"""Layers that read one input are computed at once by the fused kernels; on CPU in Triton's interpreter."""

import copy

import pytest
import torch

from fvae_dist.adapter import side_loss, together
from fvae_dist.adapter.noise import TokenNoise
from fvae_dist.kernels import launching, passes
from tests.fused import BF16_RTOL, by_products, make_block, run_block, worst
from tests.models import named_gradients

pytestmark = pytest.mark.skipif(
    not launching.kernels().INTERPRETED, reason="Triton's interpreter is off: it is for machines without a GPU"
)
QKV = {"q_proj": 24, "k_proj": 8, "v_proj": 8}
X = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many layers each call of the kernels was for."""
    found: list[int] = []
    real = together.fused_updates

    def counted(call, *args):
        found.append(len(call.salts))
        return real(call, *args)

    monkeypatch.setattr(together, "fused_updates", counted)
    return found


def assert_alike(found, expected) -> None:
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        atol = 2e-5 * float(value.abs().max())
        torch.testing.assert_close(found[0][name], value, rtol=2e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("terms", [False, True])
@pytest.mark.parametrize(
    ("widths", "settings"),
    [
        (QKV, {"lora_alpha": 12}),
        ({"gate_proj": 40, "up_proj": 40}, {}),
        ({"q_proj": 24, "v_proj": 8}, {"latent_fusion": "average", "decoder_layers": 1}),
        ({"query": 8, "other": 8, "value": 8}, {}),
    ],
    ids=str,
)
def test_they_are_what_each_would_be_alone(calls, widths, settings, terms):
    expected = run_block(make_block(20, widths, "torch", **settings), X, terms=terms)
    found = run_block(make_block(20, widths, "fused", **settings), X, terms=terms)
    assert_alike(found, expected)
    assert calls == ([2, 1] if "other" in widths else [len(widths)])


def narrow_block() -> torch.nn.Module:
    model = make_block(20, QKV, "fused")
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("rows", [16, 4])  # all ten tokens, and parts of which the last is short
def test_backward_by_products_is_that_of_tiles(calls, rows):
    model = narrow_block()
    of_tiles, _ = run_block(model, X.bfloat16())
    with by_products(rows):
        found, _ = run_block(model, X.bfloat16())
    error, name = worst(found, {name: value.double() for name, value in of_tiles.items()})
    assert error < BF16_RTOL, name
    assert calls == [3, 3]


def test_a_compiled_model_runs(calls, monkeypatch):
    """torch.compile leaves what it cannot trace to Python; the interpreter is not its business."""
    monkeypatch.setattr(launching.Launch, "__call__", lambda self, stream, *arguments, **kinds: None)
    compiled = torch.compile(narrow_block(), backend="eager")
    sum(output.float().sum() for output in compiled(X.bfloat16())).backward()
    assert sum(calls) >= 3


def add_bias(base: torch.nn.Linear) -> None:
    base.bias = torch.nn.Parameter(torch.full((base.out_features,), 0.5), requires_grad=False)


def add_hook(base: torch.nn.Linear) -> None:
    base.register_forward_hook(lambda module, args, output: output + 1)


def add_gradient_hook(base: torch.nn.Linear) -> None:
    base.register_full_backward_hook(lambda module, of_inputs, of_outputs: (3 * of_inputs[0],))


def train_too(base: torch.nn.Linear) -> None:
    base.weight.requires_grad_()


def replace_forward(base: torch.nn.Linear) -> None:
    base.forward = lambda x: 2 * torch.nn.functional.linear(x, base.weight)  # as accelerate's hooks do


@pytest.mark.parametrize("change", [add_bias, add_hook, add_gradient_hook, train_too, replace_forward])
def test_a_base_layer_that_does_more_than_multiply_is_called(change):
    models = [make_block(20, QKV, kernel) for kernel in ("torch", "fused")]
    before = run_block(models[0], X)[0]
    for model in models:
        base = model.base_model.model.k_proj.base_layer
        assert together._plain_weight(base, torch.float32) is base.weight
        change(base)
        assert together._plain_weight(base, torch.float32) is None
    expected = run_block(models[0], X)
    assert_alike(run_block(models[1], X), expected)
    # The change changes something.
    assert expected[0].keys() != before.keys() or any(not torch.equal(expected[0][n], before[n]) for n in before)


def test_saved_tensors_may_come_back_inside_of_another():
    """As a hook that keeps many of them in one buffer gives them back; 16 bytes in, where kernels may read them."""

    def inside(tensor: torch.Tensor) -> torch.Tensor:
        first = 16 // tensor.itemsize
        return torch.cat([tensor.new_full((first,), 7), tensor.flatten()])[first:].view(tensor.shape)

    model = make_block(20, QKV, "fused")
    expected = run_block(model, X)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, inside):
        found = run_block(model, X)[0]
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_losses_need_not_stand_in_one_block(monkeypatch):
    """The collector's gradients do, and are read where they are."""
    found: list[bool] = []
    real = passes._is_one_block
    monkeypatch.setattr(passes, "_is_one_block", lambda *args: found.append(real(*args)) or found[-1])
    gradients = []
    for is_collected in (True, False):
        model = make_block(20, QKV, "fused")
        noise = TokenNoise({"input_ids": torch.arange(16).view(2, 8)}, seed=1, step=2)
        x = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(3))
        with side_loss.collect(model, noise=noise, terms=False) as collected:
            model(x)
        losses = [report.neg_elbo for report in collected._reports]
        (collected.neg_elbo_sum if is_collected else sum(loss.sum() for loss in losses) / 3).backward()
        gradients.append(named_gradients(model))
    assert found == [True, False]
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


def test_a_weight_that_changes_before_the_backward_is_an_error():
    model = make_block(20, QKV, "fused")
    with side_loss.collect(model):
        outputs = model(X.clone().requires_grad_())
    weight = model.base_model.model.k_proj.base_layer.weight
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        outputs[0].sum().backward()


def test_a_layer_with_another_input_computes_alone(calls):
    other = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(4))
    expected = run_block(make_block(20, QKV, "torch"), X, other)
    assert_alike(run_block(make_block(20, QKV, "fused"), X, other), expected)
    assert calls == [3, 1]


def test_an_input_of_equal_values_is_another_one(calls):
    """Its gradient goes elsewhere."""
    model = make_block(20, QKV, "fused")
    assert_alike(run_block(model, X, X.clone()), run_block(make_block(20, QKV, "torch"), X, X.clone()))
    assert calls == [3, 1]


def test_unlike_layers_are_not_joined(calls):
    models = [make_block(20, QKV, kernel) for kernel in ("torch", "fused")]
    for model in models:
        model.base_model.model.k_proj.scaling["default"] = 0.25
    expected, found = (run_block(model, X) for model in models)
    assert_alike(found, expected)
    assert calls == [2, 1]


def test_disabled_and_evaluated_layers_are_left_alone(calls):
    models = [make_block(20, QKV, kernel) for kernel in ("torch", "fused")]
    for model in models:
        with model.disable_adapter():
            plain = model(X)
        expected = [torch.nn.functional.linear(X, getattr(model.base_model.model, n).base_layer.weight) for n in QKV]
        assert all(torch.equal(a, b) for a, b in zip(plain, expected, strict=True))
    evaluated = [model.eval()(X) for model in models]
    assert all(torch.equal(a, b) for a, b in zip(*evaluated, strict=True))
    assert calls == []


def test_a_copy_follows_its_own_layers(calls):
    model = make_block(20, QKV, "fused")
    twin = copy.deepcopy(model)
    inner = twin.base_model.model
    assert inner.q_proj.followers == (inner.k_proj, inner.v_proj)
    assert_alike(run_block(twin, X), run_block(model, X))


def test_what_is_ahead_counts_under_the_same_circumstances_only():
    model = make_block(20, QKV, "fused")
    inner = model.base_model.model
    plain = inner.v_proj.base_layer
    with torch.no_grad():
        inner.q_proj(X)
        with model.disable_adapter():
            assert torch.equal(inner.v_proj(X), plain(X))
        x = X.clone()
        inner.q_proj(x)
        stale = inner.v_proj.inbox.ahead.output
        x += 1
        assert not torch.allclose(inner.v_proj(x), stale)
        inner.q_proj(x)
        twin = copy.deepcopy(model)
    assert twin.base_model.model.v_proj.inbox.ahead is None
    assert inner.v_proj(x).requires_grad  # what is ahead was computed without a graph


def test_nothing_is_kept_for_a_layer_that_is_not_called():
    model = make_block(20, QKV, "fused")
    inner = model.base_model.model
    with torch.no_grad():
        inner.q_proj(X)
        assert inner.v_proj.inbox.ahead is not None
        model(X)
    assert all(getattr(inner, name).inbox.ahead is None for name in QKV)
