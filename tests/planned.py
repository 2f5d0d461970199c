"""What the planner's tests plan: models by their sizes, choices by their names. Nothing here has weights."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from fvae_dist.planning.choice import Choice, Recompute
from fvae_dist.planning.subject import Settings, Subject, describe
from fvae_dist.training.deepspeed_config import size_for_adapter
from fvae_dist.training.modeling import attach_adapter
from fvae_dist.training.tiled_mlp import tile_mlps

ROOT = Path(__file__).parents[1]
_SHARED = {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
SIZES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "tie_word_embeddings": False,
    },
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | _SHARED,
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | _SHARED,
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
    | _SHARED,
}


def subject(
    size: str = "8b",
    length: int = 8192,
    peft_type: str = "FVAE_LORA",
    sequences: int = 1,
    attention: str = "flash_attention_2",
    liger: bool = False,
    dtype: str = "bfloat16",
    tiled: bool = False,
) -> Subject:
    """A Llama of that size with adapters on q and v; made once for all tests, and traced once for each length."""
    made = _subject(size, peft_type, attention, liger, dtype, tiled)
    return replace(made, settings=replace(made.settings, sequences=sequences, length=length))


@cache
def _subject(size: str, peft_type: str, attention: str, liger: bool, dtype: str, tiled: bool) -> Subject:
    adapter = {"peft_type": peft_type, "r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    change = partial(tile_mlps, zero3=False) if tiled else None
    return subject_of_config(LlamaConfig(**SIZES[size]), adapter, Settings(dtype, 1, 1, attention, liger), change)


def subject_of_config(
    config: PretrainedConfig, adapter: dict[str, Any], settings: Settings, change: Any = None
) -> Subject:
    return describe(config, settings, lambda model: attach_adapter(model, adapter, low_cpu_mem_usage=True), change)


def choice(
    of: Subject,
    name: str | None = "zero3",
    recompute: Recompute = "full",
    hpz: int = 8,
    resident: bool = False,
    **zero: Any,
) -> Choice:
    """A shipped configuration, as it is for this adapter; `zero` changes its ZeRO section."""
    if name is None:
        return Choice("null", None, recompute)
    config = copy.deepcopy(_config(name))
    section = config["zero_optimization"]
    if section.get("zero_hpz_partition_size") == "auto":
        section["zero_hpz_partition_size"] = hpz
    section.update(zero)
    size_for_adapter(config, of.trainable_sizes, of.base_sizes)
    return Choice(name, config, recompute, resident)


@cache
def _config(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
