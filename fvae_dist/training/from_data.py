"""LoRA initialisations that PEFT computes from training data: EVA and LoRA-GA. A short pass before the first step.

All ranks read the same records, drawn with training.seed. A resumed run makes no pass: its checkpoint has the outcome.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from torch import Tensor, nn
from transformers import TrainingArguments
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from fvae_dist.training.deepspeed_config import asked_stage
from fvae_dist.training.loraga import attach_as_before, attach_by_gradient
from fvae_dist.training.modeling import attach_adapter, build_peft_config
from fvae_dist.training.recipe import Recipe, RecipeError, one_line

if TYPE_CHECKING:
    from fvae_dist.training.run import Prepared

logger = logging.getLogger(__name__)
EVA, LORA_GA = "eva", "lora_ga"
_EVA_BATCHES = 128  # different ones; they come round again until the directions settle
_EVA_PATIENCE = 1024
_EVA_TOKENS = 8  # of a batch, for each component
_GRADIENT_RECORDS = 64
# What an adapter of EVA must share with the recipe that resumes it; its ranks and layers come from the data.
_EVA_KEYS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "eva_config", "init_lora_weights")


def initialisation_from_data(adapter: dict[str, Any]) -> str | None:
    """eva, lora_ga or corda, if the adapter starts from data; None for any other."""
    name = str(adapter.get("init_lora_weights")).lower()
    return name if str(adapter.get("peft_type")) == "LORA" and name in (EVA, LORA_GA, "corda") else None


def check_initialisation(recipe: Recipe) -> None:
    """RecipeError for what such an initialisation cannot be made with."""
    adapter = recipe.adapter
    name = initialisation_from_data(adapter)
    if name is None:
        return
    key = f"adapter.init_lora_weights: {name}"
    if name not in (EVA, LORA_GA):
        raise RecipeError(
            f"{key} needs a pass over data before training, which train.py makes for eva and lora_ga alone: it would "
            "be plain LoRA by another name"
        )
    if asked_stage(recipe) == 3:
        raise RecipeError(
            f"{key} needs whole weights before training, and ZeRO-3 has none; use training.deepspeed: null or "
            "ds_configs/zero2.json"
        )
    if name == LORA_GA and adapter.get("use_dora"):
        raise RecipeError(f"{key}: changes the base weights, whose norms use_dora takes for those of the model")
    if name == LORA_GA and adapter.get("use_rslora") and (adapter.get("rank_pattern") or adapter.get("alpha_pattern")):
        raise RecipeError(f"{key}: cannot be saved with use_rslora and a rank_pattern or alpha_pattern")


def attach_from_data(base: nn.Module, prepared: Prepared, args: TrainingArguments) -> PeftModel:
    """`attach_adapter`, and before or after it the pass over data; of a resumed run what its checkpoint has of it.

    Raises:
        RecipeError: the data is not enough, PEFT refuses the layers, or the checkpoint is of another adapter.
    """
    recipe, checkpoint, pad_token_id = prepared.recipe, prepared.checkpoint, prepared.tokenizer.pad_token_id
    adapter = recipe.adapter
    base.to(args.device)
    records = _documents(prepared.data.train, recipe.training.seed)
    if initialisation_from_data(adapter) == EVA:
        config = build_peft_config(adapter)
        if checkpoint is not None:
            return get_peft_model(base, _eva_config_of(Path(checkpoint), config))  # type: ignore[arg-type]
        return _initialise_eva(attach_adapter(base, adapter), records, pad_token_id)
    adapter = {**adapter, "lora_ga_config": adapter.get("lora_ga_config") or {"direction": "ArB2r"}}  # PEFT's default
    config = build_peft_config(adapter)
    assert isinstance(config, LoraConfig)
    if checkpoint is not None:
        return attach_as_before(Path(checkpoint), lambda: attach_adapter(base, adapter))
    batches = _gradient_batches(records, recipe.training.per_device_train_batch_size, pad_token_id, args.device)
    logger.info("LoRA-GA: gradients of %d batches before training", len(batches))
    if args.gradient_checkpointing:  # there is no more memory here than in the training
        base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        base.enable_input_require_grads()  # type: ignore[operator]
    try:
        return attach_by_gradient(base, config, batches, lambda: attach_adapter(base, adapter))
    finally:
        if args.gradient_checkpointing:
            base.gradient_checkpointing_disable()  # type: ignore[operator]
            base.disable_input_require_grads()  # type: ignore[operator]


# ----------------------------------------------------------------------------------------------------------------- data


def _documents(data: datasets.Dataset, seed: int) -> Iterator[dict[str, list[int]]]:
    """The training documents in a seeded order, round and round; a packed sequence is taken apart."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    while True:
        for index in order:
            row, start = data[index], 0
            for length in row.get("seq_lengths") or [len(row["input_ids"])]:
                piece = slice(start, start + length)
                yield {"input_ids": row["input_ids"][piece], "labels": row["labels"][piece]}
                start += length


def _gradient_batches(
    records: Iterator[dict[str, list[int]]], size: int, pad_token_id: int, device: torch.device
) -> list[dict[str, Tensor]]:
    collate = DataCollatorForLanguageModeling(pad_token_id)
    batches = [collate([next(records) for _ in range(size)]) for _ in range(-(-_GRADIENT_RECORDS // size))]
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


class _UntilSettled:
    """EVA's batches, the first time and again and again: PEFT ends when the directions do not change any more.

    Each has enough labelled tokens for the decomposition: PEFT passes over smaller ones, for ever if all are small.
    """

    def __init__(self, records: Iterator[dict[str, list[int]]], tokens: int, labelled_only: bool, pad_token_id: int):
        collate = DataCollatorForLanguageModeling(pad_token_id)
        self._batches = []
        for _ in range(_EVA_BATCHES):
            rows: list[dict[str, list[int]]] = []
            count = 0
            while count < tokens:
                rows.append(next(records))
                count += sum(not labelled_only or label != -100 for label in rows[-1]["labels"])
            self._batches.append(collate(rows))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in range(_EVA_PATIENCE):
            yield dict(self._batches[index % len(self._batches)])
        raise RecipeError(
            f"adapter.init_lora_weights: eva: its directions did not settle in {_EVA_PATIENCE} batches; use a smaller "
            "adapter.r or eva_config.rho or tau, or more data"
        )


# ------------------------------------------------------------------------------------------------------------------ EVA


def _initialise_eva(model: PeftModel, records: Iterator[dict[str, list[int]]], pad_token_id: int) -> PeftModel:
    config: Any = model.peft_config["default"]
    settings = config.eva_config
    components = round(max([config.r, *(config.rank_pattern or {}).values()]) * settings.rho)
    batches = _UntilSettled(records, _EVA_TOKENS * components, settings.use_label_mask, pad_token_id)
    logger.info("EVA: principal directions of the layers' inputs before training")
    try:
        found = get_eva_state_dict(
            model, batches, forward_fn=_without_head, gather_distributed_inputs=False, show_progress_bar=False
        )
    except ValueError as error:
        raise RecipeError(f"adapter.init_lora_weights: eva: {one_line(error)}") from None
    found = _of_rank_zero(found)
    initialize_lora_eva_weights(model, eva_state_dict=dict(found), show_progress_bar=False)
    # A layer whose rank has changed is new, and in the base's dtype.
    model.base_model._cast_adapter_dtype(adapter_name="default", autocast_adapter_dtype=True)  # type: ignore[operator]
    with torch.no_grad():
        for name, directions in found.items():
            if len(directions):
                model.get_submodule(name).lora_A["default"].weight.copy_(directions)  # type: ignore[index, union-attr]
    ranks = {name: len(directions) for name, directions in found.items()}
    logger.info("EVA: ranks %d to %d in %d layers", min(ranks.values()), max(ranks.values()), len(ranks))
    return model


def _without_head(model: Any, inputs: dict[str, Tensor]) -> None:
    """The layers alone: logits of a batch as large as EVA's would be what takes most of the memory."""
    causal = model.get_base_model()
    head = causal.get_output_embeddings()
    network = causal if hasattr(head, "base_layer") else causal.base_model
    network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)


def _of_rank_zero(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same ranks and directions everywhere, though devices may round differently."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return found
    box = [{name: directions.cpu() for name, directions in found.items()}]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _eva_config_of(folder: Path, config: PeftConfig) -> PeftConfig:
    """The adapter's configuration as the pass left it."""
    saved = PeftConfig.from_pretrained(str(folder))
    for key in _EVA_KEYS:
        if getattr(saved, key, None) != getattr(config, key):
            raise RecipeError(f"--resume {folder}: its adapter is not this recipe's: {key}")
    saved.inference_mode = False
    return saved
