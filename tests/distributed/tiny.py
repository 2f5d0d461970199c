"""Tiny inputs shared by the two ranks and the single-process reference: model folders, rows, adapters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fvae_dist import FVAELoraConfig

VOCABULARY = 64
ADAPTER = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "encoder_hidden": 6,
    "encoder_dropout": 0.1,
    "decoder_hidden": 8,
    "decoder_dropout": 0.1,
    "task_type": "CAUSAL_LM",
}


def llama_config(**overrides) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    return LlamaConfig(**(sizes | overrides))


def write_model(folder: Path, **overrides) -> Path:
    """A tiny fp32 Llama with a word tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(**overrides)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{index}": index for index in range(2, VOCABULARY)}
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, **words}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def write_large_model(folder: Path, hidden: int = 1024, layers: int = 10) -> int:
    """A bf16 Llama of some 260 MB with few words; returns its bytes. Written without ever building the model."""
    config = llama_config(
        hidden_size=hidden,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    tensors = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return sum(tensor.numel() * 2 for tensor in tensors.values())


def rows(number: int, seed: int = 1) -> list[dict[str, list[int]]]:
    """Token rows of very different length and share of labels; the first token of row i is i + 2, so rows differ."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for index in range(number):
        length = int(torch.randint(3, 24, (1,), generator=generator))
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        ids[0] = index % (VOCABULARY - 2) + 2
        prompt = int(torch.randint(0, length - 1, (1,), generator=generator))
        result.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return result


def attach(model: torch.nn.Module, **overrides) -> PeftModel:
    """Freeze, attach an FVAE adapter, and give all its parameters values from which every gradient is non-zero."""
    model.requires_grad_(False)
    peft_model = get_peft_model(model, FVAELoraConfig(**(ADAPTER | overrides)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                # Of a size that keeps the latents small for wider layers too.
                size = 0.3 * min(1.0, 4 * parameter.shape[-1] ** -0.5)
                parameter.copy_(1 + 0.1 * noise if name.endswith("scale") else size * noise)
    return peft_model


def load(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> torch.nn.Module:
    attention = os.environ.get("FVAE_TEST_ATTENTION", "sdpa")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention, **config)


def pad_rows(batch: list[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    """Padded input_ids, labels and attention_mask."""
    longest = max(len(row["input_ids"]) for row in batch)

    def pad(values: list[int], with_: int) -> list[int]:
        padding = [with_] * (longest - len(values))
        return values + padding if side == "right" else padding + values

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in batch]),
        "labels": torch.tensor([pad(row["labels"], -100) for row in batch]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in batch]),
    }
