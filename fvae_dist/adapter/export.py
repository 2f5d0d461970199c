"""FVAE-LoRA adapters in other forms: as plain LoRA, pruned to what evaluation needs, or merged into the base."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from fvae_dist.adapter.config import FVAELoraConfig
from fvae_dist.adapter.layer import FVAELinear
from fvae_dist.adapter.registration import PEFT_TYPE

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
ROPE_SCALING_FILE = "rope_scaling.json"  # how the base's RoPE was scaled in the run; nothing where it was not
LABELS_FILE = "labels.json"  # of a classifier
FORMATS = ("lora", "inference", "merged")


def export_adapter(
    source: PeftModel | str | Path, output_dir: str | Path, format: str = "lora", adapter_name: str | None = None
) -> Path:
    """Write an FVAE-LoRA adapter in another form; the files appear in `output_dir` once all of them are written.

    lora: a LoRA adapter that PEFT loads without this project, with the outputs this adapter has in evaluation. Only
        for `encoder_layers` = 0, whose update is linear in x.
    inference: encoder 1 and B, all that evaluation needs; cannot be trained any more.
    merged: the base model with the adapter merged into its weights; needs a PeftModel, and `encoder_layers` = 0.

    Args:
        source: a model that has the adapter, or the folder of a saved one.
        output_dir: folder, created if needed; files of the same names are replaced.
        format: as above.
        adapter_name: which adapter of `source`; default: the active one, of a folder the one right in it.

    Returns:
        `output_dir`.

    Raises:
        ValueError: an unknown format, no FVAE-LoRA adapter in `source`, one that cannot take this form, or
            `output_dir` being the source itself.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    name, config = _describe_source(source, adapter_name)
    output = Path(output_dir)
    if format != "inference" and config.encoder_layers:
        raise ValueError(
            f"format {format!r} needs encoder_layers = 0, this adapter has {config.encoder_layers}: its update is not "
            "linear in the layer's input, so that no LoRA and no merged weight can represent it. Use format "
            "'inference', or train with encoder_layers=0"
        )
    saved = source if isinstance(source, PeftModel) else Path(name)
    if isinstance(saved, Path) and output.resolve() == saved.resolve():
        raise ValueError(f"{output} is the adapter that is exported; choose another folder")
    with written_aside(output) as aside:
        if isinstance(saved, Path):
            copy_companions(saved, aside, output)
        if format == "lora":
            _write_lora(saved, aside, name, config)
        elif format == "inference":
            _write_pruned(saved, aside, name, config)
        elif isinstance(saved, PeftModel):
            _write_merged(saved, aside, name)
        else:
            raise ValueError("format 'merged' needs the base model: load the adapter with PeftModel.from_pretrained")
    return output


def _describe_source(source: PeftModel | str | Path, adapter_name: str | None) -> tuple[str, FVAELoraConfig]:
    """The adapter's name (its folder, where the source is one) and its configuration."""
    if isinstance(source, PeftModel):
        name = adapter_name or _only_active(source)
        if name not in source.peft_config:
            raise ValueError(f"the model has no adapter {name!r}, only {', '.join(source.peft_config)}")
        config: Any = copy(source.peft_config[name])
    else:
        folder = Path(source) / ("" if adapter_name in (None, "default") else str(adapter_name))
        if not (folder / CONFIG_FILE).is_file() or not (folder / ADAPTER_FILE).is_file():
            raise ValueError(f"{folder} is no saved adapter: needs {CONFIG_FILE} and {ADAPTER_FILE}")
        name = str(folder)
        peft_type = read_json(folder / CONFIG_FILE).get("peft_type")
        if peft_type != PEFT_TYPE:
            raise ValueError(f"{name} is no FVAE-LoRA adapter but {peft_type}")
        config = PeftConfig.from_pretrained(name)
    if not isinstance(config, FVAELoraConfig):
        raise ValueError(f"{name} is no FVAE-LoRA adapter but {config.peft_type.value}")
    return name, config


def _only_active(model: PeftModel) -> str:
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"adapter_name is needed: the active adapters are {', '.join(active)}")
    return active[0]


def _write_merged(source: PeftModel, folder: Path, name: str) -> None:
    base: Any = source.get_base_model()
    if not hasattr(base, "save_pretrained"):
        raise ValueError(f"{type(base).__name__} is no transformers model: it has no save_pretrained")
    for path, layer in base.named_modules():
        if isinstance(layer, FVAELinear) and name in layer.fvae_vae and not layer.base_has_bias:
            mean: Any = layer.fvae_vae[name].encoder1.mean  # type: ignore[union-attr]
            if bool(mean.bias.any()):
                raise ValueError(
                    f"{path} has no bias, and merging would give it one (of the encoder's mean), which the saved model "
                    "would lose when it is loaded. Use format 'lora'"
                )
    twin: Any = deepcopy(source)
    twin.merge_and_unload(adapter_names=[name]).save_pretrained(str(folder))


def _write_pruned(source: PeftModel | Path, folder: Path, name: str, config: FVAELoraConfig) -> None:
    if isinstance(source, PeftModel):
        options: Any = {"inference_only": True}  # the keyword that fvae_dist.adapter.peft_extensions adds
        source.save_pretrained(str(folder), selected_adapters=[name], **options)
        # PEFT puts an adapter of another name than "default" into a folder of that name.
        for path in list((folder / name).glob("*")):
            os.replace(path, folder / path.name)
        return
    tensors = read_tensors(source / ADAPTER_FILE)
    unused = (".fvae_vae.encoder2.", ".fvae_vae.decoder.")
    config.inference_only = True
    _save({key: t for key, t in tensors.items() if not any(part in key for part in unused)}, folder)
    config.save_pretrained(str(folder))


def _write_lora(source: PeftModel | Path, folder: Path, name: str, config: FVAELoraConfig) -> None:
    auto_mapping, is_conv1d = config.auto_mapping, False
    if isinstance(source, PeftModel):
        tensors = get_peft_model_state_dict(source, adapter_name=name)
        is_conv1d = any(isinstance(m, FVAELinear) and isinstance(m.base_layer, Conv1D) for m in source.modules())
        if config.task_type is None:
            base = type(source.get_base_model())
            auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    else:
        tensors = read_tensors(source / ADAPTER_FILE)
    tensors = _to_lora(tensors, config)
    has_bias = any(key.endswith(".lora_B.bias") for key in tensors)
    _save(tensors, folder)
    lora_config = _lora_config(config, fan_in_fan_out=is_conv1d, lora_bias=has_bias)
    lora_config.save_pretrained(str(folder), auto_mapping_dict=auto_mapping)


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    # Cloned: safetensors refuses tensors that share memory.
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(tensors, folder / ADAPTER_FILE, {"format": "pt"})


def _to_lora(tensors: dict[str, Tensor], config: FVAELoraConfig) -> dict[str, Tensor]:
    """The tensors of LoRA with the same update: scale B (M x + m) = alpha/r (B' M x + B' m)."""
    lora = {key: tensor for key, tensor in tensors.items() if ".fvae_" not in key}
    modules = [key.removesuffix(".fvae_lora_B.weight") for key in tensors if key.endswith(".fvae_lora_B.weight")]
    needed = [f"{module}.fvae_vae.encoder1.mean.{kind}" for module in modules for kind in ("weight", "bias")]
    if not modules or not tensors.keys() >= set(needed):
        raise ValueError(
            f"the adapter is not complete: {', '.join(sorted(set(needed) - tensors.keys())[:3])} is missing"
        )
    means = {module: tensors[f"{module}.fvae_vae.encoder1.mean.bias"] for module in modules}
    has_bias = any(bool(mean.any()) for mean in means.values())
    for module in modules:
        lora_B = tensors[f"{module}.fvae_lora_B.weight"].double() * (config.scaling / (config.lora_alpha / config.r))
        lora[f"{module}.lora_A.weight"] = tensors[f"{module}.fvae_vae.encoder1.mean.weight"]
        lora[f"{module}.lora_B.weight"] = lora_B.to(torch.float32)
        if has_bias:
            lora[f"{module}.lora_B.bias"] = (lora_B @ means[module].double()).to(torch.float32)
    return lora


def _lora_config(config: FVAELoraConfig, **settings: Any) -> LoraConfig:
    shared = (
        "r",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "task_type",
        "base_model_name_or_path",
        "revision",
    )
    alpha: Any = config.lora_alpha  # PEFT declares it an integer and takes any number
    return LoraConfig(
        lora_alpha=alpha, **{name: getattr(config, name) for name in shared}, inference_mode=True, **settings
    )


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """A new folder whose files move to the folder `output` when the block ends without an error; else nothing stays.

    Raises:
        ValueError: `output`, or what it would lie in, is a file.
    """
    output = output.resolve()
    parent = next(path for path in (output, *output.parents) if path.exists())
    if not parent.is_dir():
        raise ValueError(f"{parent} is a file, not a folder")
    aside = (parent.parent if parent == output else parent) / f".{output.name}.{os.getpid()}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        # safetensors writes files only their owner can read.
        mask = os.umask(0)
        os.umask(mask)
        for path in [path for path in aside.rglob("*") if path.is_file()]:
            target = output / path.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o666 & ~mask)
            os.replace(path, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def copy_companions(source: Path, aside: Path, output: Path) -> None:
    """RoPE scaling and labels of the adapter in `source` to `aside`, for `output`; what another adapter left there
    goes."""
    for name in (ROPE_SCALING_FILE, LABELS_FILE):
        if (source / name).exists():
            shutil.copyfile(source / name, aside / name)
        else:
            (output / name).unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError naming the file for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no object")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: naming the file, if it is none or holds a value that is not finite.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {name} is not finite")
    return tensors
