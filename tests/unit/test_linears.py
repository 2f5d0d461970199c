"""Many tokens a part at a time: the same losses and gradients, and nothing of (T, D) beside the gradient of x."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fvae_dist.adapter import linears
from fvae_dist.adapter.linears import Reconstruction
from fvae_dist.adapter.noise import GENERATOR, LayerNoise
from fvae_dist.adapter.vae import FactorizedVAE
from tests.models import tiny_adapter

FEATURES = 24
KINDS = [
    {},
    {"encoder_layers": 0},
    {"encoder_layers": 2, "encoder_shared_trunk": False},
    {"decoder_layers": 0, "latent_fusion": "average"},
    {"detach_input": True},
]


def vae(**settings) -> FactorizedVAE:
    torch.manual_seed(0)
    module = FactorizedVAE(FEATURES, tiny_adapter(**settings))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.train()


def inputs(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.requires_grad_()


def step(module: FactorizedVAE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, telemetry and all gradients of one forward and backward."""
    noise = LayerNoise(torch.arange(x[..., 0].numel()) * 12345, 3)
    z1, loss, *statistics = module(x, noise, True)
    leaves = {"x": x, **dict(module.named_parameters())}
    weights = torch.linspace(0.1, 1, loss.numel()).view(loss.shape)
    total = (loss * weights).sum() + (z1 * weights[..., None]).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    names = [name for name, gradient in zip(leaves, found) if gradient is not None]
    return {
        "z1": z1,
        "loss": loss,
        **{f"statistic {i}": value for i, value in enumerate(statistics)},
        **{f"gradient of {name}": gradient for name, gradient in zip(leaves, found) if name in names},
    }


@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)], ids=str
)
def test_parts_change_no_number(monkeypatch, settings, rows, dtype, tolerance):
    """3 x 5 tokens: parts that divide them, and parts of which the last is shorter."""
    module, x = vae(**settings), inputs(3, 5, FEATURES, dtype=dtype)
    if dtype == torch.float64:
        module = module.double()
    whole = step(module, x)
    monkeypatch.setattr(linears, "ELEMENTS", rows * FEATURES)
    parts = step(module, x)
    assert parts.keys() == whole.keys() and "gradient of decoder.scale" in whole
    for name, value in whole.items():
        assert parts[name].dtype == value.dtype and parts[name].shape == value.shape, name
        scale = float(value.detach().double().abs().max()) if value.numel() else 1.0
        torch.testing.assert_close(parts[name], value, rtol=tolerance, atol=tolerance * scale, msg=name)


def test_gradients_of_parts_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(linears, "ELEMENTS", 2 * 6)
    layer = Reconstruction(3, 6).double()
    hidden, x = (torch.randn(5, size, dtype=torch.float64).requires_grad_() for size in (3, 6))
    scale = (1 + torch.rand(6, dtype=torch.float64)).requires_grad_()

    def nll(hidden, x, weight, bias, scale):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (hidden, x, scale))

    assert "NLLByRows" in type(nll(hidden, x, layer.weight, layer.bias, scale).grad_fn.next_functions[0][0]).__name__
    assert torch.autograd.gradcheck(nll, (hidden, x, layer.weight, layer.bias, scale))


class Largest(TorchDispatchMode):
    """Counts tensors with as many elements as x that operations make anew."""

    def __init__(self, elements: int):
        super().__init__()
        self.elements, self.made, self.seen = elements, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage()._cdata for tensor in self.seen}
        for tensor in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            if tensor.numel() >= self.elements and tensor.untyped_storage()._cdata not in known:
                self.made.append(str(func))
                self.seen.append(tensor)  # alive, so that its address is not another's
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", KINDS[:4], ids=str)
def test_nothing_of_the_size_of_x_but_its_gradient(monkeypatch, settings, dtype):
    module, x = vae(**settings), inputs(400, FEATURES, dtype=dtype)
    monkeypatch.setattr(linears, "ELEMENTS", 8 * FEATURES)
    with Largest(x.numel()) as forward:
        forward.seen.append(x)
        z1, loss = module(x, GENERATOR)
    assert forward.made == []
    with Largest(x.numel()) as backward:
        backward.seen.append(x)
        (loss.sum() + z1.sum()).backward()
    # Of each product over x and of the likelihood one part of it, and their sums.
    products = 4 if settings.get("encoder_layers") in (0, 2) else 2
    assert 0 < len(backward.made) <= 2 * (products + 1), backward.made
