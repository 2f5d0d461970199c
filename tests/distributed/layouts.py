"""One global batch in many layouts: the table of the invariance suite, and the one-process reference.

Seven documents of very different length; one has no label left (its completion was cut off), and in most layouts the
second rank has a row fewer. Noise and dropout are on. Every pair of values of two factors occurs in some layout.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.models import enable_selective_activation_checkpointing
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fvae_dist import FVAETrainerMixin, side_loss
from fvae_dist.adapter.noise import TokenNoise
from fvae_dist.training.resumable import ResumableTrainerMixin
from tests.distributed.tiny import attach, load, pad_rows, rows

SEED = 5
NUM_DOCUMENTS = 7
FACTORS = ("trainer", "stage", "checkpointing", "batch", "form")
# trainer: TRL's or transformers'. stage: of ZeRO, or DDP. batch: micro-batch per rank x accumulation (x 2 ranks).
# form: right or left padding, padding to 32, documents side by side (padding_free), packed sequences of documents.
LAYOUTS: dict[str, tuple[str, Any, str, str, str]] = {
    "z3_sft_full": ("sft", 3, "full", "4x1", "right"),
    "z3_sft_off": ("sft", 3, "off", "2x2", "packed"),
    "z3_plain_full": ("plain", 3, "full", "1x4", "left"),
    "z3_plain_off": ("plain", 3, "off", "4x1", "padding_free"),
    "z3_sft_full_wide": ("sft", 3, "full", "2x2", "wide"),
    "z3_sft_selective": ("sft", 3, "selective", "2x2", "padding_free"),
    "z2_sft_full": ("sft", 2, "full", "2x2", "left"),
    "z2_sft_off": ("sft", 2, "off", "1x4", "right"),
    "z2_plain_full": ("plain", 2, "full", "4x1", "packed"),
    "z2_plain_off": ("plain", 2, "off", "4x1", "wide"),
    "z2_sft_full_free": ("sft", 2, "full", "2x2", "padding_free"),
    "z2_sft_selective": ("sft", 2, "selective", "4x1", "left"),
    "z0_sft_off": ("sft", 0, "off", "4x1", "left"),
    "z0_plain_full": ("plain", 0, "full", "2x2", "right"),
    "z0_sft_full": ("sft", 0, "full", "1x4", "padding_free"),
    "z0_plain_off": ("plain", 0, "off", "1x4", "packed"),
    "z0_sft_selective": ("sft", 0, "selective", "1x4", "wide"),
    "z0_sft_selective_right": ("sft", 0, "selective", "2x2", "right"),
    "ddp_sft_full": ("sft", "ddp", "full", "1x4", "wide"),
    "ddp_plain_off": ("plain", "ddp", "off", "2x2", "left"),
    "ddp_sft_selective": ("sft", "ddp", "selective", "4x1", "packed"),
    "ddp_plain_full": ("plain", "ddp", "full", "4x1", "right"),
    "ddp_sft_selective_free": ("sft", "ddp", "selective", "1x4", "padding_free"),
}
# The same step with two ranks sharing each row.
SEQUENCE_PARALLEL: dict[str, tuple[str, Any, str, str, str]] = {
    "sp_z3_sft_full": ("sft", 3, "full", "2x4", "right"),
    "sp_z3_sft_off": ("sft", 3, "off", "1x6", "packed"),
    "sp_z3_plain_full": ("plain", 3, "full", "4x2", "wide"),
    "sp_z2_sft_full": ("sft", 2, "full", "1x6", "packed"),
    "sp_z3_sft_selective": ("sft", 3, "selective", "4x2", "right"),
    "sp_z2_plain_off": ("plain", 2, "off", "4x2", "right"),
}
# With MLPs over tiles of tokens; see worker.py.
TILED = ("tiled", "tiled_sp")
IMPOSSIBLE = {
    ("plain", "selective"): "transformers has no selective checkpointing",
}
# Of trl.SFTConfig, for runs of the tiny model in one process.
TINY_SFT = {
    "bf16": False,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "seed": SEED,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "max_length": None,
    "remove_unused_columns": False,
}


def uncovered_pairs() -> set[tuple[Any, Any]]:
    """Pairs of factor values that no layout has."""
    values = [sorted({layout[i] for layout in LAYOUTS.values()}, key=str) for i in range(len(FACTORS))]
    missing = set()
    for i, j in combinations(range(len(FACTORS)), 2):
        seen = {(layout[i], layout[j]) for layout in LAYOUTS.values()}
        missing |= {(a, b) for a in values[i] for b in values[j]} - seen - set(IMPOSSIBLE)
    return missing


def documents() -> list[dict[str, list[int]]]:
    batch = rows(NUM_DOCUMENTS)
    batch[2]["labels"] = [-100] * len(batch[2]["labels"])
    return batch


def training_rows(form: str) -> list[dict[str, Any]]:
    """The documents as a training set; packed: two or three of them in a sequence, three sequences."""
    if form != "packed":
        return documents()
    packed = []
    for group in ((0, 1, 2), (3, 4), (5, 6)):
        members = [documents()[index] for index in group]
        packed.append(
            {
                "input_ids": [token for member in members for token in member["input_ids"]],
                "labels": [label for member in members for label in member["labels"]],
                "seq_lengths": [len(member["input_ids"]) for member in members],
            }
        )
    return packed


class LeftPadding:
    """Pads on the left, as for generation."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        return pad_rows(examples, side="left")


def collator(form: str) -> Any:
    if form == "left":
        return LeftPadding()
    return DataCollatorForLanguageModeling(
        pad_token_id=0,
        padding_free=form in ("packed", "padding_free"),
        pad_to_multiple_of=32 if form == "wide" else None,
    )


def settings(layout: str) -> dict[str, Any]:
    """What `worker.Run` takes."""
    trainer, stage, checkpointing, batch, form = (LAYOUTS | SEQUENCE_PARALLEL)[layout]
    micro_batch, accumulation = map(int, batch.split("x"))
    if form == "packed" and micro_batch > 1:
        micro_batch //= 2  # three sequences hold the seven documents
    elif form == "packed":
        accumulation //= 2
    arguments: dict[str, Any] = {"max_grad_norm": 0.0, "seed": SEED}
    prepare = {"prepare_model": enable_selective_activation_checkpointing} if checkpointing == "selective" else {}
    return {
        "trainer": trainer,
        "stage": None if stage == "ddp" else stage,
        "checkpointing": checkpointing != "off",
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "form": form,
        "rows": training_rows(form),
        "arguments": arguments,
        **prepare,
        "trainer_arguments": {"sequence_parallel": 2} if layout in SEQUENCE_PARALLEL else {},
    }


def task_loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy, mean over the labels of the whole batch; no trainer, no loss of the model's own."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"][:, 1:].flatten())


def reference_step(model: torch.nn.Module, batch: dict[str, Tensor], step: int = 0) -> dict[str, Any]:
    """Losses, terms and gradients of a batch in one process, computed directly."""
    with side_loss.collect(model, noise=TokenNoise(batch, seed=SEED, step=step)) as collected:
        task = task_loss(model, batch)
    (1000 * task + collected.neg_elbo).backward()
    return {
        "task": task.item(),
        "neg_elbo": collected.neg_elbo.item(),
        "terms": {name: values.mean().item() for name, values in collected.terms.items()},
        "num_tokens": int(collected.num_tokens),
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
    }


class OneProcess(ResumableTrainerMixin, FVAETrainerMixin, SFTTrainer):
    """The trainer in one process; keeps the first token of every row it saw, by step and micro-batch."""

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        self.seen = [*getattr(self, "seen", []), [batch["input_ids"][:, 0].tolist() for batch in samples]]
        return samples, num_items


def one_process(
    model_folder: Path, output: Path, data: list[dict[str, Any]], resume: Path | None = None, **arguments: Any
) -> OneProcess:
    """What `worker.Run` trains, in this process, trained to its end."""
    values = {
        "output_dir": str(output),
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "data_seed": SEED,
        **TINY_SFT,
    }
    trainer = OneProcess(
        model=attach(load(model_folder)),
        args=SFTConfig(**(values | arguments)),
        train_dataset=Dataset.from_list(data),
        data_collator=collator("right"),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer
