import pytest
import torch

from fvae_dist.adapter.vae import CastLinear, Decoder, Encoder, FactorizedVAE, sample
from tests.models import randomise, tiny_adapter

NO_DROPOUT = {"encoder_dropout": 0.0, "decoder_dropout": 0.0}
SHAPES = [(1, 6), (5, 6), (1, 1, 6), (2, 3, 6), (2, 1, 3, 6)]
VARIANTS = [
    {},
    {"encoder_shared_trunk": False},
    {"encoder_layers": 0},
    {"encoder_layers": 3},
    {"decoder_layers": 0},
    {"latent_fusion": "average"},
    {"latent_fusion": "average", "decoder_layers": 0},
]


def vae(features=6, **settings) -> FactorizedVAE:
    torch.manual_seed(0)
    module = FactorizedVAE(features, tiny_adapter(**settings))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def inputs(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_outputs_are_fp32_and_keep_leading_dimensions(settings, dtype):
    module = vae(**settings)
    for shape in SHAPES:
        x = inputs(*shape, dtype=dtype)
        z1, mean1, *terms = module.train()(x)
        (z1_eval,) = module.eval()(x)
        for latent in (z1, mean1, z1_eval):
            assert latent.shape == (*shape[:-1], 4) and latent.dtype == torch.float32
        for term in terms:
            assert term.shape == shape[:-1] and term.dtype == torch.float32 and term.isfinite().all()


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient(settings):
    module = vae(**settings, **NO_DROPOUT)
    z1, _, *terms = module(inputs(33, 6))
    (z1.sum() + sum(term.sum() for term in terms)).backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradient_reaches_the_input_through_the_likelihood():
    x = inputs(3, 6).requires_grad_()
    nll = vae(**NO_DROPOUT)(x)[2]
    nll.sum().backward()
    assert x.grad.any()


def test_encoder_starts_at_the_prior():
    encoder = Encoder(6, tiny_adapter())
    mean, logvar = encoder(inputs(5, 6))
    assert not mean.any() and not logvar.any()


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
    z1, mean1, *_, z1_sq, z2_sq = module(x)
    assert [tuple(noise.shape) for noise in drawn] == [(2, 3, 4)] * 2
    _, logvar1 = module.encoder1(x)
    torch.testing.assert_close(z1, mean1 + (0.5 * logvar1).exp() * drawn[0])
    mean2, logvar2 = module.encoder2(x)
    z2 = mean2 + (0.5 * logvar2).exp() * drawn[1]
    torch.testing.assert_close(z2_sq, (z2 - 1.5).square().mean(-1))
    torch.testing.assert_close(z1_sq, z1.square().mean(-1))


def test_sample_has_the_given_moments():
    torch.manual_seed(0)
    draws = sample(torch.full((200_000, 1), 3.0), torch.full((200_000, 1), 2.0).log())
    # Standard errors 0.003 and 0.006; four of them.
    assert draws.mean().item() == pytest.approx(3.0, abs=0.013)
    assert draws.var().item() == pytest.approx(2.0, abs=0.026)


@pytest.mark.parametrize("fusion", ["concat", "average"])
def test_decoder_reads_both_latents(fusion):
    decoder = Decoder(6, tiny_adapter(latent_fusion=fusion, decoder_dropout=0.0))
    z1, z2, x = inputs(3, 4), inputs(3, 4) + 1, inputs(3, 6)
    nll = decoder(z1, z2, x)
    assert not torch.allclose(decoder(z1 + 1, z2, x), nll)
    assert not torch.allclose(decoder(z1, z2 + 1, x), nll)
    swapped = decoder(z2, z1, x)
    assert torch.allclose(swapped, nll) == (fusion == "average")


def test_decoder_is_the_same_for_a_scale_of_either_sign():
    decoder = Decoder(6, tiny_adapter(decoder_dropout=0.0))
    z, x = inputs(3, 4), inputs(3, 6)
    expected = decoder(z, z, x)
    with torch.no_grad():
        decoder.scale.neg_()
    assert torch.equal(decoder(z, z, x), expected)
    torch.nn.init.zeros_(decoder.scale)
    assert decoder(z, z, x).isfinite().all()


@pytest.mark.parametrize("factor", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_terms_and_gradients_are_finite_for_outliers_and_zeros(factor, dtype):
    module = vae()
    z1, _, *terms = module(factor * inputs(5, 6, dtype=dtype))
    (z1.sum() + sum(term.sum() for term in terms)).backward()
    assert all(term.isfinite().all() for term in terms)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


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
