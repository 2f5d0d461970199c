"""The PEFT tuner: which layers are adapted, what can be done with adapters, how their weights are named on disk."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any

from peft.tuners.lora.model import _adapter_names_pre_forward_hook, _get_encoder
from peft.tuners.tuners_utils import BaseTuner, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fvae_dist.adapter.flat import split_flat
from fvae_dist.adapter.layer import FVAELinear, linear_features, rename_key, renamed
from fvae_dist.adapter.registration import PREFIX
from fvae_dist.adapter.together import followers_of

# In a mixed batch: a sample that no adapter touches.
BASE = "__base__"


class FVAELoraModel(BaseTuner):
    """Injects FVAE-LoRA into a model; made by `get_peft_model` and `PeftModel.from_pretrained`.

    Raises:
        ValueError: a target matches nothing, or something that is no linear layer; names what could match.
    """

    prefix: str = PREFIX
    tuner_layer_cls = FVAELinear
    peft_config: dict[str, Any]
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # ----------------------------------------------------------------------------------------- adding, naming, deleting

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        if config.inference_only and not config.inference_mode:
            raise ValueError(self._untrainable(adapter_name))
        self._check_adapter_names(model, self.peft_config)
        self._check_targets(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for block in model.modules():
            for name, child in block.named_children():
                if isinstance(child, FVAELinear):
                    child.followers = followers_of(block, name, FVAELinear)

    @staticmethod
    def _untrainable(adapter_name: str) -> str:
        return (
            f"adapter {adapter_name!r} is inference_only: it has neither encoder 2 nor a decoder, so it cannot be "
            "trained. Train the full adapter, saved without inference_only=True; this one loads with is_trainable=False"
        )

    def _check_adapter_names(self, model: nn.Module, names: Iterable[str]) -> None:
        """To save one of several adapters PEFT drops every key that has another adapter's name in it."""
        names = set(names)
        if BASE in names:
            raise ValueError(f"adapter name {BASE!r} means no adapter in a mixed batch; choose another name")
        if len(names) < 2:
            return
        saved = split_flat(model, dict(model.named_parameters()))
        keys = (re.sub(rf"\.({PREFIX}\w+|modules_to_save)\.[^.]+", "", name) for name in saved)
        clashes = sorted(names & {part for key in keys for part in key.split(".")})
        if clashes:
            raise ValueError(
                f"adapter name {clashes[0]!r} is part of a parameter's name, so that saving another adapter would lose "
                "that parameter; choose another name"
            )

    def rename_adapter(self, old_name: str, new_name: str) -> None:
        """Rename an adapter in place: weights, order, activity and what trains stay as they are.

        Call it on the PeftModel, which keeps the active adapter's name too.

        Raises:
            ValueError: no such adapter, or the new name is taken or impossible; nothing is changed.
        """
        if old_name not in self.peft_config:
            raise ValueError(f"Adapter {old_name!r} does not exist; there are {', '.join(map(repr, self.peft_config))}")
        if new_name in self.peft_config:
            raise ValueError(f"Adapter with name {new_name!r} already exists.")
        try:
            nn.ModuleDict({new_name: nn.Identity()})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{new_name!r} cannot be the name of an adapter: {error.args[0]}") from error
        self._check_adapter_names(self.model, {*self.peft_config, new_name} - {old_name})
        rename_key(self.peft_config, old_name, new_name)
        self.active_adapter = renamed(self.active_adapter, old_name, new_name)
        for module in list(self.model.modules()):
            if isinstance(module, FVAELinear):
                module.rename_adapter(old_name, new_name)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                for attribute in module.adapter_layer_names:
                    rename_key(getattr(module, attribute), old_name, new_name)
                module._adapters = set(renamed(list(module._adapters), old_name, new_name))
                module._active_adapter = renamed(module._active_adapter, old_name, new_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, the others that were, else the first one by name, are active now."""
        was_active = adapter_name in self.active_adapters
        others = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        # PEFT lets every layer choose among the adapters that it has itself, so that layers may disagree.
        if was_active and self.peft_config:
            self.set_adapter(others or sorted(self.peft_config)[:1])

    # ------------------------------------------------------------------------------- adapters that only serve inference

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        self._freeze_untrainable()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._freeze_untrainable()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            if requires_grad and name in self.peft_config and self.peft_config[name].inference_only:
                raise ValueError(self._untrainable(name))
        super().set_requires_grad(adapter_names, requires_grad)

    def _freeze_untrainable(self) -> None:
        """The layers see to their own parameters; this is for what modules_to_save brought along."""
        names = [name for name, config in self.peft_config.items() if config.inference_only]
        if names:
            super().set_requires_grad(names, False)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        found = split_flat(model, found)  # of a state dict that DeepSpeed has put together
        if not config.inference_only:
            return found
        unused = re.compile(rf"(^|\.)fvae_vae\.{re.escape(adapter_name)}\.(encoder2|decoder)\.")
        return {key: value for key, value in found.items() if not unused.search(key)}

    # ---------------------------------------------------------------------------------------------------- mixed batches

    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> AbstractContextManager[None]:
        """Called by PeftModel around forward and generate: a batch whose samples use different adapters."""
        if adapter_names is None:
            return nullcontext()
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for _, layer in self._layers() for name in layer.fvae_lora_B}
        if unknown := set(adapter_names) - known - {BASE}:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        num_beams = kwargs.get("num_beams")
        return self._mixed_batch(list(adapter_names), num_beams if isinstance(num_beams, int) else 1)

    @contextmanager
    def _mixed_batch(self, names: list[str], num_beams: int) -> Iterator[None]:
        """Tell every layer the adapter of each sample it will see."""
        # Beam search repeats the samples, but not before the encoder of an encoder-decoder model.
        encoder = _get_encoder(self.model)
        not_repeated = set() if encoder is None else set(encoder.modules())
        handles = []
        for module in self.modules():
            seen = names if module in not_repeated else [name for name in names for _ in range(num_beams)]
            if isinstance(module, AuxiliaryTrainingWrapper):
                # PEFT would look up its copy of a module even where an adapter has none.
                seen = [name if name in module._adapters else BASE for name in seen]
            elif not isinstance(module, FVAELinear):
                continue
            hook = partial(_adapter_names_pre_forward_hook, adapter_names=seen)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ---------------------------------------------------------------------------------------------------------- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, but all or nothing; see `FVAELinear.merge`.

        Raises:
            ValueError: some layer cannot be merged; no layer has been.
        """
        self._require_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Give every base layer its own parameters back, bit for bit."""
        merged = [layer for _, layer in self._layers() if layer.merged]
        if not merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for layer in merged:
            layer.unmerge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._require_mergeable(adapter_names, safe_merge)
        without_bias = {name: layer.get_base_layer() for name, layer in self._layers() if not layer.base_has_bias}
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)  # type: ignore[func-returns-value]
        given = [name for name, base in without_bias.items() if getattr(base, "bias", None) is not None]
        if given:
            warnings.warn(
                f"Merging gave {len(given)} layers that had no bias one ({given[0]}, ...), as the encoder's mean has a "
                "bias. The model's config does not know: saved and loaded again, the model would lose it. Set it in "
                "the config before saving (Llama: config.attention_bias = True), or keep the adapter beside the model.",
                stacklevel=3,
            )
        return model

    def _require_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Find whatever could stop a merge before it has changed anything."""
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        if unknown := set(adapter_names or ()) - set(self.peft_config):
            raise ValueError(f"Trying to merge non-existing adapter(s): {', '.join(sorted(unknown))}")
        for name, layer in self._layers():
            with onload_layer(layer):
                problem = layer.merge_problem(adapter_names, safe_merge)
            if problem:
                raise ValueError(f"{name}: {problem}")

    def _layers(self) -> list[tuple[str, FVAELinear]]:
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, FVAELinear)]

    # ---------------------------------------------------------------------------------------------------------- targets

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
