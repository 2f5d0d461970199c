"""The base model, the tokenizer and the adapter: checked on the meta device first, loaded sharded second."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

import fvae_dist.adapter  # noqa: F401  (registers FVAE_LORA with PEFT)
from fvae_dist.training.recipe import ModelSection, Recipe, RecipeError, unknown_key

logger = logging.getLogger(__name__)
FLASH_INSTALL = "pip install flash-attn --no-build-isolation"


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
    """The base model's configuration; RecipeError if there is none."""
    path = Path(section.name_or_path)
    if path.exists() and not (path / "config.json").is_file():
        raise RecipeError(f"model.name_or_path: {path} holds no config.json: not a Hugging Face model folder")
    try:
        return AutoConfig.from_pretrained(
            section.name_or_path, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"model.name_or_path: cannot load {section.name_or_path}: {_first_line(error)}") from None


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{key}: cannot load a tokenizer from {name}: {_first_line(error)}") from None
    if tokenizer.eos_token is None:
        raise RecipeError(f"{key}: the tokenizer of {name} has no EOS token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_lengths(recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse sequences longer than the model's positions and a tokenizer larger than its vocabulary."""
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and recipe.data.max_length > positions:
        raise RecipeError(
            f"data.max_length: {recipe.data.max_length} is longer than the {positions} positions of "
            f"{recipe.model.name_or_path}"
        )
    if len(tokenizer) > text_config.vocab_size:
        raise RecipeError(
            f"model.tokenizer: {len(tokenizer)} tokens do not fit the vocabulary of {text_config.vocab_size} of "
            f"{recipe.model.name_or_path}"
        )


def build_peft_config(adapter: dict[str, Any]) -> PeftConfig:
    """The PEFT configuration of the recipe's adapter section; RecipeError for a key or value PEFT does not know."""
    values = dict(adapter)
    peft_type = values.pop("peft_type", "FVAE_LORA")
    known_types = {str(getattr(t, "value", t)): cls for t, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if peft_type not in known_types:
        raise RecipeError(
            f"adapter.peft_type: {unknown_key(str(peft_type), sorted(known_types))}".replace("key", "type")
        )
    config_cls = known_types[peft_type]
    known = {field.name for field in fields(config_cls) if field.init}
    for key in values:
        if key not in known:
            raise RecipeError(f"adapter.{key}: {unknown_key(key, sorted(known))}")
    try:
        config = config_cls(task_type=values.pop("task_type", "CAUSAL_LM"), **values)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"adapter: {_first_line(error)}") from None
    rank = getattr(config, "r", 1)
    if isinstance(rank, int) and rank <= 0:
        raise RecipeError(f"adapter.r: must be > 0, got {rank}")
    return config


def plan_model(recipe: Recipe, config: PretrainedConfig) -> ModelPlan:
    """Build base and adapter on the meta device: checks the targets and counts, in seconds and without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)
    base_sizes = [parameter.numel() for parameter in model.parameters()]
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    embedding = 0 if tied else model.get_input_embeddings().weight.numel()
    peft_model = attach_adapter(model, recipe.adapter, low_cpu_mem_usage=True)
    trainable = {name: p.numel() for name, p in peft_model.named_parameters() if p.requires_grad}
    only_training = (".encoder2.", ".decoder.", ".logvar.", ".logvar_trunk.")
    return ModelPlan(
        adapted_layers=list(getattr(peft_model.base_model, "targeted_module_names", [])),
        base_parameters=sum(base_sizes),
        embedding_parameters=embedding,
        trainable_parameters=sum(trainable.values()),
        inference_parameters=sum(n for name, n in trainable.items() if not any(part in name for part in only_training)),
        trainable_sizes=list(trainable.values()),
        base_sizes=base_sizes,
    )


def attach_adapter(model: torch.nn.Module, adapter: dict[str, Any], **kwargs: Any) -> PeftModel:
    """Freeze `model` and inject the recipe's adapter, in fp32. RecipeError for targets that match nothing."""
    try:
        return get_peft_model(model, build_peft_config(adapter), **kwargs)  # type: ignore[arg-type]
    except ValueError as error:
        message = _first_line(error)
        key = "adapter" if message.startswith("target_modules") else "adapter.target_modules"
        raise RecipeError(f"{key}{'.' if key == 'adapter' else ': '}{message}") from None


def choose_attention(section: ModelSection, use_cpu: bool) -> tuple[str, str]:
    """The attention implementation and the reason for it.

    Raises:
        RecipeError: flash_attention_2 was asked for and cannot run here; with the install line where it is missing.
    """
    obstacle = _flash_obstacle(section, use_cpu)
    if section.attention == "flash_attention_2":
        if obstacle:
            raise RecipeError(f"model.attention: flash_attention_2 cannot run here: {obstacle}")
        return "flash_attention_2", "asked for"
    if section.attention != "auto":
        return section.attention, "asked for"
    if obstacle is None:
        return "flash_attention_2", "auto: flash-attn is installed and the device can"
    if hasattr(torch.nn.functional, "scaled_dot_product_attention"):
        return "sdpa", f"auto: no flash_attention_2 ({obstacle})"
    return "eager", f"auto: neither flash_attention_2 ({obstacle}) nor sdpa"


def _flash_obstacle(section: ModelSection, use_cpu: bool) -> str | None:
    if use_cpu or not torch.cuda.is_available():
        return f"no CUDA device here; on one it needs `{FLASH_INSTALL}`"
    if not is_flash_attn_2_available():
        return f"flash-attn is not installed: `{FLASH_INSTALL}`"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if section.dtype == "float32":
        return "it needs model.dtype bfloat16 or float16"
    return None


def load_base_model(recipe: Recipe, config: PretrainedConfig, attention: str) -> torch.nn.Module:
    """The frozen base model in its dtype.

    Under ZeRO-3 (a live DeepSpeed configuration, as TrainingArguments make it) every module is partitioned as it is
    built and filled: no rank ever holds the whole model on its device.
    """
    section = recipe.model
    kwargs = {"dtype": getattr(torch, section.dtype), "attn_implementation": attention}
    if section.random_weights:
        # Same seed on every rank and on resume: random weights are then the same base model every time.
        transformers.set_seed(recipe.training.seed)
        config.pad_token_id = None  # zero.Init partitions the embedding before its padding row is zeroed
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code, **kwargs)
    else:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                section.name_or_path,
                config=config,
                revision=section.revision,
                trust_remote_code=section.trust_remote_code,
                **kwargs,
            )
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(f"model.name_or_path: cannot load {section.name_or_path}: {_first_line(error)}") from None
    model.config.use_cache = False
    model.requires_grad_(False)
    return model


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
