import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fvae_dist import FVAELoraConfig
from fvae_dist.adapter.objective import (
    TokenTerms,
    diag_gaussian_nll,
    factorization,
    kl_to_prior,
    neg_elbo,
    token_terms,
    wide,
)

SHAPES = [(1, 5), (7, 3), (2, 5, 1), (3, 1, 1, 33), (0, 4)]
DTYPES = [torch.float32, torch.float64]
PRIORS = [(0.0, 1.0), (1.5, 1.0), (-3.0, 0.25), (0.5, 4.0)]
ABLATIONS = ("vae2lat", "beta_vae2lat")


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nll_is_that_of_torch(shape, dtype):
    x, xhat = (gaussian(*shape, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
    scale = (gaussian(shape[-1], seed=3, dtype=dtype).abs() + 0.1).requires_grad_()
    nll = diag_gaussian_nll(x, xhat, scale)
    expected = -Normal(xhat, scale).log_prob(x).sum(-1)
    assert nll.shape == shape[:-1] and nll.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(nll, expected, rtol=rtol, atol=rtol)
    inputs = (x, xhat, scale)
    gradients = zip(torch.autograd.grad(nll.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))
    for gradient, expected_gradient in gradients:
        torch.testing.assert_close(gradient, expected_gradient, rtol=10 * rtol, atol=10 * rtol)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_is_that_of_torch(shape, dtype, prior):
    mean, logvar = (gaussian(*shape, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
    kl = kl_to_prior(mean, logvar, *prior)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(*torch.tensor(prior, dtype=dtype))).sum(-1)
    assert kl.shape == shape[:-1] and kl.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(kl, expected, rtol=rtol, atol=rtol)
    inputs = (mean, logvar)
    gradients = zip(torch.autograd.grad(kl.sum(), inputs), torch.autograd.grad(expected.sum(), inputs))
    for gradient, expected_gradient in gradients:
        torch.testing.assert_close(gradient, expected_gradient, rtol=10 * rtol, atol=10 * rtol)


@pytest.mark.parametrize("prior", PRIORS)
def test_kl_of_the_prior_itself_is_zero(prior):
    mean, std = prior
    assert kl_to_prior(torch.full((3, 4), mean), torch.full((3, 4), 2 * math.log(std)), *prior).tolist() == [0.0] * 3


def test_kl_defaults_to_the_standard_normal():
    mean, logvar = gaussian(3, 4, seed=1), gaussian(3, 4, seed=2)
    assert torch.equal(kl_to_prior(mean, logvar), kl_to_prior(mean, logvar, 0.0, 1.0))


def test_nll_of_bf16_inputs_is_accumulated_in_fp32():
    # D = 4096 terms: a sum kept in bf16 (8 bits) is off by more than 1e-3.
    x, xhat = (gaussian(3, 4096, seed=seed).bfloat16() for seed in (1, 2))
    scale = gaussian(4096, seed=3).abs() + 0.5
    nll = diag_gaussian_nll(x, xhat, scale)
    assert nll.dtype == torch.float32
    exact = diag_gaussian_nll(x.double(), xhat.double(), scale.double())
    torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=0)
    in_bf16 = -Normal(xhat, scale.bfloat16()).log_prob(x).sum(-1)
    assert ((in_bf16.double() - exact) / exact).abs().max() > 1e-3


@pytest.mark.parametrize("factor", [0.0, 1.0, 1000.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nll_and_gradients_are_finite(factor, dtype):
    x = (factor * gaussian(5, 64, seed=1)).to(dtype).requires_grad_()
    xhat = gaussian(5, 64, seed=2).to(dtype).requires_grad_()
    scale = torch.full((64,), 1e-5).requires_grad_()
    nll = diag_gaussian_nll(x, xhat, scale)
    nll.mean().backward()
    assert nll.isfinite().all()
    assert all(tensor.grad.isfinite().all() for tensor in (x, xhat, scale))


@pytest.mark.parametrize("prior", PRIORS)
def test_kl_is_finite_at_the_clamps(prior):
    assert kl_to_prior(torch.zeros(1, 2), torch.tensor([[-20.0, 20.0]]), *prior).isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_wide_never_narrows(dtype, expected):
    assert wide(torch.zeros(1, dtype=dtype)).dtype == expected


@pytest.mark.filterwarnings("ignore::UserWarning")  # r = 1
@pytest.mark.parametrize("objective", ["official", "paper", *ABLATIONS])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_token_terms_are_the_defined_ones(shape, objective):
    nll, (z1, z2, *q) = gaussian(*shape[:-1]), (gaussian(*shape, seed=seed) for seed in range(1, 7))
    config = FVAELoraConfig(r=shape[-1], objective=objective, z2_prior_mean=0.7, z2_prior_std=1.3)
    terms = token_terms(nll, z1, z2, q[:2], q[2:], config)
    assert terms.nll is nll
    torch.testing.assert_close(terms.z1_sq, (z1**2).mean(-1))
    torch.testing.assert_close(terms.z2_sq, ((z2 - 0.7) ** 2).mean(-1))
    posteriors = [Normal(mean, (0.5 * logvar).exp()) for mean, logvar in (q[:2], q[2:])]
    torch.testing.assert_close(terms.kl_z1, kl_divergence(posteriors[0], Normal(0, 1)).sum(-1))
    if objective in ABLATIONS:
        torch.testing.assert_close(terms.kl_z2, kl_divergence(posteriors[1], Normal(0.7, 1.3)).sum(-1))
    else:
        assert terms.kl_z2 is None


@pytest.mark.parametrize(("mean", "std"), PRIORS)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_gamma_is_the_log_ratio_of_the_priors(shape, mean, std):
    z1, z2 = (gaussian(*shape, seed=seed, dtype=torch.float64) for seed in (1, 2))
    config = FVAELoraConfig(r=shape[-1], kl_weight=3, z2_prior_mean=mean, z2_prior_std=std)
    gamma = factorization(z1.square().mean(-1), (z2 - mean).square().mean(-1), config)
    prior1, prior2 = (Normal(*torch.tensor(prior, dtype=torch.float64)) for prior in ((0.0, 1.0), (mean, std)))
    expected = (prior2.log_prob(z2) - prior1.log_prob(z1)).sum(-1)
    torch.testing.assert_close(gamma, expected, rtol=1e-12, atol=1e-12)


WEIGHTS = {
    "reconstruction_weight": 2.0,
    "kl_weight": 3.0,
    "z1_weight": 5.0,
    "z2_weight": 7.0,
    "factorization_weight": 0.3,
}
# What multiplies nll, kl_z1, z1_sq, z2_sq, kl_z2; r = 4 and a prior of standard deviation 2 where Gamma enters.
COEFFICIENTS = {
    "official": (2, 3, -5, 7, 0),
    "paper": (2, 3, -0.3 * 4 / 2, 0.3 * 4 / 2 / 2**2, 0),
    "vae2lat": (1, 1, 0, 0, 1),
    "beta_vae2lat": (2, 3, 0, 0, 3),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("objective", COEFFICIENTS)
def test_neg_elbo_weighs_each_term(objective):
    config = FVAELoraConfig(r=4, objective=objective, z2_prior_std=2.0, **WEIGHTS)
    values = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0], dtype=torch.float64, requires_grad=True)
    value = neg_elbo(TokenTerms(*values), config)
    (gradient,) = torch.autograd.grad(value, values)
    coefficients = torch.tensor(COEFFICIENTS[objective], dtype=torch.float64)
    torch.testing.assert_close(gradient, coefficients)
    constant = 0.3 * 4 * math.log(2) if objective == "paper" else 0.0  # of Gamma
    assert value.item() == pytest.approx((coefficients @ values.detach()).item() + constant)


def test_nll_of_a_perfect_decoder():
    # Standard normal at its mean: D/2 log 2 pi, whatever the sampling.
    assert diag_gaussian_nll(torch.ones(1, 8), torch.ones(1, 8), torch.ones(8)).item() == pytest.approx(
        4 * math.log(2 * math.pi), rel=1e-6
    )
