"""The PEFT tuner: which layers are adapted, and how their weights are named on disk."""

from __future__ import annotations

import re
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from fvae_dist.adapter.config import FVAELoraConfig
from fvae_dist.adapter.layer import FVAELinear, linear_features
from fvae_dist.adapter.registration import PREFIX


class FVAELoraModel(BaseTuner):
    """Injects FVAE-LoRA into a model; made by `get_peft_model` and `PeftModel.from_pretrained`.

    Raises:
        ValueError: a target matches nothing, or something that is no linear layer; names what could match.
    """

    prefix: str = PREFIX
    tuner_layer_cls = FVAELinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._check_targets(model, self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _check_targets(self, model: nn.Module, config: FVAELoraConfig) -> None:
        """Every named target must match a module: PEFT passes over one that does not as long as another does."""
        targets = config.target_modules
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            return
        names = [name for name, _ in model.named_modules()]
        if isinstance(targets, str):
            missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
        else:
            missing = [t for t in sorted(targets) if not any(n == t or n.endswith(f".{t}") for n in names)]
        if missing:
            raise ValueError(
                f"target_modules: {', '.join(map(repr, missing))} matches no module of {type(model).__name__}; "
                f"could match: {', '.join(adaptable_names(model))}"
            )

    def _create_and_replace(
        self,
        peft_config: FVAELoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        if isinstance(target, FVAELinear):
            target.update_layer(adapter_name, peft_config)
            if adapter_name not in self.active_adapters:
                target.set_requires_grad(adapter_name, False)
            return
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if linear_features(base) is None:
            raise ValueError(
                f"target_modules: {current_key} is a {type(target).__name__}, not a linear layer; "
                f"could match: {', '.join(adaptable_names(self.model))}"
            )
        new_module = FVAELinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)
        self._replace_module(parent, target_name, new_module, target)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # ...q_proj.fvae_vae.NAME.encoder1.mean.weight: PEFT's own rule expects the name near the end of the key.
        return re.sub(rf"\.({PREFIX}\w+)\.{re.escape(adapter_name)}\.", r".\1.", key, count=1)


def adaptable_names(model: nn.Module) -> list[str]:
    """Last name components of the modules that can be adapted, sorted."""
    adapted = [name for name, module in model.named_modules() if isinstance(module, FVAELinear)]
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if name and linear_features(module) is not None and not any(name.startswith(a + ".") for a in adapted)
        }
    )
