"""The reference code's layer (idiap/FVAE-LoRA, a fork of PEFT 0.13), from a clone that the user names.

Nothing of it is part of this project. Its package is named `peft` as the one installed here, so that for the import it
takes that name's place; the classes that come out keep the fork's modules, everything else keeps the installed ones.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fvae_dist.benchmarking.variants import AdapterSize

_LAYER = "peft.tuners.fvae_peft.fvae_peft_mlp_layer"


def source_folder(clone: str) -> Path:
    """Where the clone holds its PEFT.

    Raises:
        ValueError: it is no clone of the reference.
    """
    folder = Path(clone) / "peft" / "src"
    if not (folder / Path(*_LAYER.split(".")).with_suffix(".py")).is_file():
        raise ValueError(f"{clone} is no clone of idiap/FVAE-LoRA: it has no peft/src/{_LAYER.replace('.', '/')}.py")
    return folder


def build_reference_layer(clone: str, base: nn.Linear, size: AdapterSize) -> nn.Module:
    """The reference's layer around `base`, in training mode; its adapter is fp32, as PEFT makes a LoRA's.

    After a forward its negative ELBO stands in `fvae_peft_current_elbo`.

    Raises:
        ValueError: no clone of the reference, or one that cannot be imported here.
    """
    try:
        with _in_place_of_peft(source_folder(clone)):
            config_cls = importlib.import_module("peft").FVAEPEFTConfig
            layer_cls = importlib.import_module(_LAYER).FVAEPEFTLoraLayerWrapped
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the reference code cannot be imported: {error}") from None
    config = config_cls(**_settings(size))
    layer = layer_cls(base, "default", config, r=size.r, lora_alpha=size.r).to(base.weight.device)
    for name, parameter in layer.named_parameters():
        if name.startswith("lora_"):
            parameter.data = parameter.data.float()
        if name.startswith("lora_E"):
            parameter.requires_grad_(False)  # nothing reads it
    return layer.train()


def reference_loss(layer: Any) -> torch.Tensor:
    """What the layer's last forward left to be added to the loss; taken, so that it is not kept alive."""
    loss, layer.fvae_peft_current_elbo = layer.fvae_peft_current_elbo, 0
    return loss


def _settings(size: AdapterSize) -> dict[str, Any]:
    return {
        "latent_dim": size.r,
        "enc_num_of_layer": size.encoder_layers,
        "enc_hidden_layer": size.encoder_hidden,
        "enc_dropout": size.dropout,
        "dec_num_of_layer": size.decoder_layers,
        "dec_hidden_layer": size.decoder_hidden,
        "dec_dropout": size.dropout,
        "lambda_downstream": 1000.0,
    }


@contextmanager
def _in_place_of_peft(folder: Path) -> Iterator[None]:
    """Inside, `import peft` finds the package in `folder`; afterwards the installed one again."""
    installed = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_peft(name)}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if _is_peft(name)]:
            del sys.modules[name]
        sys.modules.update(installed)


def _is_peft(module: str) -> bool:
    return module == "peft" or module.startswith("peft.")
