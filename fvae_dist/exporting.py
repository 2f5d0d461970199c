"""What `fvae-dist export` does: adapters of the reference code in, other forms of our own out."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PretrainedConfig

import fvae_dist.adapter  # noqa: F401  (registers FVAE_LORA with PEFT)
from fvae_dist.adapter.convert import export_adapter, load_official_adapter
from fvae_dist.adapter.export import (
    ADAPTER_FILE,
    CONFIG_FILE,
    copy_companions,
    read_json,
    read_tensors,
    written_aside,
)
from fvae_dist.adapter.layer import linear_features
from fvae_dist.training.recipe import RecipeError
from fvae_dist.training.rope_scaling import apply_saved_scaling, check_scaled

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def export(args: argparse.Namespace) -> str:
    """Do what the arguments say; returns one line about it.

    Raises:
        RecipeError: an argument, or a file it names, that cannot be used; nothing is written then.
    """
    _protect_inputs(args)
    source = args.from_official or args.adapter
    option = "--from-official" if args.from_official else "--adapter"
    try:
        if args.from_official:
            return _convert_official(args)
        return _export_ours(args)
    except ValueError as error:
        raise RecipeError(f"{option} {source}: {error}") from None
    except OSError as error:
        raise RecipeError(f"--out {args.out}: {error}") from None


def _protect_inputs(args: argparse.Namespace) -> None:
    out = Path(args.out)
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise RecipeError(f"--out {out}: {existing} is a file, not a folder")
    for option in ("from_official", "adapter", "base"):
        path = getattr(args, option)
        if path and Path(path).resolve() == out.resolve():
            raise RecipeError(f"--out {out}: is what --{option.replace('_', '-')} reads; choose another folder")


def _convert_official(args: argparse.Namespace) -> str:
    path = Path(args.from_official)
    if not path.exists():
        raise ValueError("does not exist")
    settings_file = (path if path.is_dir() else path.parent) / CONFIG_FILE
    if not settings_file.is_file():
        raise ValueError(f"there is no {settings_file}, which says how the adapter was configured")
    base = _empty_base(args.base, read_json(settings_file), args.trust_remote_code)
    model = load_official_adapter(base, path)
    with written_aside(Path(args.out)) as folder:
        model.save_pretrained(str(folder))
        copy_companions(settings_file.parent, folder, Path(args.out))
    return f"{args.out}: the adapter {path} of the reference code, as FVAE-LoRA"


def _export_ours(args: argparse.Namespace) -> str:
    path = Path(args.adapter)
    if not (path / CONFIG_FILE).is_file() or not (path / ADAPTER_FILE).is_file():
        raise ValueError(f"is no saved adapter: needs {CONFIG_FILE} and {ADAPTER_FILE}")
    settings = read_json(path / CONFIG_FILE)
    base: str | None = args.base
    if args.format == "merged":
        base = base or settings.get("base_model_name_or_path")
        if not base:
            raise RecipeError(f"--base is required: {path / CONFIG_FILE} names no base model")
    if base:
        _check_fits(_empty_base(base, settings, args.trust_remote_code), base, path)
    source: PeftModel | Path = path
    if args.format == "merged" and base and not settings.get("encoder_layers"):
        source = _attach(_load_base(base, settings, args.trust_remote_code, path), path)
    export_adapter(source, args.out, args.format)
    return f"{args.out}: {path} in the form {args.format!r}"


def _check_fits(model: nn.Module, base: str, path: Path) -> None:
    """Every layer that the adapter adapts must be in the base model, with as many outputs."""
    modules = dict(model.named_modules())
    suffix = ".fvae_lora_B.weight"
    for key, tensor in read_tensors(path / ADAPTER_FILE).items():
        name = key.removeprefix("base_model.model.").removesuffix(suffix)
        if key.endswith(suffix):
            features = linear_features(modules[name]) if name in modules else None
            if features is None or features[1] != tensor.shape[0]:
                raise RecipeError(
                    f"--base {base}: has no linear {name} with {tensor.shape[0]} outputs, as {path} needs"
                )


def _attach(base: Any, path: Path) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT only warns, and goes on with random values.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        try:
            return PeftModel.from_pretrained(base, path)
        except (UserWarning, RuntimeError, KeyError) as error:
            raise ValueError(f"does not fit the base model: {_one_line(error)}") from None


# ------------------------------------------------------------------------------------------------------- base models


def _empty_base(name: str, settings: dict[str, Any], trust_remote_code: bool) -> nn.Module:
    """The base model's modules without values: on the meta device, unless its code cannot be run there."""
    config = _load_config(name, settings, trust_remote_code)
    model_class = _model_class(config, settings)
    try:
        with torch.device("meta"):
            if hasattr(model_class, "from_config"):
                return model_class.from_config(config, trust_remote_code=trust_remote_code)
            return model_class._from_config(config)
    except Exception:  # a model's own code may compute with its weights as it is built
        return _load_base(name, settings, trust_remote_code)


def _load_base(name: str, settings: dict[str, Any], trust_remote_code: bool, adapter: Path | None = None) -> nn.Module:
    """With its weights, and its RoPE scaled as `adapter` was trained with, so that a merged config.json says so."""
    config = _load_config(name, settings, trust_remote_code)
    scaling = apply_saved_scaling(config, adapter, name) if adapter is not None else None
    try:
        model = _model_class(config, settings).from_pretrained(
            name,
            config=config,
            dtype="auto",
            revision=settings.get("revision"),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except Exception as error:  # what is missing or broken raises a dozen types
        raise RecipeError(f"--base {name}: cannot load it: {_one_line(error)}") from None
    check_scaled(model, scaling, name)
    return model


def _load_config(name: str, settings: dict[str, Any], trust_remote_code: bool) -> PretrainedConfig:
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise RecipeError(f"--base {name}: holds no config.json: not a Hugging Face model folder")
    if not path.exists() and (path.is_absolute() or name.startswith(".") or len(path.parts) > 2):
        raise RecipeError(f"--base {name}: there is no such folder")
    try:
        return AutoConfig.from_pretrained(name, revision=settings.get("revision"), trust_remote_code=trust_remote_code)
    except Exception as error:  # as above
        raise RecipeError(f"--base {name}: cannot load it: {_one_line(error)}") from None


def _model_class(config: PretrainedConfig, settings: dict[str, Any]) -> Any:
    """The class that the adapter's configuration asks for, else the model's own, else a causal language model."""
    task = _AUTO_CLASSES.get(settings.get("task_type") or "")
    if task:
        return getattr(transformers, task)
    recorded = (settings.get("auto_mapping") or {}).get("base_model_class")
    for name in (recorded, *(config.architectures or ())):
        if name and hasattr(transformers, name):
            return getattr(transformers, name)
    return transformers.AutoModelForCausalLM


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
