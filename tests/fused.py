"""A VAE as trained, its outputs and gradients by either kernel, and how far they are from a float64 reference."""

from __future__ import annotations

import torch

from fvae_dist.adapter.noise import LayerNoise
from fvae_dist.adapter.vae import FactorizedVAE
from tests.models import tiny_adapter

FP32_RTOL, BF16_RTOL = 1e-4, 1.6e-2
SALT = -987_654_321_987_654


def make(features: int, **settings) -> FactorizedVAE:
    """A VAE as trained: nothing is zero, outputs of each layer are of the order of its inputs."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    module = FactorizedVAE(features, tiny_adapter(**{"z2_prior_std": 1.3, **settings}))
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.2 if parameter.dim() < 2 else parameter.shape[1] ** -0.5
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def run(module: FactorizedVAE, x: torch.Tensor, kernel: str) -> dict[str, torch.Tensor]:
    """Outputs and all gradients of a task loss of z1 and a weighted sum of the token losses."""
    generator = torch.Generator().manual_seed(7)
    module.config.kernel = kernel
    x = x.detach().clone().requires_grad_()
    keys = torch.randint(-(2**62), 2**62, (len(x),), generator=generator).to(x.device)
    z1, loss = module(x, LayerNoise(keys, SALT))
    task = torch.randn(z1.shape, generator=generator).to(z1)
    weights = torch.rand(loss.shape, generator=generator).to(z1)
    module.zero_grad()
    ((z1 * task).sum() + (loss * weights).sum()).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"z1": z1.detach(), "loss": loss.detach(), "x": x.grad, **gradients}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative error in norm, and of what."""
    assert found.keys() == expected.keys()
    return max(
        (float((found[name].double() - value).norm() / value.norm().clamp(min=1e-30)), name)
        for name, value in expected.items()
    )
