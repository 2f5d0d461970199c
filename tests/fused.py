"""A VAE, or a block of adapted layers, as trained: outputs and gradients by either kernel, and their distance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from peft import get_peft_model
from torch import nn

from fvae_dist import side_loss
from fvae_dist.adapter.noise import LayerNoise, TokenNoise
from fvae_dist.adapter.vae import FactorizedVAE
from fvae_dist.kernels import launching
from tests.models import named_gradients, randomise, tiny_adapter

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
    gradients = named_gradients(module)
    return {"z1": z1.detach(), "loss": loss.detach(), "x": x.grad, **gradients}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative error in norm, and of what."""
    assert found.keys() == expected.keys()
    return max(
        (float((found[name].double() - value).norm() / value.norm().clamp(min=1e-30)), name)
        for name, value in expected.items()
    )


@contextmanager
def by_products(rows: int) -> Iterator[None]:
    """In 16 bit the likelihood's backward by the matrix library's products, so many tokens at a time, however few there
    are; 0: nothing is changed."""
    if not rows:
        yield
        return
    with patch.object(launching, "PRODUCT_TOKENS", 1), patch.object(launching, "PRODUCT_ROWS", rows):
        launching.plan_of.cache_clear()
        try:
            yield
        finally:
            launching.plan_of.cache_clear()


class Projections(nn.Module):
    """Linears of one width in, called with one input but where another is given for the last of them."""

    def __init__(self, features: int, widths: dict[str, int]):
        super().__init__()
        for name, width in widths.items():
            self.add_module(name, nn.Linear(features, width, bias=False))
        self.names = list(widths)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> list[torch.Tensor]:
        inputs = [x] * (len(self.names) - 1) + [x if other is None else other]
        return [getattr(self, name)(value) for name, value in zip(self.names, inputs, strict=True)]


def make_block(features: int, widths: dict[str, int], kernel: str, **settings) -> nn.Module:
    """Frozen projections, all of them adapted, in training mode."""
    torch.manual_seed(0)
    config = tiny_adapter(target_modules=list(widths), kernel=kernel, **settings)
    return randomise(get_peft_model(Projections(features, widths), config)).train()  # type: ignore[arg-type]


def run_block(model: nn.Module, x: torch.Tensor, other: torch.Tensor | None = None, terms: bool = False):
    """Outputs, the side loss of each layer, all gradients and, on request, the terms; noise is keyed by token."""
    generator = torch.Generator().manual_seed(7)
    x = x.detach().clone().requires_grad_()
    noise = TokenNoise({"input_ids": torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2])}, seed=1, step=2)
    noise.keys = noise.keys.to(x.device)
    model.zero_grad()
    with side_loss.collect(model, noise=noise, terms=terms) as collected:
        outputs = model(x, other)
    task = sum((y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in outputs)
    (task + collected.neg_elbo).backward()
    gradients = named_gradients(model)
    named = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    found = {**named, "neg_elbo": collected.neg_elbo.detach(), "x": x.grad, **gradients}
    return found | (collected.terms if terms else {}), collected.layer_names
