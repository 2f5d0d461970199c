"""The recipe's trainer on a tiny model, with what it logs."""

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fvae_dist.training.recipe_trainer import RecipeTrainer
from tests.distributed.layouts import TINY_SFT
from tests.distributed.tiny import attach, llama_config, rows, write_tokenizer


def train(folder, device="cpu", dtype=torch.float32, config=None, data=None, collator=None, model=None, **arguments):
    """Three steps of two micro-batches of two rows; returns the trainer."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    model = model or attach(LlamaForCausalLM(llama_config()).to(dtype))
    values = {
        "output_dir": str(folder),
        "use_cpu": device == "cpu",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        **TINY_SFT,
    }
    trainer = RecipeTrainer(
        model=model,
        args=SFTConfig(**(values | (config or {}))),
        train_dataset=Dataset.from_list(data or rows(12)),
        eval_dataset=Dataset.from_list(rows(4, seed=3)),
        data_collator=collator or DataCollatorForLanguageModeling(pad_token_id=0),
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        **arguments,
    )
    trainer.train()
    return trainer


def logged(trainer, key):
    """The values of `key`, one a log line that has it."""
    return [row[key] for row in trainer.state.log_history if key in row]
