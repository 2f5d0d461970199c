"""What the reference code calls things: its settings and the tensors of one adapted layer, and ours for them.

The reference is idiap/FVAE-LoRA, commit 1dfd8af, a fork of PEFT 0.13. This is the only place that knows its names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from fvae_dist.adapter.config import FVAELoraConfig

PEFT_TYPE = "FVAEPEFT"
# The reference's setting -> our field, and the value the reference takes where the setting is left out.
_SETTINGS: dict[str, tuple[str, Any]] = {
    "latent_dim": ("r", 128),
    "latent_fusion": ("latent_fusion", "concat"),
    "enc_num_of_layer": ("encoder_layers", 3),
    "enc_hidden_layer": ("encoder_hidden", 1024),
    "enc_dropout": ("encoder_dropout", 0.1),
    "encoder_use_common_hidden_layer": ("encoder_shared_trunk", True),
    "dec_num_of_layer": ("decoder_layers", 3),
    "dec_hidden_layer": ("decoder_hidden", 1024),
    "dec_dropout": ("decoder_dropout", 0.1),
    "z2_latent_mean": ("z2_prior_mean", 1.5),
    "z2_latent_std": ("z2_prior_std", 1.0),
    "lambda_downstream": ("task_weight", 1.0),
    "lambda_reconstruction": ("reconstruction_weight", 1.0),
    "lambda_z2_l2": ("z2_weight", 1.0),
    "lambda_z1_l2": ("z1_weight", 1.0),
    "lambda_kl_z1": ("kl_weight", 1.0),
}
_OF_PEFT = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "task_type",
    "base_model_name_or_path",
    "revision",
)
# Settings with one value that this method has; any other value would be another model, or another objective.
_FIXED: dict[str, Any] = {
    "num_of_z_sampled": 1,
    "encoder_nn_type": "mlp",
    "decoder_nn_type": "mlp",
    "force_classical_vae": False,
    "force_classical_ae": False,
    "force_test_vae": False,
    "force_minhyp": False,
    "bias": "none",
    "layer_replication": None,
}
# Read by nothing that the reference computes: most come with its LoraConfig, whose `r` is not the latent dimension.
_WITHOUT_EFFECT = {
    "alpha_pattern",
    "auto_mapping",
    "dec_l2_reg",
    "enc_l2_reg",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "input_dim",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "runtime_config",
    "scalar_decoder_std",
    "use_dora",
    "use_rslora",
    "z1z2_orthogonal_reg",
}
_ENCODERS = "lora_A.views_conditionalGaussianEncoders_list"
_DECODER = "lora_A.views_conditionalGaussianDecoders"
_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_[ABE]|ranknum)(?:\.(?P<adapter>(?!views_)[^.]+))?(?P<rest>\.views_.+)?"
)
_SAVED_KEY = re.compile(r"(.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(.+)")
_UNUSED = ("lora_E", "ranknum")


# The settings that the shapes and names of the tensors determine.
INFERRED = {
    "latent_dim",
    "latent_fusion",
    "enc_num_of_layer",
    "enc_hidden_layer",
    "encoder_use_common_hidden_layer",
    "dec_num_of_layer",
    "dec_hidden_layer",
}


class OfficialTensors(NamedTuple):
    """The tensors of one adapter; `layers` maps a module to its tensors by `official_name`, `others` is the rest."""

    layers: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]


def official_config(settings: Mapping[str, Any]) -> FVAELoraConfig:
    """Our configuration for the reference's settings.

    A setting that is left out has the reference's default, but for lora_alpha, which decides the outputs and has to be
    given. As in the reference, `lora_alpha` <= 0 means the latent dimension, LoRA's own `r`, `lora_dropout`, `use_dora`
    and `use_rslora` do nothing, and `layers_to_transform` does nothing beside a string of target modules.

    Raises:
        ValueError: an unknown setting, or one that has no counterpart here; the message names them.
    """
    _refuse_unsupported(settings)
    values = {ours: settings.get(theirs, default) for theirs, (ours, default) in _SETTINGS.items()}
    values |= {name: settings[name] for name in _OF_PEFT if settings.get(name) not in (None, "", [])}
    values["encoder_hidden"] = _one_width(settings, "enc_hidden_layer", "enc_num_of_layer")
    values["decoder_hidden"] = _one_width(settings, "dec_hidden_layer", "dec_num_of_layer")
    alpha = settings["lora_alpha"]
    values["lora_alpha"] = values["r"] if isinstance(alpha, (int, float)) and alpha <= 0 else alpha
    if isinstance(values.get("target_modules"), str):
        values.pop("layers_to_transform", None)
    if "layers_to_transform" not in values:
        values.pop("layers_pattern", None)
    try:
        return FVAELoraConfig(**values)
    except ValueError as error:
        raise ValueError(f"these settings of the reference define no adapter here: {error}") from None


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
    known = {*_SETTINGS, *_OF_PEFT, *_FIXED, *_WITHOUT_EFFECT, "lora_alpha"}
    # One that is off or empty does nothing, whatever it would be.
    unknown = sorted(name for name, value in settings.items() if name not in known and value)
    if unknown:
        raise ValueError(f"unknown settings: {', '.join(unknown)}")
    wrong = [name for name, value in _FIXED.items() if (settings.get(name) or value) != value]
    if wrong:
        shown = ", ".join(f"{name} = {settings[name]!r}" for name in wrong)
        raise ValueError(f"settings of the reference that FVAE-LoRA here does not have: {shown}")
    if settings.get("lora_alpha") is None:
        raise ValueError("lora_alpha is missing: it decides the outputs and cannot be read off the tensors")


def _one_width(settings: Mapping[str, Any], width: str, depth: str) -> Any:
    """A width that the reference states as one number or as a list, one a hidden layer."""
    value = settings.get(width, _SETTINGS[width][1])
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) != settings.get(depth, _SETTINGS[depth][1]) or len(set(value)) != 1:
        raise ValueError(f"{width} = {value!r}: needs {depth} equal widths; layers of different widths do not exist")
    return value[0]


def official_name(name: str, shared_trunk: bool) -> str:
    """The reference's name of one of our parameters within an adapted layer.

    Args:
        name: such as `fvae_vae.encoder1.trunk.linears.0.weight`, without an adapter name.
        shared_trunk: `encoder_shared_trunk` of its configuration.

    Returns:
        Such as `lora_A.views_conditionalGaussianEncoders_list.0.layers.0.weight`, without an adapter name.
    """
    for ours, theirs in {
        "fvae_lora_B.weight": "lora_B",
        "fvae_vae.encoder1.": f"{_ENCODERS}.0.",
        "fvae_vae.encoder2.": f"{_ENCODERS}.1.",
        ".logvar_trunk.linears.": ".layers_logvar.",
        ".trunk.linears.": ".layers." if shared_trunk else ".layers_mean.",
        "fvae_vae.decoder.layers.linears.": f"{_DECODER}.layers.",
        "fvae_vae.decoder.output.": f"{_DECODER}.output_layer.",
        "fvae_vae.decoder.scale": f"{_DECODER}.scale_tril",
    }.items():
        name = name.replace(ours, theirs)
    return name


def group_tensors(tensors: Mapping[str, Tensor], adapter_name: str) -> OfficialTensors:
    """Sort a state dict of the reference by module: prefixes and adapter names removed, what it never used dropped.

    Args:
        adapter_name: taken where the state dict holds several adapters.

    Raises:
        ValueError: no adapter of the reference, or several and none of this name.
    """
    matches = {key: _KEY.fullmatch(key.removeprefix("base_model.model.")) for key in tensors}
    names = sorted({str(match["adapter"]) for match in matches.values() if match})
    if not names:
        raise ValueError("no tensor has a name that an adapter of the reference code has (...lora_A.views_..., lora_B)")
    if len(names) > 1 and adapter_name not in names:
        raise ValueError(f"holds several adapters ({', '.join(names)}) and none is named {adapter_name!r}")
    wanted = names[0] if len(names) == 1 else adapter_name
    layers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, match in matches.items():
        if match is None:
            saved = _SAVED_KEY.fullmatch(key)
            if saved is None or saved["adapter"] == wanted or len(names) == 1:
                others[_SAVED_KEY.sub(r"\1.\3", key).removeprefix("base_model.model.")] = tensors[key]
        elif str(match["adapter"]) == wanted:
            layer = layers.setdefault(match["module"], {})
            if match["part"] not in _UNUSED or match["rest"]:
                layer[match["part"] + (match["rest"] or "")] = tensors[key]
    return OfficialTensors(layers, others)


def infer_settings(found: OfficialTensors) -> dict[str, Any]:
    """The settings of `INFERRED`, read off the tensors.

    Raises:
        ValueError: the layers disagree, or a tensor that decides is missing.
    """
    of_layers = {module: _infer_layer(module, layer) for module, layer in found.layers.items()}
    settings = next(iter(of_layers.values()))
    for module, other in of_layers.items():
        if other != settings:
            raise ValueError(f"the layers differ: {settings} in {next(iter(of_layers))}, {other} in {module}")
    return settings


def _infer_layer(module: str, layer: dict[str, Tensor]) -> dict[str, Any]:
    try:
        r = layer["lora_B"].shape[1]
        mean = layer[f"{_ENCODERS}.0.mean.weight"]
        output = layer[f"{_DECODER}.output_layer.weight"]
    except (KeyError, IndexError) as error:
        raise ValueError(f"{module}: {error} is missing or no matrix, so that the sizes cannot be told") from None
    shared = f"{_ENCODERS}.0.layers_mean.0.weight" not in layer
    encoder_layers = _count(layer, f"{_ENCODERS}.0.{'layers' if shared else 'layers_mean'}")
    decoder_layers = _count(layer, f"{_DECODER}.layers")
    latents = (layer[f"{_DECODER}.layers.0.weight"] if decoder_layers else output).shape[1]
    if latents not in (r, 2 * r):
        raise ValueError(f"{module}: a decoder of {latents} inputs fits no latent_fusion of two latents of {r}")
    return {
        "latent_dim": r,
        "latent_fusion": "concat" if latents == 2 * r else "average",
        "enc_num_of_layer": encoder_layers,
        # Without hidden layers the heads read x itself: its width is no setting, and differs between layers.
        "enc_hidden_layer": mean.shape[1] if encoder_layers else 1,
        "encoder_use_common_hidden_layer": shared,
        "dec_num_of_layer": decoder_layers,
        "dec_hidden_layer": output.shape[1],
    }


def _count(layer: dict[str, Tensor], prefix: str) -> int:
    """How many linears the list `prefix` has, counted from 0 up."""
    number = 0
    while f"{prefix}.{number}.weight" in layer:
        number += 1
    return number
