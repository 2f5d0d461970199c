"""A training run that the reference and we can both do: two adapted linears, tanh between them, noise given.

The loss is w_task mean((y - target)^2) + the mean of the two layers' negative ELBOs.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from tests.parity.cases import build_layer, fill, make_case, random_tensors, settings_of

NUM_STEPS = 50
CHECKPOINTS = (1, 5, 20, 50)
# Gradient descent diverges at 3e-4 (w_task = 1000); AdamW moves by about its rate a step.
LEARNING_RATES = {"SGD": 1e-4, "AdamW": 2e-2}
SIZES = (6, 5, 4)
CASES = [
    make_case(in_features=a, out_features=b, latent_dim=3, enc_hidden_layer=4, dec_num_of_layer=2, lora_alpha=6.0)
    for a, b in pairwise(SIZES)
]


def make_tensors() -> dict[str, Tensor]:
    """Start and data of the run, float64: weights `K.NAME` of layer K, `x`, `target`, and `noise` of every step."""
    tensors = {}
    for index, case in enumerate(CASES):
        made = random_tensors(case, seed=index)
        x = made.pop("x")
        tensors |= {f"{index}.{key}": tensor for key, tensor in made.items() if not key.startswith("eps")}
        if index == 0:
            tensors["x"] = x
    generator = torch.Generator().manual_seed(2)
    batch = tensors["x"].shape[:-1]
    tensors["target"] = torch.randn((*batch, SIZES[-1]), generator=generator, dtype=torch.float64)
    shape = (NUM_STEPS, len(CASES), 2, *batch, CASES[0]["latent_dim"])
    tensors["noise"] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return tensors


def reference_job(optimizer: str) -> dict:
    return {
        "kind": "trajectory",
        "settings": settings_of(CASES[0]),
        "lora_alpha": CASES[0]["lora_alpha"],
        "optimizer": optimizer,
        "lr": LEARNING_RATES[optimizer],
        "checkpoints": CHECKPOINTS,
    }


class TwoLayers(nn.Module):
    """Our side of the run."""

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        of_layers = [
            {key.removeprefix(f"{index}."): t for key, t in tensors.items() if key.startswith(f"{index}.")}
            for index in range(len(CASES))
        ]
        self.layers = nn.ModuleList(fill(build_layer(case), given) for case, given in zip(CASES, of_layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](torch.tanh(self.layers[0](x)))
