"""The floor and the operation counts against hand counts, and against what torch counts on the real modules."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from fvae_dist import side_loss
from fvae_dist.adapter import FVAELinear, FVAELoraConfig
from fvae_dist.benchmarking.floor import Ceilings, LayerSize, Phase, base_floor, fvae_floor, lora_floor, num_parameters
from fvae_dist.benchmarking.flops import ModelSize, attention_forward, size_of
from fvae_dist.benchmarking.trial import config_of
from tests.models import LayerModel

SIZE = LayerSize(dim=6, out_dim=5, tokens=7, item_bytes=2)
SMALL = FVAELoraConfig(r=2, encoder_layers=1, encoder_hidden=3, decoder_layers=2, decoder_hidden=4)
CONFIGS = [
    SMALL,
    FVAELoraConfig(r=3, encoder_layers=2, encoder_hidden=4, encoder_shared_trunk=False, latent_fusion="average"),
    FVAELoraConfig(r=3, encoder_layers=0, decoder_layers=0),
]


def test_fvae_floor_by_hand():
    floor = fvae_floor(SIZE, SMALL)
    # A token's multiplications: two encoders (6 x 3 and two heads 3 x 2), decoder 4 x 4, 4 x 4, 4 x 6, B 2 x 5.
    assert floor.forward.operations == 2 * 7 * (2 * (18 + 12) + 16 + 16 + 24 + 10)
    # All of these twice (weight, input), and 4 x 6 once more for xhat.
    assert floor.backward.operations == 2 * floor.forward.operations + 2 * 7 * 24
    # Encoders (21 + 2 x 8 each), decoder 20 + 20 + 30, scale 6, B 10; all fp32.
    parameters = 4 * (2 * 37 + 70 + 6 + 10)
    x, y, z1, loss = 2 * 7 * 6, 2 * 7 * 5, 2 * 7 * 2, 4 * 7
    assert floor.forward.num_bytes == x + parameters + z1 + 2 * y + loss
    assert floor.backward.num_bytes == x + y + z1 + parameters + x + parameters
    assert floor.recompute == floor.forward


def test_lora_and_base_floor_by_hand():
    lora, base = lora_floor(SIZE, r=2), base_floor(SIZE)
    assert lora.forward.operations == 2 * 7 * (6 * 2 + 2 * 5)
    assert lora.backward.operations == 2 * lora.forward.operations
    assert lora.forward.num_bytes == 2 * 7 * 6 + 4 * 22 + 2 * 7 * 2 + 2 * 2 * 7 * 5
    assert lora.backward.num_bytes == 2 * (7 * 6 + 7 * 5 + 7 * 2 + 7 * 6) + 2 * 4 * 22
    assert base.forward == base.backward == Phase(2 * (7 * 6 + 7 * 5 + 30), 2 * 7 * 30)


@pytest.mark.parametrize("config", CONFIGS)
def test_floor_counts_the_products_that_the_layer_runs(config):
    linear = nn.Linear(6, 5, bias=False).requires_grad_(False)
    model = LayerModel(FVAELinear(linear, "default", config)).train()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == num_parameters(6, 5, config)
    x = torch.randn(1, 7, 6, requires_grad=True)
    floor, base = fvae_floor(SIZE, config), base_floor(SIZE)
    with FlopCounterMode(display=False) as forward, side_loss.collect(model, terms=False) as collected:
        y = model(x)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward([y, collected.neg_elbo], [torch.ones_like(y), None])
    assert forward.get_total_flops() == floor.forward.operations + base.forward.operations
    # This implementation keeps xhat.
    xhat = 2 * 7 * 6 * (config.decoder_hidden if config.decoder_layers else 2 * config.r)
    assert backward.get_total_flops() == floor.backward.operations - xhat + base.backward.operations


def test_seconds_are_of_the_slower_of_bytes_and_operations():
    ceilings = Ceilings(bytes_per_s=10.0, operations_per_s=100.0)
    assert (Phase(20, 100).seconds(ceilings), Phase(20, 100).bound(ceilings)) == (2.0, "bytes")
    assert (Phase(20, 400).seconds(ceilings), Phase(20, 400).bound(ceilings)) == (4.0, "operations")
    floor = fvae_floor(SIZE, SMALL)
    once, twice = floor.seconds(ceilings), floor.seconds(ceilings, recompute=True)
    assert twice - once == pytest.approx(floor.forward.seconds(ceilings))
    assert floor.operations(recompute=True) - floor.operations() == floor.forward.operations


def test_attention_operations_are_half_of_what_torch_counts():
    q = torch.randn(1, 4, 8, 16)
    with FlopCounterMode(display=False) as counter:
        (q @ q.transpose(2, 3)) @ q
    assert attention_forward(8, heads=4, head_dim=16) == counter.get_total_flops() / 2


def test_operations_of_a_step_by_hand():
    size = ModelSize(linear_parameters=100, layers=2, heads=3, head_dim=5)
    attention = 2 * (2 * 7 * 7 * 3 * 5)  # layers x two products of 2 T^2 h d, half of them masked
    assert size.model_operations(7) == 4 * 100 * 7 + 3 * attention
    assert size.hardware_operations(7, False, 11.0) == 4 * 100 * 7 + 3.5 * attention + 11
    assert size.hardware_operations(7, True, 11.0) == 6 * 100 * 7 + 4.5 * attention + 11


@pytest.mark.parametrize(
    ("shape", "linears"),
    [
        ("tiny", 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160) + 64 * 1024),
        ("8b", 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256),
    ],
)
def test_linear_parameters_of_a_model(shape, linears):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    size = size_of(model)
    assert size.linear_parameters == linears
    assert size.heads * size.head_dim == model.config.hidden_size
