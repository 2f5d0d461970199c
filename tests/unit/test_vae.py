import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from fvae_dist.adapter.linears import CastLinear
from fvae_dist.adapter.noise import GENERATOR, LayerNoise
from fvae_dist.adapter.telemetry import TokenStatistics
from fvae_dist.adapter.vae import Decoder, Encoder, FactorizedVAE, sample
from tests.models import randomise, tiny_adapter

NO_DROPOUT = {"encoder_dropout": 0.0, "decoder_dropout": 0.0}
SHAPES = [(1, 6), (5, 6), (1, 1, 6), (2, 3, 6), (2, 1, 3, 6)]
VARIANTS = [
    {},
    {"encoder_shared_trunk": False},
    *({"encoder_layers": depth, "encoder_shared_trunk": depth % 2 == 0} for depth in (0, 2, 3, 4)),
    *({"decoder_layers": depth} for depth in (0, 1, 3, 4)),
    {"latent_fusion": "average"},
    {"latent_fusion": "average", "decoder_layers": 0, "encoder_layers": 0},
]
OBJECTIVES = ("official", "paper", "vae2lat", "beta_vae2lat")
# Every weight that an objective uses, none of them 1.
WEIGHTED = {
    "official": {"reconstruction_weight": 0.5, "kl_weight": 2.0, "z1_weight": 3.0, "z2_weight": 0.7},
    "paper": {"reconstruction_weight": 0.5, "kl_weight": 2.0, "factorization_weight": 1.5},
    "vae2lat": {},
    "beta_vae2lat": {"reconstruction_weight": 0.5, "kl_weight": 2.0},
}


def vae(features=6, **settings) -> FactorizedVAE:
    torch.manual_seed(0)
    module = FactorizedVAE(features, tiny_adapter(**settings))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def inputs(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def stream(x, salt=3) -> LayerNoise:
    """Fixed noise, the same in every dtype."""
    keys = torch.randint(-(2**62), 2**62, (x[..., 0].numel(),), generator=torch.Generator().manual_seed(2))
    return LayerNoise(keys, salt)


def gradients(loss, module, x) -> dict[str, torch.Tensor]:
    """Of `loss`, for every parameter and x; zeros where there is none."""
    leaves = {**dict(module.named_parameters()), "x": x}
    found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), found)}


# ------------------------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_outputs_are_fp32_and_keep_leading_dimensions(settings, dtype):
    module = vae(**settings)
    for shape in SHAPES:
        x = inputs(*shape, dtype=dtype)
        z1, neg_elbo = module.train()(x)
        (z1_eval,) = module.eval()(x)
        for latent in (z1, z1_eval):
            assert latent.shape == (*shape[:-1], 4) and latent.dtype == torch.float32
        assert neg_elbo.shape == shape[:-1] and neg_elbo.dtype == torch.float32 and neg_elbo.isfinite().all()


def test_statistics_come_on_request():
    module, x = vae(), inputs(2, 3, 6)
    z1, neg_elbo, *statistics = module(x, stream(x), with_statistics=True)
    of_tokens = TokenStatistics(*statistics)
    assert torch.equal(of_tokens.neg_elbo, neg_elbo) and of_tokens.mean1.shape == z1.shape
    plain = module(x, stream(x))
    assert torch.equal(z1, plain[0]) and torch.equal(neg_elbo, plain[1]) and len(plain) == 2


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient(settings, objective):
    module = vae(**settings, **NO_DROPOUT, objective=objective)
    z1, neg_elbo = module(inputs(33, 6))
    (z1.sum() + neg_elbo.sum()).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


# --------------------------------------------------------------------------------------------------- whole-VAE values


def independent_neg_elbo(module: FactorizedVAE, x, noise):
    """METHOD.md from the weights, through torch.distributions; (z1, negative ELBO per token)."""
    config = module.config
    trunks = 1 if config.encoder_shared_trunk else 2
    encoder_dropouts = [(config.encoder_hidden, config.encoder_dropout)] * config.encoder_layers * trunks
    decoder_dropouts = [(config.decoder_hidden, config.decoder_dropout)] * config.decoder_layers
    eps1, eps2, keeps = noise.draw(x.new_empty(*x.shape[:-1], config.r), 2 * encoder_dropouts + decoder_dropouts)
    keeps = iter(keeps)

    def mlp(linears, h, p):
        for linear in linears:
            h, keep = F.relu(F.linear(h, linear.weight, linear.bias)), next(keeps)
            h = h if keep is None else torch.where(keep, h / (1 - p), torch.zeros_like(h))
        return h

    def posterior(encoder):
        h = mlp(encoder.trunk.linears, x, config.encoder_dropout)
        mean = F.linear(h, encoder.mean.weight, encoder.mean.bias)
        if trunks == 2:
            h = mlp(encoder.logvar_trunk.linears, x, config.encoder_dropout)
        logvar = F.linear(h, encoder.logvar.weight, encoder.logvar.bias).clamp(-20, 20)
        return Normal(mean, (0.5 * logvar).exp())

    q1, q2 = posterior(module.encoder1), posterior(module.encoder2)
    z1, z2 = q1.mean + q1.stddev * eps1, q2.mean + q2.stddev * eps2
    z = torch.cat([z1, z2], -1) if config.latent_fusion == "concat" else (z1 + z2) / 2
    h = mlp(module.decoder.layers.linears, z, config.decoder_dropout)
    xhat = F.linear(h, module.decoder.output.weight, module.decoder.output.bias)
    log_p = Normal(xhat, module.decoder.scale + 1e-5).log_prob(x).sum(-1)
    mu2, std2 = (torch.tensor(value, dtype=x.dtype) for value in (config.z2_prior_mean, config.z2_prior_std))
    p1, p2 = Normal(torch.zeros_like(mu2), torch.ones_like(mu2)), Normal(mu2, std2)
    kl1, kl2 = kl_divergence(q1, p1).sum(-1), kl_divergence(q2, p2).sum(-1)
    alpha, beta, delta = config.reconstruction_weight, config.kl_weight, config.factorization_weight
    return z1, {
        "official": lambda: (
            -alpha * log_p
            + beta * kl1
            + config.z2_weight * (z2 - mu2).square().mean(-1)
            - config.z1_weight * z1.square().mean(-1)
        ),
        "paper": lambda: -(alpha * log_p - beta * kl1 + delta * (p2.log_prob(z2) - p1.log_prob(z1)).sum(-1)),
        "vae2lat": lambda: -log_p + kl1 + kl2,
        "beta_vae2lat": lambda: -alpha * log_p + beta * (kl1 + kl2),
    }[config.objective]()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_values_and_gradients_are_those_of_torch_distributions(settings, objective, dropout):
    rates = {"encoder_dropout": dropout, "decoder_dropout": dropout / 2}
    prior = {"z2_prior_mean": 0.7, "z2_prior_std": 1.3}
    module = vae(**settings, **rates, **prior, objective=objective, **WEIGHTED[objective]).double()
    x = inputs(2, 5, 6, dtype=torch.float64).requires_grad_()
    z1, neg_elbo = module(x, stream(x))
    expected_z1, expected = independent_neg_elbo(module, x, stream(x))
    torch.testing.assert_close(z1, expected_z1, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(neg_elbo, expected, rtol=1e-10, atol=0)
    direction = inputs(2, 5, dtype=torch.float64)  # tokens weighed differently: none may leak into another
    ours, theirs = (gradients((value * direction).sum(), module, x) for value in (neg_elbo, expected))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("w", [0.3, 2.0])
@pytest.mark.parametrize("std", [1.0, 0.5])
def test_official_is_paper_but_for_the_reductions(std, w, dropout):
    """Weights w (z1) and w / std^2 (z2) are delta = 2 w / r; the values differ by the constant of Gamma alone."""
    settings = {"encoder_dropout": dropout, "decoder_dropout": dropout, "z2_prior_std": std}
    official = vae(**settings, objective="official", z1_weight=w, z2_weight=w / std**2).double()
    paper = vae(**settings, objective="paper", factorization_weight=2 * w / 4).double()
    assert all(torch.equal(a, b) for a, b in zip(official.parameters(), paper.parameters()))
    x = inputs(7, 6, dtype=torch.float64).requires_grad_()
    (_, of_official), (_, of_paper) = official(x, stream(x)), paper(x, stream(x))
    torch.testing.assert_close(of_paper - of_official, torch.full_like(of_paper, 2 * w * math.log(std)))
    ours, theirs = gradients(of_official.sum(), official, x), gradients(of_paper.sum(), paper, x)
    for name in ours:
        assert ours[name].any()
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-12, msg=name)


# ---------------------------------------------------------------------------------------------------- encoder, decoder


def test_encoder_starts_at_the_prior():
    encoder = Encoder(6, tiny_adapter())
    mean, logvar = encoder(inputs(5, 6))
    assert not mean.any() and not logvar.any()


@pytest.mark.parametrize("encoder_layers", [0, 2])
def test_encoder_starts_at_the_log_variance_asked_for(encoder_layers):
    encoder = Encoder(6, tiny_adapter(initial_logvar=-4.0, encoder_layers=encoder_layers, encoder_shared_trunk=False))
    mean, logvar = encoder(inputs(5, 6))
    assert not mean.any() and (logvar == -4).all()


@pytest.mark.parametrize("bias", [-1e4, -20.0, 20.0, 1e4])
def test_log_variance_is_clamped(bias):
    encoder = Encoder(6, tiny_adapter())
    torch.nn.init.constant_(encoder.logvar.bias, bias)
    _, logvar = encoder(inputs(5, 6))
    assert (logvar == max(min(bias, 20.0), -20.0)).all()


@pytest.mark.parametrize("settings", [*VARIANTS[:4]], ids=str)
def test_mean_only_is_the_mean(settings):
    encoder = vae(**settings, **NO_DROPOUT).encoder1
    x = inputs(2, 3, 6)
    torch.testing.assert_close(encoder.mean_only(x), encoder(x)[0], rtol=0, atol=0)


def test_separate_trunks_are_separate():
    encoder = vae(encoder_shared_trunk=False, **NO_DROPOUT).encoder1
    x = inputs(3, 6)
    mean, logvar = encoder(x)
    torch.nn.init.zeros_(encoder.logvar_trunk.linears[0].weight)
    changed_mean, changed_logvar = encoder(x)
    assert torch.equal(mean, changed_mean) and not torch.equal(logvar, changed_logvar)


def test_evaluation_runs_only_the_mean_of_encoder_1():
    module = vae(encoder_shared_trunk=False).eval()
    x = inputs(4, 6)
    expected = module.encoder1.mean_only(x)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.startswith(("encoder1.trunk", "encoder1.mean")):
                parameter.fill_(float("nan"))
    ran = []
    for name, submodule in module.named_modules():
        submodule.register_forward_hook(lambda *_, name=name: ran.append(name))
    (z1,) = module(x)
    assert torch.equal(z1, expected) and z1.isfinite().all()
    assert all(name == "" or name.startswith(("encoder1.trunk", "encoder1.mean")) for name in ran)


def test_evaluation_draws_no_noise():
    module, state = vae().eval(), torch.get_rng_state()
    assert torch.equal(module(inputs(4, 6))[0], module(inputs(4, 6))[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_is_drawn_for_encoder_1_then_2_in_the_shape_of_the_mean(monkeypatch):
    drawn, randn_like = [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda like: drawn.append(randn_like(like)) or drawn[-1])
    module = vae(**NO_DROPOUT)
    drawn.clear()  # `vae` itself draws weights
    x = inputs(2, 3, 6)
    z1, _, *statistics = module(x, GENERATOR, True)
    assert [tuple(noise.shape) for noise in drawn] == [(2, 3, 4)] * 2
    torch.testing.assert_close(z1, sample(*module.encoder1(x), drawn[0]))
    z2_sq = TokenStatistics(*statistics).z2_sq
    z2 = sample(*module.encoder2(x), drawn[1])
    torch.testing.assert_close(z2_sq, (z2 - 1.5).square().mean(-1))


@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("shared", [True, False])
def test_one_mask_is_drawn_for_each_hidden_layer(shared, depth):
    rates = {"encoder_dropout": 0.1, "decoder_dropout": 0.2}
    module = vae(encoder_layers=depth, decoder_layers=depth + 1, decoder_hidden=5, encoder_shared_trunk=shared, **rates)
    asked = []

    class Asked(LayerNoise):
        def draw(self, like, dropouts):
            asked.append((tuple(like.shape), like.dtype, dropouts))
            return super().draw(like, dropouts)

    x = inputs(2, 3, 6, dtype=torch.bfloat16)
    module(x, Asked(stream(x).keys, 0))
    encoders = [(8, 0.1)] * depth * (1 if shared else 2) * 2
    assert asked == [((2, 3, 4), torch.float32, encoders + [(5, 0.2)] * (depth + 1))]


def test_sample_has_the_given_moments():
    eps = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    draws = sample(torch.full_like(eps, 3.0), torch.full_like(eps, 2.0).log(), eps)
    # Standard errors 0.003 and 0.006; four of them.
    assert draws.mean().item() == pytest.approx(3.0, abs=0.013)
    assert draws.var().item() == pytest.approx(2.0, abs=0.026)


@pytest.mark.parametrize("fusion", ["concat", "average"])
def test_decoder_reads_both_latents(fusion):
    decoder, keeps = Decoder(6, tiny_adapter(latent_fusion=fusion)), [None, None]
    z1, z2, x = inputs(3, 4), inputs(3, 4) + 1, inputs(3, 6)
    nll, _ = decoder(z1, z2, x, keeps)
    assert not torch.allclose(decoder(z1 + 1, z2, x, keeps)[0], nll)
    assert not torch.allclose(decoder(z1, z2 + 1, x, keeps)[0], nll)
    swapped, _ = decoder(z2, z1, x, keeps)
    assert torch.allclose(swapped, nll) == (fusion == "average")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder_returns_the_likelihood_of_its_reconstruction(dtype):
    decoder, z, x = Decoder(6, tiny_adapter()), inputs(3, 4), inputs(3, 6, dtype=dtype)
    nll, hidden = decoder(z, z, x, [None, None])
    xhat = decoder.output(hidden)
    assert xhat.shape == x.shape and xhat.dtype == dtype and nll.dtype == torch.float32
    torch.testing.assert_close(nll, -Normal(xhat.float(), 1 + 1e-5).log_prob(x.float()).sum(-1))


def test_decoder_is_the_same_for_a_scale_of_either_sign():
    decoder, z, x, keeps = Decoder(6, tiny_adapter()), inputs(3, 4), inputs(3, 6), [None, None]
    expected, _ = decoder(z, z, x, keeps)
    with torch.no_grad():
        decoder.scale.neg_()
    assert torch.equal(decoder(z, z, x, keeps)[0], expected)


# --------------------------------------------------------------------------------------------------------- detach_input

NOISES = {"generator": lambda x: GENERATOR, "tokens": stream}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("settings", [{}, {"encoder_shared_trunk": False, "encoder_layers": 2}], ids=str)
def test_detached_input_changes_only_the_side_loss_gradient_of_the_input(settings, objective, dropout, noise):
    rates = {"encoder_dropout": dropout, "decoder_dropout": dropout}
    found = []
    for detach in (False, True):
        module = vae(**settings, **rates, objective=objective, detach_input=detach).double()
        x = inputs(5, 6, dtype=torch.float64).requires_grad_()
        torch.manual_seed(4)
        z1, neg_elbo = module(x, NOISES[noise](x))
        task = (z1 * inputs(5, 4, dtype=torch.float64)).sum()
        losses = {"task": task, "side": neg_elbo.sum(), "both": task + neg_elbo.sum()}
        found.append((z1, neg_elbo, {name: gradients(loss, module, x) for name, loss in losses.items()}))
    (z1, neg_elbo, attached), (z1_detached, neg_elbo_detached, detached) = found
    assert torch.equal(z1, z1_detached) and torch.equal(neg_elbo, neg_elbo_detached)
    assert attached["side"]["x"].any() and not detached["side"]["x"].any()
    assert torch.equal(detached["task"]["x"], attached["task"]["x"])
    assert torch.equal(detached["both"]["x"], attached["task"]["x"])
    for loss in attached:
        for name in dict(module.named_parameters()):
            torch.testing.assert_close(detached[loss][name], attached[loss][name], rtol=1e-12, atol=1e-13, msg=name)


# ------------------------------------------------------------------------------------------------------------- numerics


def outliers(*shape):
    """A few channels a thousand times the others, as language models have them."""
    x = inputs(*shape)
    x[..., ::16] *= 1000
    return x


INPUTS = {
    "ordinary": lambda: inputs(5, 64),
    "outlier channels": lambda: outliers(5, 64),
    "all large": lambda: 1000 * inputs(5, 64),
    "zeros": lambda: torch.zeros(5, 64),
    "one token": lambda: outliers(1, 64),
    "one token of zeros": lambda: torch.zeros(1, 64),
}


def saturate(module, bias):
    for encoder in (module.encoder1, module.encoder2):
        nn.init.constant_(encoder.logvar.bias, bias)


STATES = {
    "as built": lambda module: None,
    "log-variance above the clamp": lambda module: saturate(module, 1e4),
    "log-variance below the clamp": lambda module: saturate(module, -1e4),
    "scale 0": lambda module: nn.init.zeros_(module.decoder.scale),
    "scale -1": lambda module: nn.init.constant_(module.decoder.scale, -1.0),
    "scale -1e-5": lambda module: nn.init.constant_(module.decoder.scale, -1e-5),
}
# fp16 ends at 65504: there the gradient is finite for ordinary inputs and scales alone, the loss everywhere.
FINITE_IN_FP16 = {
    (x, state)
    for x in ("ordinary", "zeros", "one token of zeros")
    for state in ("as built", "log-variance below the clamp", "scale -1")
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", INPUTS)
def test_loss_and_gradients_are_finite(kind, state, dtype):
    for objective, detach in itertools.product(OBJECTIVES, (False, True)):
        module = vae(64, objective=objective, detach_input=detach)
        STATES[state](module)
        x = INPUTS[kind]().to(dtype).requires_grad_()
        z1, neg_elbo, *statistics = module(x, stream(x), True)
        assert all(output.isfinite().all() for output in (z1, neg_elbo, *statistics)), objective
        if dtype != torch.float16 or (kind, state) in FINITE_IN_FP16:
            found = gradients(neg_elbo.mean() + z1.sum(), module, x)
            assert [name for name, gradient in found.items() if not gradient.isfinite().all()] == [], objective


def bf16_errors(features, with_outliers, seed, objective) -> dict[str, float]:
    """Relative norm errors of every gradient in bf16 against float64, same weights, inputs and noise."""
    generator = torch.Generator().manual_seed(seed)
    module = vae(features, r=16, encoder_hidden=16, decoder_layers=3, decoder_hidden=128, objective=objective)
    with torch.no_grad():
        for parameter in module.parameters():  # as trained: no head is zero any more
            if parameter.dim() == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    x = torch.randn(128, features, generator=generator)
    if with_outliers:
        x[:, :4] *= 1000
    x = x.bfloat16()
    task = torch.randn(128, 16, generator=generator).double() / 128
    results = []
    for of, x_of in ((module, x), (copy.deepcopy(module).double(), x.double())):
        x_of.requires_grad_()
        z1, neg_elbo = of(x_of, stream(x))
        found = gradients((z1.double() * task).sum() + neg_elbo.double().mean(), of, x_of)
        results.append({name: gradient.double() for name, gradient in found.items()})
    ours, exact = results
    return {name: ((ours[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}


BF16_CASES = pytest.mark.parametrize(
    ("features", "with_outliers", "objective"), list(itertools.product((256, 1024), (False, True), OBJECTIVES))
)
BF16_RTOL = 1.6e-2


@BF16_CASES
def test_bf16_gradients_are_those_of_float64(features, with_outliers, objective):
    for seed in range(3):
        errors = bf16_errors(features, with_outliers, seed, objective)
        assert max(errors.values()) < BF16_RTOL, errors


# ---------------------------------------------------------------------------------------------------- parameters, parts


@pytest.mark.parametrize(
    ("cast", "expected"),
    [
        (lambda m: m.to(torch.bfloat16), torch.float32),
        (lambda m: m.to(torch.float16), torch.float32),
        (lambda m: m.bfloat16(), torch.float32),
        (lambda m: m.half(), torch.float32),
        (lambda m: torch.nn.Sequential(m).to("cpu", torch.bfloat16)[0], torch.float32),
        (lambda m: m.double(), torch.float64),
    ],
    ids=["to_bf16", "to_fp16", "bfloat16", "half", "parent", "double"],
)
def test_parameters_ignore_casts_to_16_bit(cast, expected):
    module = vae()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    cast(module)
    for parameter, value in zip(module.parameters(), before, strict=True):
        assert parameter.dtype == expected and torch.equal(parameter, value.to(expected))


def test_to_empty_and_meta_keep_working():
    module = vae().to("meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in module.to_empty(device="cpu").parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_cast_linear_computes_in_the_dtype_of_its_input(dtype):
    linear, x = CastLinear(6, 3), inputs(2, 6, dtype=dtype)
    y = linear(x)
    assert y.dtype == dtype and linear.weight.dtype == torch.float32
    torch.testing.assert_close(y, torch.nn.functional.linear(x, linear.weight.to(dtype), linear.bias.to(dtype)))


def test_randomise_leaves_no_zero():
    # The builder other tests rely on: a saved or compared adapter must not be the initial one.
    module = torch.nn.ModuleDict({"fvae_vae": FactorizedVAE(6, tiny_adapter())})
    assert all(parameter.all() for parameter in randomise(module).parameters())
