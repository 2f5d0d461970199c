import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fvae_dist import FVAELoraConfig
from fvae_dist.adapter.objective import (
    TokenTerms,
    diag_gaussian_nll,
    kl_to_standard_normal,
    neg_elbo,
    token_terms,
    wide,
)

SHAPES = [(1, 5), (7, 3), (2, 5, 1), (3, 1, 1, 33), (0, 4)]
DTYPES = [torch.float32, torch.float64]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_is_that_of_torch(shape, dtype):
    mean, logvar = (gaussian(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
    kl = kl_to_standard_normal(mean, logvar)
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), prior).sum(-1)
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(kl, expected, rtol=rtol, atol=rtol)


def test_kl_of_the_prior_itself_is_zero():
    assert kl_to_standard_normal(torch.zeros(3, 4), torch.zeros(3, 4)).tolist() == [0.0] * 3


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


def test_kl_is_finite_at_the_clamps():
    assert kl_to_standard_normal(torch.zeros(1, 2), torch.tensor([[-20.0, 20.0]])).isfinite().all()


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


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_token_terms_are_the_defined_ones(shape):
    nll, (z1, z2, mean1, logvar1) = gaussian(*shape[:-1]), (gaussian(*shape, seed=seed) for seed in range(1, 5))
    terms = token_terms(nll, z1, z2, mean1, logvar1, z2_prior_mean=1.5)
    torch.testing.assert_close(terms.z1_sq, (z1**2).mean(-1))
    torch.testing.assert_close(terms.z2_sq, ((z2 - 1.5) ** 2).mean(-1))
    torch.testing.assert_close(terms.kl_z1, 0.5 * (mean1**2 + logvar1.exp() - 1 - logvar1).sum(-1))
    assert terms.nll is nll


@pytest.mark.parametrize("term", ["reconstruction", "z2", "z1", "kl"])
def test_neg_elbo_weighs_each_term(term):
    terms = TokenTerms(nll=torch.tensor(2.0), kl_z1=torch.tensor(3.0), z1_sq=torch.tensor(5.0), z2_sq=torch.tensor(7.0))
    value = {"reconstruction": 2.0, "z2": 7.0, "z1": -5.0, "kl": 3.0}[term]
    assert neg_elbo(terms, FVAELoraConfig()).item() == 2 + 7 - 5 + 3
    weighted = FVAELoraConfig(**{f"{term}_weight": 0.5})
    assert neg_elbo(terms, weighted).item() == 2 + 7 - 5 + 3 - 0.5 * value


def test_nll_of_a_perfect_decoder():
    # Standard normal at its mean: D/2 log 2 pi, whatever the sampling.
    assert diag_gaussian_nll(torch.ones(1, 8), torch.ones(1, 8), torch.ones(8)).item() == pytest.approx(
        4 * math.log(2 * math.pi), rel=1e-6
    )
