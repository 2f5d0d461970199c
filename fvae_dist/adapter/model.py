"""The PEFT tuner: which layers are adapted, and how their weights are named on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from fvae_dist.adapter.layer import FVAELinear, linear_features
from fvae_dist.adapter.registration import PREFIX


class FVAELoraModel(BaseTuner):
    """Injects FVAE-LoRA into a model; made by `get_peft_model` and `PeftModel.from_pretrained`.

    Raises:
        ValueError: a target matches nothing, or something that is no linear layer; names what could match.
    """

    prefix: str = PREFIX
    tuner_layer_cls = FVAELinear
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._check_adapter_names(model)
        self._check_targets(model, self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_adapter_names(self, model: nn.Module) -> None:
        """To save one of several adapters PEFT drops every key that has another adapter's name in it."""
        if len(self.peft_config) < 2:
            return
        keys = (re.sub(rf"\.({PREFIX}\w+|modules_to_save)\.[^.]+", "", name) for name, _ in model.named_parameters())
        clashes = sorted(self.peft_config.keys() & {part for key in keys for part in key.split(".")})
        if clashes:
            raise ValueError(
                f"adapter name {clashes[0]!r} is part of a parameter's name, so that saving another adapter would lose "
                "that parameter; choose another name"
            )

    def _check_targets(self, model: nn.Module, config: Any) -> None:
        """Check before anything is changed that every target matches, and matches linear layers only.

        PEFT passes over a name (or a layer index) that matches nothing as long as another one does.
        """
        targets = config.target_modules
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            return
        modules = dict(outside_adapters(model))
        names = list(modules)
        if isinstance(targets, str):
            missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
        else:
            missing = [t for t in sorted(targets) if not any(n == t or n.endswith(f".{t}") for n in names)]
        if missing:
            raise ValueError(
                f"target_modules: {', '.join(map(repr, missing))} matches no module of {type(model).__name__}; "
                f"could match: {', '.join(adaptable_names(model))}"
            )
        matched = [name for name in names if self._check_target_module_exists(config, name)]
        for name in matched:
            self._require_linear(model, name, modules[name])
        indexes = config.layers_to_transform
        for index in [indexes] if isinstance(indexes, int) else indexes or []:
            of_index = copy(config)
            of_index.layers_to_transform = [index]
            if not any(self._check_target_module_exists(of_index, name) for name in matched):
                raise ValueError(f"layers_to_transform: {index} matches no module of {type(model).__name__}")

    @staticmethod
    def _require_linear(model: nn.Module, name: str, module: Any) -> None:
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if linear_features(base) is None:
            raise ValueError(
                f"target_modules: {name} is a {type(base).__name__}, not a linear layer that can be adapted; "
                f"could match: {', '.join(adaptable_names(model))}"
            )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, FVAELinear):
            target.update_layer(adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                target.set_requires_grad(adapter_name, False)
            return
        self._require_linear(self.model, current_key, target)
        new_module = FVAELinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        # Not PEFT's _replace_module: it needs a base layer with parameters. The layer has chosen its device already.
        setattr(parent, target_name, new_module)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # ...q_proj.fvae_vae.NAME.encoder1.mean.weight: PEFT's own rule expects the name near the end of the key.
        return re.sub(rf"\.({PREFIX}\w+)\.{re.escape(adapter_name)}\.", r".\1.", key, count=1)


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's named modules but for itself and the insides of adapted layers."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FVAELinear))
    return ((name, module) for name, module in model.named_modules() if name and not name.startswith(inside))


def adaptable_names(model: nn.Module) -> list[str]:
    """Last name components of the modules that can be adapted, sorted."""
    return sorted({name.rpartition(".")[2] for name, module in outside_adapters(model) if linear_features(module)})
