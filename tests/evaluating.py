"""Models that say a fixed thing, tiny adapted models on disk, and sets of questions, for the tests of evaluation."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.models import randomise, tiny_adapter
from tests.recipes import SIZES, byte_tokenizer


def write_speaker(folder: Path, text: str, **sizes: Any) -> Path:
    """A Llama that after a newline writes `text` (no letter twice) and stops; without an end, if its letters repeat.

    Its layers add nothing, embeddings are one-hot and the head is a table of what follows each byte.
    """
    tokenizer = byte_tokenizer()
    vocabulary = SIZES["vocab_size"]
    config = LlamaConfig(**{**SIZES, "hidden_size": vocabulary, "num_hidden_layers": 1, **sizes})
    model = LlamaForCausalLM(config)
    ids = [*tokenizer("\n" + text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary))
        for current, following in reversed(list(pairwise(ids))):
            model.lm_head.weight[:, current] = 0
            model.lm_head.weight[following, current] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_adapted(folder: Path, **sizes: Any) -> tuple[Path, Path]:
    """A tiny random base and an FVAE-LoRA adapter that changes what it says: folder/base, folder/adapter."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(8)  # so that it has opinions
    base.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    model = get_peft_model(base, tiny_adapter(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    randomise(model).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def boolq(answers: str, **columns: Any) -> list[dict[str, Any]]:
    """One question for each letter, t or f, of different lengths."""
    records = []
    for index, letter in enumerate(answers):
        answer = {"t": "true", "f": "false"}[letter]
        question = f"is {'very ' * (index * 7 % 5)}number {index} even?\n\nAnswer format: true/false"
        records.append({"instruction": question, "input": "", "output": answer, "answer": answer, **columns})
    return records


def write_json(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))
    return path


def records_of(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
