import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from fvae_dist import side_loss
from fvae_dist.adapter import FVAELinear, layer_forward, vae
from fvae_dist.adapter.noise import TokenNoise
from tests.models import ARCHITECTURES, LayerModel, named_gradients, randomise, tiny_adapter, tiny_model, token_ids

NO_DROPOUT = {"encoder_dropout": 0.0, "decoder_dropout": 0.0}
NO_BASE_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
TERMS = {
    "nll",
    "kl_z1",
    "z1_sq",
    "z2_sq",
    "neg_elbo",
    "gamma",
    "wasserstein",
    "active_z1",
    "active_z2",
    "r2",
    "clamped",
}


def adapted(name="llama", dtype=torch.float32, **settings):
    """An adapted model in training mode, dropout and all."""
    torch.manual_seed(0)
    return randomise(get_peft_model(tiny_model(name, dtype), tiny_adapter(**settings))).train()


@pytest.fixture
def without_noise(monkeypatch):
    """Builds adapted models whose training forward is deterministic: no dropout, and eps = 0."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)

    def build(name="llama", **settings):
        torch.manual_seed(0)
        base = tiny_model(name, **NO_BASE_DROPOUT.get(name, {}))
        return randomise(get_peft_model(base, tiny_adapter(**NO_DROPOUT, **settings))).train()

    return build


def gradients(model):
    found = named_gradients(model)
    assert found
    model.zero_grad()
    return found


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------- what is reported


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_terms_have_names_and_shapes_and_are_detached(name):
    model = adapted(name)
    with side_loss.collect(model) as collected:
        model(token_ids())
    num_layers = len(collected.layer_names)
    assert num_layers == (2 if name == "gpt2" else 4)
    assert [n for n, m in model.named_modules() if isinstance(m, FVAELinear)] == collected.layer_names
    assert set(collected.terms) == TERMS
    for value in collected.terms.values():
        assert value.shape == (num_layers,) and value.dtype == torch.float32 and not value.requires_grad
    assert collected.neg_elbo.shape == () and collected.neg_elbo.requires_grad
    assert collected.num_tokens == 14


# Settings, and the negative ELBO from the terms.
OBJECTIVES = {
    "official": (
        {"reconstruction_weight": 0.5, "z1_weight": 2.0, "z2_weight": 3.0, "kl_weight": 4.0},
        lambda terms: 0.5 * terms["nll"] + 3 * terms["z2_sq"] - 2 * terms["z1_sq"] + 4 * terms["kl_z1"],
    ),
    "paper": (
        {"reconstruction_weight": 0.5, "factorization_weight": 0.7, "kl_weight": 4.0, "z2_prior_std": 1.3},
        lambda terms: 0.5 * terms["nll"] + 4 * terms["kl_z1"] - 0.7 * terms["gamma"],
    ),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_neg_elbo_is_the_combination_of_the_terms(reduction, objective):
    weights, combine = OBJECTIVES[objective]
    model = adapted(side_loss_reduction=reduction, objective=objective, **weights)
    with side_loss.collect(model, token_mask=torch.tensor([[1, 1, 0, 1, 0, 0, 1], [1] * 7])) as collected:
        model(token_ids())
    per_layer = combine(collected.terms)
    torch.testing.assert_close(collected.terms["neg_elbo"], per_layer, rtol=1e-5, atol=0)
    total = per_layer.sum() if reduction == "sum" else per_layer.mean()
    torch.testing.assert_close(collected.neg_elbo.detach(), total, rtol=1e-5, atol=0)
    torch.testing.assert_close(collected.neg_elbo_sum, collected.neg_elbo * 11, rtol=1e-5, atol=0)


@pytest.mark.parametrize("objective", ["official", "paper", "vae2lat", "beta_vae2lat"])
def test_sum_over_layers_is_their_number_times_the_mean(objective):
    values, found = [], []
    for reduction in ("mean", "sum"):
        model = adapted(side_loss_reduction=reduction, objective=objective)
        torch.manual_seed(5)
        with side_loss.collect(model) as collected:
            model(token_ids())
        collected.neg_elbo.backward()
        values.append(collected.neg_elbo.detach())
        found.append(gradients(model))
    torch.testing.assert_close(values[1], 4 * values[0], rtol=1e-5, atol=0)
    assert_same(found[1], {name: 4 * gradient for name, gradient in found[0].items()}, rtol=1e-5, atol=1e-6)


def test_layer_configs_are_those_of_the_reporting_layers():
    model = adapted()
    model.add_adapter("small", tiny_adapter(r=2))
    model.base_model.set_adapter(["default", "small"])
    with side_loss.collect(model) as collected:
        model(token_ids())
    assert [config.r for config in collected.layer_configs] == [4, 2] * 4
    assert collected.layer_configs[0] is model.peft_config["default"]


@pytest.mark.filterwarnings("ignore:FVAE-LoRA layers ran")
def test_terms_can_be_left_out_and_are_then_not_computed(monkeypatch):
    calls = []
    for module, name in ((vae, "token_statistics"), (side_loss, "sums_over_tokens")):
        original = getattr(module, name)
        counted = lambda *args, original=original, name=name: calls.append(name) or original(*args)  # noqa: E731
        monkeypatch.setattr(module, name, counted)
    model, ids = adapted(), token_ids()
    with side_loss.collect(model, terms=False) as collected:
        model(ids)
    assert calls == [] and set(collected.sums()) == {"num_tokens"}
    with pytest.raises(ValueError, match="terms=False"):
        _ = collected.terms
    model(ids)  # nor without a collector
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    with side_loss.collect(model) as collected:
        model(ids, use_cache=False)
        assert calls == ["token_statistics"] * 4
        collected.neg_elbo.backward()
        collected.sums()
    assert calls[4:] == ["sums_over_tokens"]  # layers of one shape together, and none for the recomputation


@pytest.mark.parametrize("checkpointed", [False, True])
def test_terms_change_no_bit_of_outputs_and_gradients(checkpointed):
    results = []
    for terms in (True, False):
        model = adapted()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(3)
        with side_loss.collect(model, terms=terms) as collected:
            logits = model(token_ids(), use_cache=False).logits
        (logits.square().mean() + collected.neg_elbo).backward()
        results.append({"logits": logits, "neg_elbo": collected.neg_elbo, **gradients(model)})
    assert_same(*results, rtol=0, atol=0)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_detached_input_changes_only_the_side_loss_gradient_of_the_input(dropout, by_token):
    noise = TokenNoise({"input_ids": token_ids(1, 5)}, seed=0, step=0) if by_token else None
    found = {}
    for detach in (False, True):
        settings = {"encoder_dropout": dropout, "decoder_dropout": dropout, "detach_input": detach}
        torch.manual_seed(0)
        layer = randomise(FVAELinear(nn.Linear(6, 5), "default", tiny_adapter(**settings))).double().train()
        model = LayerModel(layer)
        for loss in ("task", "side", "both"):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
            torch.manual_seed(3)
            with side_loss.collect(model, noise=noise) as collected:
                y = model(x)
            task = 10 * y.square().mean()
            {"task": task, "side": collected.neg_elbo, "both": task + collected.neg_elbo}[loss].backward()
            of_x = torch.zeros_like(x) if x.grad is None else x.grad
            found[detach, loss] = y.detach(), collected.neg_elbo.detach(), of_x, gradients(layer)
    for loss in ("task", "side", "both"):
        (*values, of_x, of_parameters), (*expected, _, expected_of_parameters) = found[True, loss], found[False, loss]
        assert all(map(torch.equal, values, expected))
        assert torch.equal(of_x, torch.zeros_like(of_x) if loss == "side" else found[False, "task"][2])
        assert_same(of_parameters, expected_of_parameters, rtol=1e-12, atol=1e-14)
    assert found[False, "side"][2].any()


def test_active_adapters_of_different_rank_report_side_by_side():
    model = adapted(**NO_DROPOUT)
    model.add_adapter("small", tiny_adapter(r=2, side_loss_reduction="sum", **NO_DROPOUT))
    model.base_model.set_adapter(["default", "small"])
    with side_loss.collect(model) as collected:
        model(token_ids())
    per_layer = collected.terms["neg_elbo"]
    small = torch.tensor([False, True] * 4)
    assert collected.terms["active_z1"].shape == (8,) and len(collected.layer_names) == 8
    expected = per_layer[~small].mean() + per_layer[small].sum()
    torch.testing.assert_close(collected.neg_elbo.detach(), expected, rtol=1e-5, atol=0)


def test_bf16_model_has_fp32_side_loss_and_gradients():
    model = adapted(dtype=torch.bfloat16)
    with side_loss.collect(model) as collected:
        model(token_ids())
    assert collected.neg_elbo.dtype == torch.float32
    collected.neg_elbo.backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------------- checkpointing


def step(model, ids, seed=3):
    """One training step from a seed; (loss, neg_elbo, terms, gradients)."""
    torch.manual_seed(seed)
    with side_loss.collect(model) as collected:
        out = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        before = {key: value.clone() for key, value in collected.sums().items()}
        neg_elbo = collected.neg_elbo
        (10 * out.loss + neg_elbo).backward()  # inside the block: recomputation must not report again
        assert_same(collected.sums(), before, rtol=0, atol=0)
    return out.loss.detach(), neg_elbo.detach(), before, gradients(model)


@pytest.mark.parametrize("enable", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_checkpointing_changes_no_bit(name, enable):
    model, ids = adapted(name), token_ids()
    plain = step(model, ids)
    calls = []
    next(m for m in model.modules() if isinstance(m, FVAELinear)).register_forward_hook(lambda *_: calls.append(1))
    if enable == "gradient_checkpointing_enable":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif not hasattr(model, enable):
        pytest.skip("transformers < 5.23 has gradient_checkpointing_enable alone")
    else:
        model.activation_checkpointing_enable()
    checkpointed = step(model, ids)
    assert len(calls) == 2, "the layer was not recomputed: this test would compare nothing"
    assert torch.equal(plain[0], checkpointed[0]) and torch.equal(plain[1], checkpointed[1])
    assert_same(plain[2], checkpointed[2], rtol=0, atol=0)
    assert_same(plain[3], checkpointed[3], rtol=0, atol=0)
    other = step(model, ids, seed=4)
    assert not torch.equal(other[1], checkpointed[1]), "the noise does not depend on the seed"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reentrant_checkpointing_is_refused(name):
    model = adapted(name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match=r"no gradient.*reentrant"), side_loss.collect(model):
        model(token_ids(), use_cache=False)


class Checkpointed(nn.Module):
    """Wraps a layer in one checkpointed region."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


def saved_bytes(function) -> int:
    """Bytes of the distinct tensors that autograd saves for backward while `function` runs, parameters left out."""
    sizes = {}

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would tie its graph into a cycle

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_checkpointed_side_loss_saves_no_activation(name):
    """Between forward and backward it keeps some numbers per token and layer, never a T x D tensor of a layer."""
    model, ids = adapted(name), token_ids(2, 32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    keep = []

    def forward(collect):
        with side_loss.collect(model) as collected:
            keep.append(model(input_ids=ids, labels=ids, use_cache=False).loss)
            if collect:
                keep.append(collected.neg_elbo)

    with model.disable_adapter():
        base = saved_bytes(lambda: forward(collect=False))
    ours = saved_bytes(lambda: forward(collect=True))
    num_layers, num_tokens, features = len(model.base_model.targeted_module_names), ids.numel(), 32
    assert ours - base <= num_layers * num_tokens * 4 * 2 + 256 < num_tokens * features * 4
    model.gradient_checkpointing_disable()
    assert saved_bytes(lambda: forward(collect=True)) - base > num_layers * num_tokens * features * 4


def tensors_of_graphs() -> dict[int, torch.Tensor]:
    """Every living tensor that hangs on an autograd graph."""
    return {id(t): t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.grad_fn is not None}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_is_kept_alive(checkpointed):
    model, ids = adapted(), token_ids()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seen = []
    for module in model.modules():
        if isinstance(module, FVAELinear):
            module.fvae_vae["default"].register_forward_hook(
                lambda _, x, out: seen.extend(weakref.ref(t) for t in (*x, *out) if torch.is_tensor(t))
            )
    gc.collect()
    before = tensors_of_graphs()
    gc.disable()  # reference counts alone must do: a cycle would hold activations until some later collection
    try:
        with side_loss.collect(model) as collected:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss + collected.neg_elbo
        loss.backward()
        del loss, collected
        assert len(seen) == 4 * (15 + (3 if checkpointed else 0))  # recomputation returns no statistics
        assert [ref for ref in seen if ref() is not None] == []
    finally:
        gc.enable()
    assert not tensors_of_graphs().keys() - before.keys()
    assert side_loss._open_collectors == [] and not model.get_base_model()._forward_pre_hooks


# ------------------------------------------------------------------------------------------- accumulation and padding


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_accumulation_equals_one_batch(without_noise, name, reduction):
    model, ids = without_noise(name, side_loss_reduction=reduction), token_ids(4)
    lengths = torch.tensor([7, 2, 5, 3])
    mask = (torch.arange(7) < lengths[:, None]).long()

    with side_loss.collect(model) as collected:
        model(input_ids=ids, attention_mask=mask)
    collected.neg_elbo.backward()
    whole, expected = collected.neg_elbo.detach(), gradients(model)

    total = torch.zeros(())
    for part, part_mask in zip(ids.split([1, 3]), mask.split([1, 3])):
        with side_loss.collect(model) as collected:
            model(input_ids=part, attention_mask=part_mask)
        share = collected.neg_elbo_sum / lengths.sum()
        share.backward()
        total += share.detach()
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=0)
    assert_same(gradients(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_does_not_count(without_noise, name, side):
    model = without_noise(name).double()  # in fp32 the last bits depend on shapes and threads
    sequences = [token_ids(1, 7, seed=1), token_ids(1, 3, seed=2)]
    total = torch.zeros((), dtype=torch.double)
    for ids in sequences:
        with side_loss.collect(model) as collected:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        share = collected.neg_elbo_sum / 10
        share.backward()
        total += share.detach()
    expected = gradients(model)

    width = 9
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        length = sequence.shape[1]
        columns = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, columns], mask[row, columns] = sequence[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with side_loss.collect(model) as collected:
        model(input_ids=ids, attention_mask=mask, position_ids=positions)
    collected.neg_elbo.backward()
    assert collected.num_tokens == 10
    torch.testing.assert_close(collected.neg_elbo.detach(), total, rtol=1e-5, atol=0)
    assert_same(gradients(model), expected, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- masks

MASK = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("how", "num_tokens"),
    [
        (lambda m, ids: m(input_ids=ids, attention_mask=MASK), 8),
        (lambda m, ids: m(ids, attention_mask=MASK.bool()), 8),
        (lambda m, ids: m.get_base_model()(ids, attention_mask=MASK), 8),
        (lambda m, ids: m(ids), 14),
        (lambda m, ids: m(ids, attention_mask=None), 14),
    ],
    ids=["keyword", "bool", "base_model", "absent", "none"],
)
def test_mask_defaults_to_that_of_the_forward(how, num_tokens):
    model = adapted()
    with side_loss.collect(model) as collected:
        how(model, token_ids())
    assert collected.num_tokens == num_tokens


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mask_passed_by_position_is_found(name, task_type):
    model = adapted(name, task_type=task_type)
    # Without a task type PEFT hands its arguments on as they are: GPT-2 takes the mask third.
    args = (token_ids(), None, MASK) if name == "gpt2" and task_type is None else (token_ids(), MASK)
    with side_loss.collect(model) as collected:
        model(*args)
    assert collected.num_tokens == 8


def test_explicit_mask_wins_over_that_of_the_forward():
    model, mask = adapted(), torch.zeros(2, 7)
    mask[0, 1] = 1
    with side_loss.collect(model, token_mask=mask) as collected:
        model(token_ids(), attention_mask=MASK)
    assert collected.num_tokens == 1


def test_mask_changes_only_what_counts(without_noise):
    model, ids = without_noise(), token_ids()
    values = []
    for rows in ([1, 0], [0, 1], [1, 1]):
        mask = torch.tensor(rows)[:, None].expand(2, 7)
        with side_loss.collect(model, token_mask=mask) as collected:
            out = model(ids)
        values.append((collected.neg_elbo_sum.detach(), out.logits.detach()))
    torch.testing.assert_close(values[0][0] + values[1][0], values[2][0], rtol=1e-5, atol=0)
    assert torch.equal(values[0][1], values[1][1])


def test_mask_that_says_nothing_of_tokens_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="token_mask="), side_loss.collect(model):
        model(token_ids(), attention_mask=torch.ones(2, 1, 7, 7))
    with side_loss.collect(model, token_mask=MASK) as collected:
        model(token_ids(), attention_mask=torch.zeros(2, 1, 7, 7))
    assert collected.num_tokens == 8


def test_mask_of_another_size_is_refused():
    model = adapted()
    refused = pytest.raises(ValueError, match="q_proj saw 14 tokens where the token mask has 12")
    with refused, side_loss.collect(model, token_mask=torch.ones(2, 6)):
        model(token_ids())


def test_empty_mask_is_an_error_but_an_empty_share_is_zero():
    model = adapted()
    with side_loss.collect(model, token_mask=torch.zeros(2, 7)) as collected:
        model(token_ids())
    for read in (lambda: collected.neg_elbo, lambda: collected.terms):
        with pytest.raises(ValueError, match="no token counts"):
            read()
    assert collected.num_tokens == 0 and collected.neg_elbo_sum == 0
    collected.neg_elbo_sum.backward()
    assert not any(gradient.any() for gradient in gradients(model).values())


# ---------------------------------------------------------------------------------------------- blocks, models, misuse


@pytest.mark.parametrize("read", ["neg_elbo", "neg_elbo_sum", "num_tokens", "terms", "sums"])
@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: model.eval(),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.base_model.set_adapter([]),
    ],
    ids=["evaluation", "disabled", "inactive"],
)
def test_block_without_reports_is_an_error(prepare, read):
    model = adapted()
    prepare(model)
    with side_loss.collect(model) as collected:
        model(token_ids())
    with pytest.raises(ValueError, match=r"training mode \(model.train\(\)\)"):
        value = getattr(collected, read)
        value()


def test_two_forwards_in_one_block_add_up(without_noise):
    model, ids = without_noise(), token_ids()
    single = []
    for row in ids.split(1):
        with side_loss.collect(model) as collected:
            model(row, attention_mask=torch.ones_like(row))
        single.append(collected)
    with side_loss.collect(model) as both:
        for row in ids.split(1):
            model(row, attention_mask=torch.ones_like(row))
    assert both.num_tokens == 14
    torch.testing.assert_close(both.neg_elbo, (single[0].neg_elbo + single[1].neg_elbo) / 2)
    torch.testing.assert_close(both.terms["nll"], (single[0].terms["nll"] + single[1].terms["nll"]) / 2)


def test_mask_of_one_forward_does_not_reach_the_next():
    model = adapted()
    with side_loss.collect(model) as collected:
        model(token_ids(), attention_mask=MASK)
        model(token_ids(1, 3))
    assert collected.num_tokens == 8 + 3


def test_each_model_reports_to_its_own_collector():
    first, second = adapted("llama"), adapted("gpt2")
    with side_loss.collect(first) as of_first, side_loss.collect(second) as of_second:
        first(token_ids(2, 5))
        second(token_ids(3, 4))
    assert (of_first.num_tokens, of_second.num_tokens) == (10, 12)
    assert not set(of_first.layer_names) & set(of_second.layer_names)


def test_innermost_collector_of_a_model_takes_the_report():
    model = adapted()
    with side_loss.collect(model) as outer:
        model(token_ids(1, 2))
        with side_loss.collect(model) as inner:
            model(token_ids(1, 3))
        model(token_ids(1, 4))
    assert (outer.num_tokens, inner.num_tokens) == (6, 3)


def test_model_inside_another_is_found():
    wrapper = nn.ModuleDict({"model": adapted()})
    wrapper.forward = lambda input_ids, attention_mask: wrapper["model"](input_ids, attention_mask=attention_mask)
    with side_loss.collect(wrapper) as collected:
        wrapper(token_ids(), MASK)
    assert collected.num_tokens == 8 and collected.layer_names[0].startswith("model.base_model.")


def test_collector_closes_after_an_exception():
    model = adapted()
    with pytest.raises(KeyError), side_loss.collect(model):
        raise KeyError
    assert side_loss._open_collectors == [] and not model.get_base_model()._forward_pre_hooks


def test_lost_gradient_is_an_error():
    layer = FVAELinear(nn.Linear(6, 5), "default", tiny_adapter()).train()
    with pytest.raises(RuntimeError, match="no gradient"), side_loss.collect(layer), torch.no_grad():
        layer(torch.ones(2, 6))


def test_no_gradient_is_no_error_where_none_is_wanted():
    layer = FVAELinear(nn.Linear(6, 5), "default", tiny_adapter()).train()
    with torch.no_grad(), side_loss.collect(layer) as collected:
        layer(torch.ones(2, 6))
    assert not collected.neg_elbo.requires_grad
    layer.requires_grad_(False)
    with side_loss.collect(layer) as collected:
        layer(torch.ones(2, 6))
    assert not collected.neg_elbo.requires_grad


def test_training_without_a_collector_warns_once(monkeypatch, recwarn):
    monkeypatch.setattr(layer_forward, "_warned_uncollected", False)
    model = adapted()
    model(token_ids())
    model(token_ids())
    assert sum("nothing collects their side loss" in str(warning.message) for warning in recwarn) == 1


def test_hand_checkpointed_layer_equals_plain():
    layer = randomise(FVAELinear(nn.Linear(6, 5), "default", tiny_adapter())).train()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    results = []
    for module in (nn.Sequential(layer), Checkpointed(layer)):
        torch.manual_seed(0)
        with side_loss.collect(module) as collected:
            (module(x).square().sum() + collected.neg_elbo).backward()
        results.append(gradients(layer))
    assert_same(*results, rtol=0, atol=0)
