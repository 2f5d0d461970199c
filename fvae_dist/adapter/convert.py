"""Adapters of the reference code in; `export_adapter` for plain LoRA, pruned and merged ones out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from fvae_dist.adapter.config import FVAELoraConfig
from fvae_dist.adapter.export import ADAPTER_FILE, CONFIG_FILE, export_adapter, read_json, read_tensors
from fvae_dist.adapter.layer import FVAELinear
from fvae_dist.adapter.official import (
    INFERRED,
    PEFT_TYPE,
    OfficialTensors,
    group_tensors,
    infer_settings,
    official_config,
    official_name,
)

__all__ = ["export_adapter", "load_official_adapter"]
_NUM_LISTED = 10


def load_official_adapter(
    model: nn.Module,
    state_dict_or_path: Mapping[str, Tensor] | str | Path,
    config: FVAELoraConfig | Mapping[str, Any] | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """Put an adapter saved by the reference code (idiap/FVAE-LoRA) on a base model.

    Outputs and side loss are the reference's (for a negative `scale_tril`, where its loss is NaN, |scale| counts).
    `lora_E` and `ranknum`, which it never uses, are dropped. Modules that transformers has renamed since are found.

    Args:
        model: the base model, changed in place; on the meta device it stays there, only the adapter has values.
        state_dict_or_path: tensors under the reference's names, as PEFT saves them, with or without the adapter's name
            and the prefix `base_model.model.`; or the folder it saved; or a .safetensors file.
        config: our configuration, or the reference's settings by its names, of which only `lora_alpha` is required:
            the shapes say what they determine, its defaults stand for the rest. Default: the `adapter_config.json`
            of the folder or beside the file.
        adapter_name: its name in the returned model, and which to take where the tensors are of several.

    Returns:
        A PeftModel in evaluation mode with fp32 adapter weights; it can be trained on (`inference_mode` is False).

    Raises:
        ValueError: no configuration, one that has no counterpart here, a pickle file, or tensors that are unknown,
            missing or of another shape than the base model and the configuration ask for. `model` is then unchanged.
    """
    if isinstance(model, PeftModel):
        raise ValueError("model has adapters already; pass the base model")
    if isinstance(state_dict_or_path, Mapping):
        tensors, settings = state_dict_or_path, None
    else:
        tensors, settings = _read_official(Path(state_dict_or_path), needs_config=config is None)
    found = group_tensors(tensors, adapter_name)
    found, renamed = _rename_modules(found, model)
    config = _complete_config(settings if config is None else config, found)
    if renamed or config.target_modules is None:
        config.target_modules = set(found.layers)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    return _inject(model, config, adapter_name, found)


def _read_official(path: Path, needs_config: bool) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a folder or a .safetensors file, and the settings in the adapter_config.json beside them."""
    file = path / ADAPTER_FILE if path.is_dir() else path
    if not file.is_file():
        others = sorted(path.glob("adapter_model.*"))
        if not others:
            raise ValueError(f"there is no file {file}")
        file = others[0]
    if file.suffix != ".safetensors":
        raise ValueError(f"{file} is no safetensors file, and nothing is unpickled: convert it to safetensors first")
    settings_file = file.parent / CONFIG_FILE
    if not needs_config or not settings_file.is_file():
        return read_tensors(file), None
    settings = read_json(settings_file)
    if settings.get("peft_type") != PEFT_TYPE:
        raise ValueError(
            f"{settings_file}: peft_type is {settings.get('peft_type')!r}, not the reference code's {PEFT_TYPE!r}; "
            "PeftModel.from_pretrained loads the methods that PEFT knows"
        )
    return read_tensors(file), settings


def _rename_modules(found: OfficialTensors, model: nn.Module) -> tuple[OfficialTensors, bool]:
    """Give modules that the reference's transformers 4 called otherwise the names they have in `model`."""
    modules = dict(model.named_modules())
    if all(module in modules for module in found.layers) or not isinstance(model, PreTrainedModel):
        return found, False
    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    layers = {
        _renamed(f"{module}.weight", renamings).removesuffix(".weight"): layer for module, layer in found.layers.items()
    }
    if len(layers) < len(found.layers) or not all(module in modules for module in layers):
        return found, False
    return OfficialTensors(layers, {_renamed(key, renamings): t for key, t in found.others.items()}), True


def _renamed(key: str, renamings: list[WeightRenaming]) -> str:
    for step in renamings:
        key, _ = step.rename_source_key(key)
    return key


def _complete_config(config: FVAELoraConfig | Mapping[str, Any] | None, found: OfficialTensors) -> FVAELoraConfig:
    if isinstance(config, FVAELoraConfig):
        return copy(config)
    if config is None:
        shown = ", ".join(f"{name} = {value!r}" for name, value in infer_settings(found).items())
        raise ValueError(
            f"config is needed: lora_alpha and the lambda_* weights cannot be read off the tensors (which say {shown})"
        )
    settings = dict(config)
    if not settings.keys() >= INFERRED:
        settings = {**infer_settings(found), **settings}
    settings.setdefault("modules_to_save", sorted({key.rpartition(".")[0] for key in found.others}) or None)
    return official_config(settings)


def _inject(model: nn.Module, config: FVAELoraConfig, adapter_name: str, found: OfficialTensors) -> PeftModel:
    """Add the adapter and fill it; on an error take it off again."""
    recorded, config.base_model_name_or_path = config.base_model_name_or_path, None
    were_trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    was_training = model.training
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    problem, parts = _match(peft_model, adapter_name, found)
    if problem:
        tuner: Any = peft_model.base_model
        tuner.unload()
        for parameter, trainable in were_trainable.items():
            parameter.requires_grad_(trainable)
        model.train(was_training)
        raise ValueError(f"the tensors do not fit the base model and the configuration: {problem}")
    for module, state_dict in parts:
        module.load_state_dict(state_dict, assign=True)
    config.base_model_name_or_path = config.base_model_name_or_path or recorded
    return peft_model.eval()


class _Part(NamedTuple):
    module: nn.Module
    state_dict: dict[str, Tensor]


def _match(model: PeftModel, adapter_name: str, found: OfficialTensors) -> tuple[str, list[_Part]]:
    """What does not fit between tensors and model, and for each module of the adapter the values it takes."""
    given = {f"{module}.{name}": t for module, layer in found.layers.items() for name, t in layer.items()}
    given |= found.others
    parts, missing, misshapen, used = [], [], [], set()
    for module, names in _expected(model, adapter_name):
        state_dict = {}
        for local, current in module.state_dict().items():
            key = names[local]
            used.add(key)
            if key not in given:
                missing.append(key)
            elif given[key].shape != current.shape:
                misshapen.append(f"{key} {tuple(given[key].shape)} instead of {tuple(current.shape)}")
            else:
                device = "cpu" if current.is_meta else current.device
                state_dict[local] = given[key].detach().to(device, current.dtype, copy=True)
        parts.append(_Part(module, state_dict))
    unknown = [key for key in given if key not in used]
    found_problems = {"missing": missing, "unknown": unknown, "of another shape": misshapen}
    return "; ".join(f"{len(keys)} {what}: {_listed(keys)}" for what, keys in found_problems.items() if keys), parts


def _expected(model: PeftModel, adapter_name: str) -> Iterator[tuple[nn.Module, dict[str, str]]]:
    """The modules of an adapter, each with the reference's key for the names in its state dict."""
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, FVAELinear):
            shared = module.fvae_config[adapter_name].encoder_shared_trunk
            for attribute in module.adapter_layer_names:
                part = getattr(module, attribute)[adapter_name]
                names = {name: f"{path}.{official_name(f'{attribute}.{name}', shared)}" for name in part.state_dict()}
                yield part, names
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            part = module.modules_to_save[adapter_name]
            yield part, {name: f"{path}.{name}" for name in part.state_dict()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_LISTED} more" if len(names) > _NUM_LISTED else ""
    return ", ".join(names[:_NUM_LISTED]) + more
