"""What the parity tests run on: settings under the reference's names, tensors for them, and our layer for both."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from fvae_dist.adapter import FVAELinear
from fvae_dist.adapter.official import official_config, official_name

DATA = Path(__file__).parent / "data"
RECORDED = json.loads((DATA / "index.json").read_text())
# What a case says beside the reference's configuration.
OF_LAYER = ("in_features", "out_features", "tiny_variance")


def settings_of(case: dict) -> dict:
    """The part of a case that is the reference's configuration."""
    return {name: value for name, value in case.items() if name not in OF_LAYER}


def make_case(**changes) -> dict:
    """The recorded `default` case on a smaller linear, with `changes`.

    Without hidden layers the reference's heads and output layer take their input for one of the hidden width: it runs
    only where the two agree, so they are made to.
    """
    case = {**RECORDED["default"], "in_features": 6, "out_features": 5, "dec_hidden_layer": 7, **changes}
    if case["enc_num_of_layer"] == 0:
        case["enc_hidden_layer"] = case["in_features"]
    if case["dec_num_of_layer"] == 0:
        case["dec_hidden_layer"] = case["latent_dim"] * (2 if case["latent_fusion"] == "concat" else 1)
    return case


NEW_RECORDINGS = {
    "linear_encoder": make_case(enc_num_of_layer=0, dec_num_of_layer=1, latent_dim=3),
    "linear_decoder": make_case(dec_num_of_layer=0, latent_dim=2),
    "separate_trunks": make_case(enc_num_of_layer=2, encoder_use_common_hidden_layer=False, dec_num_of_layer=1),
    "rank_one": make_case(latent_dim=1, enc_num_of_layer=3, dec_num_of_layer=1, latent_fusion="average"),
    "rank_eight": make_case(latent_dim=8, dec_num_of_layer=1, lora_alpha=3.0, z2_latent_mean=-0.5),
}


def grid() -> dict[str, dict]:
    """Every depth of encoder and decoder with shared and separate trunks; ranks 1 to 8 and both fusions in turn."""
    combinations = [(depth, decoder, shared) for depth in range(4) for decoder in (0, 1) for shared in (True, False)]
    return {
        f"encoder{depth}_decoder{decoder}_{'shared' if shared else 'separate'}": make_case(
            enc_num_of_layer=depth,
            dec_num_of_layer=decoder,
            encoder_use_common_hidden_layer=shared,
            latent_dim=1 + number % 8,
            latent_fusion=("concat", "average")[number // 2 % 2],
            enc_hidden_layer=3 + number % 3,
            lambda_kl_z1=0.5 * (1 + number % 4),
        )
        for number, (depth, decoder, shared) in enumerate(combinations)
    }


def build_layer(case: dict) -> FVAELinear:
    """Our layer for a case, in float64, its base a linear without a bias."""
    linear = nn.Linear(case["in_features"], case["out_features"], bias=False).requires_grad_(False)
    return FVAELinear(linear, "default", official_config(settings_of(case))).double()


def keys(layer: FVAELinear) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the names the data has: the reference's, with `fvae.` for `lora_A.`."""
    shared = layer.fvae_config["default"].encoder_shared_trunk
    return {
        official_name(name.replace(".default", ""), shared).replace("lora_A.", "fvae."): parameter
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer")
    }


def fill(layer: FVAELinear, tensors: dict[str, Tensor]) -> FVAELinear:
    """Give a layer the weights in `tensors` (`W` and `keys`)."""
    with torch.no_grad():
        layer.base_layer.weight.copy_(tensors["W"])
        for key, parameter in keys(layer).items():
            parameter.copy_(tensors[key])
    return layer


def random_tensors(case: dict, seed: int = 0) -> dict[str, Tensor]:
    """Weights, input (2, 3, D) and noise for a case, float64; no weight is zero and every scale positive."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {key: 0.4 * normal(*parameter.shape) for key, parameter in keys(build_layer(case)).items()}
    for key in tensors:
        if key.endswith("scale_tril"):
            tensors[key] = 0.5 + tensors[key].abs()
    tensors |= {"W": normal(case["out_features"], case["in_features"]), "x": normal(2, 3, case["in_features"])}
    return tensors | {name: normal(2, 3, case["latent_dim"]) for name in ("eps1", "eps2")}
