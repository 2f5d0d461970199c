import copy

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from fvae_dist import side_loss
from fvae_dist.adapter import FVAELinear
from fvae_dist.adapter.noise import TokenNoise
from fvae_dist.adapter.telemetry import TokenStatistics, sums_over_tokens, terms_from_sums
from tests.models import LayerModel, randomise, tiny_adapter, token_ids

D, R = 6, 4
NAME = "layer/default"  # by which noise knows the adapter of a `LayerModel`
OBJECTIVES = ("official", "paper", "vae2lat", "beta_vae2lat")
MASK = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])


def adapted(dtype=torch.float32, **settings) -> LayerModel:
    torch.manual_seed(0)
    settings = {"encoder_dropout": 0.0, "decoder_dropout": 0.0, "z2_prior_std": 1.3, **settings}
    return LayerModel(randomise(FVAELinear(nn.Linear(D, 5), "default", tiny_adapter(**settings)))).to(dtype).train()


def inputs(*shape, seed=0):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def ids_for(*shape):
    return torch.arange(torch.Size(shape).numel()).view(shape)


def collected_terms(model, x, mask=None):
    noise = TokenNoise({"input_ids": ids_for(*x.shape[:-1])}, 0, 0)
    with side_loss.collect(model, token_mask=mask, noise=noise) as collected:
        model(x)
    return collected.terms


def direct_terms(model, x, mask=None):
    """Every term over the counted tokens alone, in float64, from the layer's parts and torch.distributions."""
    vae = copy.deepcopy(model.layer.fvae_vae["default"]).double()
    config, x = vae.config, x.double()
    stream = TokenNoise({"input_ids": ids_for(*x.shape[:-1])}, 0, 0).of_layer(NAME, x[..., 0].numel())
    eps1, eps2, _ = stream.draw(x.new_empty(*x.shape[:-1], config.r), [])
    counted = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask.bool()
    x, eps1, eps2 = (tensor[counted] for tensor in (x, eps1, eps2))
    (mean1, logvar1), (mean2, logvar2) = vae.encoder1(x), vae.encoder2(x)
    q1, q2 = (Normal(mean, logvar.mul(0.5).exp()) for mean, logvar in ((mean1, logvar1), (mean2, logvar2)))
    z1, z2 = q1.mean + q1.stddev * eps1, q2.mean + q2.stddev * eps2
    xhat = vae.decoder.output(vae.decoder(z1, z2, x, [None] * config.decoder_layers)[1])
    p1, p2 = (Normal(*torch.tensor(p).double()) for p in ((0.0, 1.0), (config.z2_prior_mean, config.z2_prior_std)))
    mu2 = config.z2_prior_mean
    distance = (mean1 - mean2).square().sum(-1) + (q1.stddev - q2.stddev).square().sum(-1)
    variances1, variances2 = (mean.var(0, correction=0) for mean in (mean1, mean2))
    limits = torch.stack([logvar1.abs() == 20, logvar2.abs() == 20])
    terms = {
        "nll": -Normal(xhat, vae.decoder.scale + 1e-5).log_prob(x).sum(-1).mean(),
        "kl_z1": kl_divergence(q1, p1).sum(-1).mean(),
        "z1_sq": z1.square().mean(),
        "z2_sq": (z2 - mu2).square().mean(),
        "gamma": (p2.log_prob(z2) - p1.log_prob(z1)).sum(-1).mean(),
        "wasserstein": distance.sqrt().mean(),
        "active_z1": (variances1 > 0.01).sum(),
        "active_z2": (variances2 > 0.01).sum(),
        "r2": 1 - (x - xhat).square().sum() / (x - x.mean(0)).square().sum(),
        "clamped": limits.double().mean(),
    }
    kl_z2 = kl_divergence(q2, p2).sum(-1).mean()
    terms["neg_elbo"] = {
        "official": terms["nll"] + terms["kl_z1"] + terms["z2_sq"] - terms["z1_sq"],
        "paper": terms["nll"] + terms["kl_z1"] - 0.1 * terms["gamma"],
        "vae2lat": terms["nll"] + terms["kl_z1"] + kl_z2,
        "beta_vae2lat": terms["nll"] + terms["kl_z1"] + kl_z2,
    }[config.objective]
    return {name: value.detach().float()[None] for name, value in terms.items()}


def assert_terms(terms, expected, rtol=1e-4, atol=1e-4):
    assert terms.keys() == expected.keys()
    for name in expected:
        assert not terms[name].requires_grad and terms[name].dtype == torch.float32, name
        torch.testing.assert_close(terms[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------------------------------------- each term


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("settings", [{}, {"latent_fusion": "average", "encoder_shared_trunk": False}], ids=str)
def test_terms_are_those_of_the_counted_tokens(settings, objective, mask):
    model, x = adapted(**settings, objective=objective), inputs(3, 5)
    expected = direct_terms(model, x, mask)
    if mask is not None:
        x[~mask.bool()] *= 1000  # padding
    assert_terms(collected_terms(model, x, mask), expected)


@pytest.mark.parametrize(
    ("biases", "share"),
    [([0, 0, 0, 0], 0.0), ([25, 0, 0, 0], 0.25), ([25, -1e4, 0, 0], 0.5), ([30, 30, -30, -30], 1.0)],
    ids=str,
)
@pytest.mark.parametrize("encoder", ["encoder1", "encoder2"])
def test_clamped_is_the_share_of_both_encoders_log_variances(encoder, biases, share):
    model, x = adapted(), inputs(3, 5)
    with torch.no_grad():
        getattr(model.layer.fvae_vae["default"], encoder).logvar.bias.copy_(torch.tensor(biases, dtype=torch.float32))
        getattr(model.layer.fvae_vae["default"], encoder).logvar.weight.zero_()
    assert collected_terms(model, x, MASK)["clamped"].tolist() == [share / 2]


@pytest.mark.parametrize("latent", [1, 2])
@pytest.mark.parametrize("num_active", range(R + 1))
def test_active_units_are_dimensions_that_vary(num_active, latent):
    model = adapted(encoder_layers=0)
    mean = getattr(model.layer.fvae_vae["default"], f"encoder{latent}").mean
    with torch.no_grad():
        mean.weight.zero_()
        mean.weight[:num_active].fill_(0.1)
        mean.bias.fill_(3.0)  # a large mean is no activity
    assert collected_terms(model, inputs(1, 64))[f"active_z{latent}"].tolist() == [num_active]


@pytest.mark.parametrize("mean", [0.0, 3.3, 10.1, 30.1, 100.1])
@pytest.mark.parametrize("num_tokens", [512, 16_384])
def test_unit_with_a_large_constant_mean_is_not_active(num_tokens, mean):
    model = adapted(encoder_layers=0)
    with torch.no_grad():
        for encoder in (model.layer.fvae_vae["default"].encoder1, model.layer.fvae_vae["default"].encoder2):
            encoder.mean.weight.zero_()
            encoder.mean.bias.fill_(mean)
    terms = collected_terms(model, inputs(1, num_tokens))
    assert terms["active_z1"].tolist() == terms["active_z2"].tolist() == [0.0]


def test_wasserstein_of_equal_posteriors_is_zero():
    model = adapted()
    vae = model.layer.fvae_vae["default"]
    vae.encoder2.load_state_dict(vae.encoder1.state_dict())
    assert collected_terms(model, inputs(3, 5))["wasserstein"].tolist() == [0.0]


# ---------------------------------------------------------------------------------------------------------------- R^2


def reconstructing(error: float) -> LayerModel:
    """A linear VAE of as many latent dimensions as x that misses `error` of the scatter; hardly any noise."""
    model = adapted(r=D, encoder_layers=0, decoder_layers=0)
    vae = model.layer.fvae_vae["default"]
    with torch.no_grad():
        vae.encoder1.mean.weight.copy_(torch.eye(D))
        vae.encoder1.mean.bias.zero_()
        for encoder in (vae.encoder1, vae.encoder2):
            encoder.logvar.weight.zero_()
            encoder.logvar.bias.fill_(-20.0)
        vae.decoder.output.weight.zero_()
        vae.decoder.output.weight[:, :D].copy_(torch.eye(D) * (1 - error**0.5))
    return model


@pytest.mark.parametrize("error", [0.0, 0.25, 1.0, 4.0])
def test_r2_is_one_less_the_missed_share_of_the_scatter(error):
    model, x = reconstructing(error), inputs(4, 50)
    x = x - x.mean((0, 1))
    with torch.no_grad():
        model.layer.fvae_vae["default"].decoder.output.bias.zero_()
    assert collected_terms(model, x)["r2"].item() == pytest.approx(1 - error, abs=1e-3)


@pytest.mark.parametrize("num_tokens", [256, 257, 5000, 20_000])
def test_r2_of_many_tokens_is_measured_on_some(num_tokens):
    model, x = adapted(), inputs(1, num_tokens)
    mask = (torch.rand(1, num_tokens, generator=torch.Generator().manual_seed(3)) < 0.7).long()
    expected = direct_terms(model, x, mask)
    x[mask == 0] *= 1000
    # The relative standard error of a scatter over n tokens and D independent features is sqrt(2 / (n D)), here 3.6 %.
    terms = collected_terms(model, x, mask)
    rest = {name for name in terms if name != "r2"}
    assert_terms({n: terms[n] for n in rest}, {n: expected[n] for n in rest}, rtol=1e-3, atol=1e-3)
    tolerance = 1e-4 if num_tokens == 256 else 0.1
    assert terms["r2"].item() == pytest.approx(expected["r2"].item(), abs=tolerance)


def test_r2_counts_the_tokens_that_it_measured():
    model = adapted()
    with side_loss.collect(model) as collected:
        model(inputs(1, 5000))
    sums = collected.sums()
    assert sums["num_tokens"].tolist() == [5000] and 128 <= sums["r2_tokens"].item() <= 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_hold_at_most_256_inputs(dtype):
    vae = adapted().layer.fvae_vae["default"]
    for num_tokens in (1, 256, 257, 10_000):
        statistics = TokenStatistics(*vae(inputs(1, num_tokens).to(dtype), with_statistics=True)[2:])
        assert statistics.x.shape == statistics.xhat.shape == (min(num_tokens, 256), D)
        assert statistics.x.dtype == dtype and statistics.nll.shape == (1, num_tokens)


def test_r2_of_one_token_is_finite():
    """It has no scatter to explain."""
    assert collected_terms(adapted(), inputs(1, 1))["r2"].isfinite().all()


@pytest.mark.parametrize("num_tokens", [5000, 9000])
def test_r2_does_not_depend_on_how_the_mask_falls_on_the_measured_tokens(num_tokens):
    """A periodic mask, as rows of one length and one prompt have it, may not leave the measurement without tokens."""
    model, x = adapted(), inputs(1, num_tokens)
    every = -(-num_tokens // 256)
    mask = (torch.arange(num_tokens) % every > 0).long()[None]
    expected = direct_terms(model, x, mask)["r2"].item()
    assert collected_terms(model, x, mask)["r2"].item() == pytest.approx(expected, abs=0.05)


def test_r2_of_no_measured_token_is_not_perfect():
    mask = torch.zeros(1, 5000)
    mask[0, 1] = 1
    assert not collected_terms(adapted(), inputs(1, 5000), mask)["r2"].item() > 0.5


# --------------------------------------------------------------------------------------------------------- additivity


def shifted(*shape):
    """Two channels far from 0, as language models have them: mean 1000, standard deviation 1."""
    x = inputs(*shape)
    x[..., :2] += 1000
    return x


def centred(model):
    """The decoder's output and the encoders made ready for `shifted` inputs, so that no term is absurd."""
    vae = model.layer.fvae_vae["default"]
    with torch.no_grad():
        vae.decoder.output.bias[:2] = 1000
        for encoder in (vae.encoder1, vae.encoder2):
            linear = encoder.trunk.linears[0]
            linear.bias -= 1000 * linear.weight[:, :2].sum(1)
    return model


def add(left: dict, right: dict) -> dict:
    return {key: value + left.get(key, 0) for key, value in right.items()}


class Masked(LayerModel):
    """The mask of each forward in one block is that which the forward is given."""

    def forward(self, x, attention_mask=None):
        return self.layer(x)


@pytest.mark.parametrize("how", ["forwards", "blocks"])
@pytest.mark.parametrize("make", [inputs, shifted])
def test_parts_add_up_to_the_whole(make, how):
    """Batches that differ in their means: the sums must keep the scatter between them."""
    model = Masked((adapted() if make is inputs else centred(adapted())).layer)
    parts = [make(1, 40), make(3, 40) + 2, make(2, 40) - 1]
    masks = [(torch.arange(40) < length).long().expand(part.shape[:-1]) for part, length in zip(parts, (13, 40, 29))]
    x, mask = torch.cat(parts), torch.cat(masks)
    sums: dict = {}
    if how == "blocks":
        for part, part_mask, ids in zip(parts, masks, ids_for(6, 40).split([1, 3, 2])):
            with side_loss.collect(model, noise=TokenNoise({"input_ids": ids}, 0, 0)) as collected:
                model(part, attention_mask=part_mask)
            sums = add(sums, collected.sums())
    else:
        with torch.no_grad():  # noise by token is that of one batch a block: here none
            for encoder in (model.layer.fvae_vae["default"].encoder1, model.layer.fvae_vae["default"].encoder2):
                encoder.logvar.weight.zero_()
                encoder.logvar.bias.fill_(-1000.0)
        with side_loss.collect(model) as collected:
            for part, part_mask in zip(parts, masks):
                model(part, attention_mask=part_mask)
        sums = collected.sums()
    terms = terms_from_sums(sums, collected.layer_configs)
    assert_terms(terms, direct_terms(model, x, mask), rtol=2e-3, atol=2e-3)
    assert_terms(terms, collected_terms(model, x, mask), rtol=1e-3, atol=1e-3)


def test_r2_of_shifted_channels_sees_their_scatter():
    """A decoder that gives the mean and no more has r2 = 0, though it explains 99.99 % of the squares."""
    model = adapted(decoder_layers=0)
    x = shifted(8, 250)
    with torch.no_grad():
        model.layer.fvae_vae["default"].decoder.output.weight.zero_()
        model.layer.fvae_vae["default"].decoder.output.bias.copy_(x.double().mean((0, 1)))
    sums: dict = {}
    for row in x:
        with side_loss.collect(model) as collected:
            model(row)
        sums = add(sums, collected.sums())
    assert terms_from_sums(sums, collected.layer_configs)["r2"].item() == pytest.approx(0, abs=1e-4)
    # Here it is measured on 256 of the tokens, whose mean is not that of all.
    assert collected_terms(model, x)["r2"].item() == pytest.approx(0, abs=1e-2)


def test_sums_of_uncounted_tokens_are_zero():
    model = adapted()
    noise = TokenNoise({"input_ids": ids_for(3, 5)}, 0, 0)
    with side_loss.collect(model, token_mask=torch.zeros(3, 5), noise=noise) as collected:
        model(inputs(3, 5))
    assert not any(value.any() for value in collected.sums().values())
    terms = terms_from_sums(collected.sums(), collected.layer_configs)
    assert all(value.isfinite().all() for value in terms.values())


# ------------------------------------------------------------------------------------------------------ several layers


def test_adapters_of_different_rank_and_prior_have_their_own_terms():
    """As one by one: sums are padded to the largest rank, and Gamma needs each adapter's own."""
    model = adapted()
    others = {"small": {"r": 1, "z2_prior_std": 0.5}, "large": {"r": 7, "objective": "paper", "z2_prior_mean": -2.0}}
    for name, settings in others.items():
        model.layer.update_layer(name, tiny_adapter(encoder_dropout=0.0, decoder_dropout=0.0, **settings))
    randomise(model, seed=2)
    model.layer.set_adapter(["default", *others])
    x, noise = inputs(3, 5), TokenNoise({"input_ids": token_ids(3, 5)}, 0, 0)

    def terms():
        with side_loss.collect(model, token_mask=MASK, noise=noise) as collected:
            model(x)
        return collected.terms

    together = terms()
    for index, name in enumerate(["default", *others]):
        model.layer.set_adapter([name])
        alone = terms()
        assert together.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(together[key][index], value[0], msg=f"{name} {key}")


# ------------------------------------------------------------------------------------------------------ no side effects


def test_nothing_in_the_statistics_has_a_gradient():
    vae, x = adapted().layer.fvae_vae["default"], inputs(3, 5).requires_grad_()
    statistics = TokenStatistics(*vae(x, with_statistics=True)[2:])
    assert [name for name in statistics._fields if getattr(statistics, name).requires_grad] == []
    assert all(part.dtype == torch.float32 for part in statistics)
    sums = sums_over_tokens([statistics], torch.ones(3, 5))
    assert [name for name, value in sums.items() if value.requires_grad] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_statistics_change_neither_outputs_nor_gradients(objective, dtype):
    results = []
    for with_terms in (True, False):
        model, x = adapted(objective=objective, encoder_dropout=0.2), inputs(3, 5).to(dtype).requires_grad_()
        model.layer.base_layer.to(dtype)
        torch.manual_seed(1)
        with side_loss.collect(model, token_mask=MASK, terms=with_terms) as collected:
            y = model(x)
        (y.float().square().mean() + collected.neg_elbo).backward()
        gradients = [p.grad for name, p in model.named_parameters() if "fvae_" in name]
        results.append([y, collected.neg_elbo, x.grad, *gradients])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_terms_have_the_dtype_of_the_layers_statistics(dtype):
    model = adapted(dtype)
    with side_loss.collect(model) as collected:
        model(inputs(3, 5).to(dtype))
    assert {value.dtype for value in collected.terms.values()} == {dtype}


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_sums_do_not_depend_on_what_is_added_up_together(limit, monkeypatch):
    """Layers of other widths and ranks between them, a layer that runs twice, masks of their own for each forward."""

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            settings = {"encoder_dropout": 0.0, "decoder_dropout": 0.0}
            layers = [FVAELinear(nn.Linear(D, D), "default", tiny_adapter(**settings, r=r)) for r in (4, 2, 4)]
            layers.append(FVAELinear(nn.Linear(9, 5), "default", tiny_adapter(**settings)))
            self.layers = nn.ModuleList(randomise(layer) for layer in layers)

        def forward(self, x, attention_mask=None):
            for layer in (*self.layers[:3], self.layers[0]):
                x = layer(x)
            return self.layers[3](torch.cat([x, x[..., :3]], dim=-1))

    model = Several().train()
    monkeypatch.setattr(side_loss, "PENDING_BYTES", 0)
    expected: dict = {}
    for part, mask in zip((inputs(3, 5), inputs(3, 5, seed=1)), (MASK, 1 - MASK)):
        torch.manual_seed(2)
        with side_loss.collect(model, token_mask=mask) as collected:
            model(part)
        expected = add(expected, collected.sums())
    monkeypatch.setattr(side_loss, "PENDING_BYTES", limit)
    with side_loss.collect(model) as collected:
        for part, mask in zip((inputs(3, 5), inputs(3, 5, seed=1)), (MASK, 1 - MASK)):
            torch.manual_seed(2)
            model(part, attention_mask=mask)
    found = collected.sums()
    assert found.keys() == expected.keys() and found["num_tokens"].tolist() == [30, 15, 15, 15]
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
