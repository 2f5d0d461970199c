"""The base model, the tokenizer and the adapter: checked on the meta device first, loaded sharded second."""

from __future__ import annotations

import json
import logging
import re
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, get_args, get_type_hints

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import fvae_dist.adapter  # noqa: F401  (registers FVAE_LORA with PEFT)
from fvae_dist.adapter.flat import flatten, split_flat
from fvae_dist.training.adalora import UNKNOWN_STEPS, is_adalora
from fvae_dist.training.classification import (
    SEQ_CLS,
    check_method_of_head,
    empty_classifier,
    is_classification,
    load_classifier,
)
from fvae_dist.training.implementations import has_flat_adapters
from fvae_dist.training.recipe import ModelSection, Recipe, RecipeError
from fvae_dist.training.recipe_help import unknown_key
from fvae_dist.training.rope_scaling import apply_rope_scaling, check_scaled, positions_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelPlan:
    """What will be trained, known without loading a weight. Counts are numbers of parameters."""

    adapted_layers: list[str]
    base_parameters: int
    embedding_parameters: int
    trainable_parameters: int
    inference_parameters: int
    trainable_sizes: list[int]
    base_sizes: list[int]


def load_config(section: ModelSection) -> PretrainedConfig:
    """The base model's configuration, its RoPE scaled as asked for; RecipeError if there is none."""
    path = Path(section.name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise RecipeError(f"model.name_or_path: {path} holds no config.json: not a Hugging Face model folder")
    if not path.exists() and (path.is_absolute() or section.name_or_path.startswith(".") or len(path.parts) > 2):
        raise RecipeError(f"model.name_or_path: there is no folder {path}")
    try:
        config = AutoConfig.from_pretrained(
            section.name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except Exception as error:  # a broken config.json raises a dozen types
        raise RecipeError(f"model.name_or_path: cannot load {section.name_or_path}: {_first_line(error)}") from None
    if section.rope_scaling is not None:
        apply_rope_scaling(config, section.rope_scaling, section.name_or_path)
    return config


def check_weights(section: ModelSection) -> None:
    """Refuse a local folder whose weights are missing, or are no safetensors files of that folder.

    Raises:
        RecipeError: naming the file; found before the process group and device memory exist.
    """
    folder = Path(section.name_or_path)
    if section.random_weights or not section.use_safetensors or not folder.is_dir():
        return
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return
    if not index.is_file():
        if any(folder.glob("*.safetensors")):
            return  # its configuration may name the file
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        problem = f"weights as pickle only ({pickles[0]})" if pickles else "no weights (model.safetensors)"
        hint = ": convert them, or set model.use_safetensors: false if you trust them" if pickles else ""
        raise RecipeError(f"model.name_or_path: {folder} holds {problem}{hint}")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        bad = sorted(n for n in names if Path(n).name != n or Path(n).suffix != ".safetensors")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RecipeError(f"model.name_or_path: {index} is no index of weights") from None
    if bad:
        raise RecipeError(f"model.name_or_path: {index} names {bad[0]!r}, which is no safetensors file of that folder")
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise RecipeError(f"model.name_or_path: {folder} lacks {', '.join(missing[:3])}")


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token (its EOS where it has none of its own)."""
    name = section.tokenizer or section.name_or_path
    key = "model.tokenizer" if section.tokenizer else "model.name_or_path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=None if section.tokenizer else section.revision,
            trust_remote_code=section.trust_remote_code,
        )
    except Exception as error:  # tokenizers raises plain Exception for a broken file
        raise RecipeError(f"{key}: cannot load a tokenizer from {name}: {_first_line(error)}") from None
    if tokenizer.eos_token is None:
        raise RecipeError(f"{key}: the tokenizer of {name} has no EOS token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_lengths(recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Refuse sequences longer than the (scaled) positions and a tokenizer (if given) larger than the vocabulary."""
    text_config = config.get_text_config()
    positions = positions_of(config)
    if positions is not None and recipe.data.max_length > positions:
        raise RecipeError(
            f"data.max_length: {recipe.data.max_length} is longer than the {positions} positions of "
            f"{recipe.model.name_or_path}{_how_scaled(recipe)}"
        )
    if tokenizer is not None and len(tokenizer) > text_config.vocab_size:
        raise RecipeError(
            f"model.tokenizer: {len(tokenizer)} tokens do not fit the vocabulary of {text_config.vocab_size} of "
            f"{recipe.model.name_or_path}"
        )


def _how_scaled(recipe: Recipe) -> str:
    scaling = recipe.model.rope_scaling
    return f" (model.rope_scaling: {scaling.type}, factor {scaling.factor:g})" if scaling else ""


def build_peft_config(adapter: dict[str, Any], task_type: str = "CAUSAL_LM") -> PeftConfig:
    """The PEFT configuration of the recipe's adapter section; RecipeError for a key or value PEFT does not know."""
    values = dict(adapter)
    peft_type = values.pop("peft_type", "FVAE_LORA")
    known_types = {str(getattr(t, "value", t)): cls for t, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if str(peft_type) not in known_types:
        hint = unknown_key(str(peft_type), sorted(known_types)).replace("key", f"type {str(peft_type)[:40]!r}", 1)
        raise RecipeError(f"adapter.peft_type: {hint}")
    config_cls = known_types[str(peft_type)]
    known = {field.name: field.default for field in fields(config_cls) if field.init}
    if is_adalora(adapter) and values.get("total_step") is None:
        values["total_step"] = UNKNOWN_STEPS
    for key in values:
        if key not in known:
            raise RecipeError(f"adapter.{key}: {unknown_key(key, sorted(known))}")
    if values.setdefault("task_type", task_type) != task_type:
        raise RecipeError(f"adapter.task_type: must be {task_type}, got {values['task_type']!r} (see model.task)")
    if "r" in values and repr(values["r"]) != repr(known.get("r")):  # the default of some methods means "unset"
        rank = values["r"]
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank < 2**31:
            raise RecipeError(f"adapter.r: must be an integer > 0, got {rank!r}")
    _check_types(
        config_cls, {key: value for key, value in values.items() if value is not None or known[key] is not None}
    )
    try:
        return config_cls(**values)
    except Exception as error:  # PEFT checks little, and what it meets first raises what it likes
        raise RecipeError(_adapter_problem(error, set(known))) from None


def _check_types(config_cls: type, values: dict[str, Any], section: str = "adapter") -> None:
    """PEFT's dataclasses state their types and do not check them: text for a list would be read letter by letter."""
    hints = get_type_hints(config_cls)
    for key, value in values.items():
        nested = next((kind for kind in get_args(hints[key]) if is_dataclass(kind)), None)
        if nested is not None and isinstance(value, dict):  # eva_config and its like
            known = [field.name for field in fields(nested)]
            for name in value:
                if name not in known:
                    raise RecipeError(f"{section}.{key}.{name}: {unknown_key(name, known)}")
            _check_types(nested, value, f"{section}.{key}")  # type: ignore[arg-type]
            continue
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except PydanticSchemaGenerationError:
            continue  # a class of PEFT's own, which no recipe can state
        except ValidationError as error:
            kinds = {detail["type"] for detail in error.errors()}
            # PEFT takes fractions for int (lora_alpha) and more names than its Literals list; YAML has no tuples.
            fraction = isinstance(value, float) and abs(value) < float("inf") and kinds & {"int_type", "int_from_float"}
            name = isinstance(value, str) and "literal_error" in kinds
            if not fraction and not name and not kinds <= {"tuple_type", "set_type"}:
                shown = hints[key].__name__ if isinstance(hints[key], type) else str(hints[key]).replace("typing.", "")
                raise RecipeError(f"{section}.{key}: must be {shown}, got {value!r}") from None
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise RecipeError(f"{section}.{key}: must be finite, got {value!r}")


def plan_model(recipe: Recipe, config: PretrainedConfig, use_cpu: bool = True) -> ModelPlan:
    """Build base and adapter on the meta device: checks the targets and counts, in seconds and without memory."""
    try:
        with torch.device("meta"):
            make = empty_classifier if is_classification(recipe) else AutoModelForCausalLM.from_config
            model: Any = make(config, trust_remote_code=recipe.model.trust_remote_code)
    except RecipeError:
        raise
    except Exception as error:  # no causal language model, or sizes that do not fit together
        name = f"{recipe.model.name_or_path}{_how_scaled(recipe)}"
        raise RecipeError(f"model.name_or_path: cannot build {name}: {_first_line(error)}") from None
    check_scaled(model, recipe.model.rope_scaling, recipe.model.name_or_path)
    if recipe.adapter.get("modules_to_save") and recipe.model.dtype != "float32":
        raise RecipeError(
            f"adapter.modules_to_save: would train whole modules in {recipe.model.dtype}, where small updates are "
            "lost; use model.dtype: float32"
        )
    base_sizes = [parameter.numel() for parameter in model.parameters()]
    whole = sum(base_sizes)
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    embedding = 0 if tied and not is_classification(recipe) else model.get_input_embeddings().weight.numel()
    if str(recipe.adapter.get("peft_type")) == "FULL":
        return ModelPlan([], whole, embedding, whole, whole, base_sizes, base_sizes)
    try:
        peft_model = attach_adapter(model, recipe.adapter, low_cpu_mem_usage=True)
    except RecipeError:
        raise
    except re.error as error:
        raise RecipeError(f"adapter: {error.pattern!r} is no regular expression: {error.msg}") from None
    except Exception as error:  # what PEFT does not check fails somewhere in it
        raise RecipeError(f"adapter: {type(error).__name__}: {_first_line(error)}") from error
    if has_flat_adapters(recipe, use_cpu):
        flatten(peft_model)
    # AdaLoRA's ranknum is frozen wherever it is not on the meta device.
    parameters = ((name, p) for name, p in peft_model.named_parameters() if ".ranknum." not in name)
    trained = {name: p for name, p in parameters if p.requires_grad}
    by_part = {name: p.numel() for name, p in split_flat(peft_model, trained).items()}
    saved_along = [name for name, _ in peft_model.named_modules() if name.endswith(".modules_to_save.default")]
    for name in recipe.adapter.get("modules_to_save") or ():
        if not any(name in saved for saved in saved_along):
            raise RecipeError(f"adapter.modules_to_save: {name!r} matches no module")
    if is_classification(recipe):
        check_method_of_head(peft_model, recipe.adapter)
    if not trained:
        raise RecipeError("adapter: nothing would be trained: no layer is adapted, or inference_mode is on")
    only_training = (".encoder2.", ".decoder.", ".logvar.", ".logvar_trunk.")
    return ModelPlan(
        adapted_layers=list(getattr(peft_model.base_model, "targeted_module_names", [])),
        base_parameters=whole,
        embedding_parameters=embedding,
        trainable_parameters=sum(by_part.values()),
        inference_parameters=sum(n for name, n in by_part.items() if not any(part in name for part in only_training)),
        trainable_sizes=[p.numel() for p in trained.values()],
        base_sizes=base_sizes,
    )


def attach_adapter(model: torch.nn.Module, adapter: dict[str, Any], **kwargs: Any) -> PeftModel:
    """Freeze `model` and inject the recipe's adapter, in fp32. RecipeError for targets that match nothing."""
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    config = build_peft_config(adapter, SEQ_CLS if is_classifier else "CAUSAL_LM")
    try:
        return get_peft_model(model, config, **kwargs)  # type: ignore[arg-type]
    except ValueError as error:
        raise RecipeError(_adapter_problem(error, {field.name for field in fields(config)})) from error


def _adapter_problem(error: Exception, known: set[str]) -> str:
    """The message of PEFT's error, with the key it is about where its text opens with one."""
    message = _first_line(error)
    first_word = message.partition(" ")[0].strip("`'\":,")
    if first_word in known:
        return f"adapter.{message}" if message.startswith(first_word) else f"adapter.{first_word}: {message}"
    if message.lower().startswith("target modules"):
        return f"adapter.target_modules: {message}"
    return f"adapter: {message}" if isinstance(error, ValueError) else f"adapter: {type(error).__name__}: {message}"


def load_base_model(recipe: Recipe, config: PretrainedConfig, attention: str) -> torch.nn.Module:
    """The frozen base model in its dtype.

    Under ZeRO-3 (a live DeepSpeed configuration, as TrainingArguments make it) every module is partitioned as it is
    built and filled: no rank ever holds the whole model on its device.
    """
    section = recipe.model
    kwargs: dict[str, Any] = {"dtype": getattr(torch, section.dtype), "attn_implementation": attention}
    make: Any = AutoModelForCausalLM.from_config
    load: Any = AutoModelForCausalLM.from_pretrained
    if is_classification(recipe):
        make, load = empty_classifier, load_classifier
        kwargs["seed"] = recipe.training.seed
    if section.random_weights:
        # Same seed on every rank and on resume: random weights are then the same base model every time.
        transformers.set_seed(recipe.training.seed)
        config.pad_token_id = None  # zero.Init partitions the embedding before its padding row is zeroed
        # Drawn where they will lie, as zero.Init does: on one core of the host an 8B model's take minutes.
        on_gpu = torch.cuda.is_available() and not recipe.training.use_cpu and not is_deepspeed_zero3_enabled()
        with torch.device("cuda") if on_gpu else nullcontext():
            model = make(config, trust_remote_code=section.trust_remote_code, **kwargs)
    else:
        try:
            model = load(
                section.name_or_path,
                config=config,
                revision=section.revision,
                trust_remote_code=section.trust_remote_code,
                use_safetensors=section.use_safetensors or None,
                **kwargs,
            )
        except (OSError, ValueError, ImportError, SafetensorError, UnpicklingError) as error:
            raise RecipeError(f"model.name_or_path: cannot load {section.name_or_path}: {_first_line(error)}") from None
    model.config.use_cache = False
    model.requires_grad_(False)
    return model


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
