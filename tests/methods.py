"""Trainings of a recipe in this process, on CPU and without DeepSpeed: a tiny random Llama with weights, any method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fvae_dist.training import run
from fvae_dist.training.process_group import ended_with
from fvae_dist.training.recipe_trainer import RecipeTrainer
from tests.recipes import SIZES, byte_tokenizer, make_recipe, write_records

_ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # one thread, as conftest.py has it
_TARGETS = ["q_proj", "v_proj"]
_TRAINING = {
    "max_steps": 4,
    "use_cpu": True,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "save_strategy": "no",
    "stall_timeout_s": 0,
    "use_liger_kernel": False,
}


def one_process(monkeypatch: Any) -> None:
    """No launcher's environment, and none left behind."""
    for name in _ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def write_base(folder: Path) -> Path:
    """folder/base with weights and tokenizer, and folder/data.jsonl."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    write_records(folder / "data.jsonl")
    return folder / "base"


def prepare(
    folder: Path,
    adapter: dict[str, Any],
    out: str = "run",
    resume: str | None = None,
    dtype: str = "float32",
    **training: Any,
) -> run.Prepared:
    """The checked run; the adapter section is `adapter` alone, and its targets q_proj and v_proj unless it says so."""
    training = {**_TRAINING, "output_dir": str(folder / out), **training}
    recipe = make_recipe(folder, folder / "base", model={"random_weights": False, "dtype": dtype}, training=training)
    own = {**adapter} if adapter.get("peft_type") == "FULL" else {"target_modules": _TARGETS, **adapter}
    recipe = recipe.model_copy(update={"adapter": own, "logging": recipe.logging.model_copy(update={"steps": 1})})
    return run.prepare(recipe, resume)


def train(prepared: run.Prepared, *callbacks: Any) -> RecipeTrainer:
    """Train and save as the command does; the trainer as it is afterwards."""
    seen: list[RecipeTrainer] = []

    def note(trainer: RecipeTrainer) -> list:
        seen.append(trainer)
        return list(callbacks)

    prepared.make_callbacks = note
    with ended_with():
        run.train(prepared)
    if prepared.lock is not None:
        prepared.lock.close()  # as the end of the process would
    return seen[0]


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of a fixed row, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


def fresh_base(folder: Path, dtype: str = "float32") -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, dtype))
