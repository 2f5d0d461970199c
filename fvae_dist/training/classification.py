"""Sequence classification, `model.task: classification`: the head, the batches, the loss, and what is refused.

The head reads the last token of a text. It is a new fp32 linear layer without bias named `score`, where transformers'
decoders for classification have theirs; PEFT copies, trains and saves it (`modules_to_save`). As it is made after the
base, ZeRO-3 shards it as it does adapters, and its values stay fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from fvae_dist.training.batches import IGNORED_LABEL
from fvae_dist.training.recipe import Recipe, RecipeError

SEQ_CLS = "SEQ_CLS"
HEAD = "score"


def is_classification(recipe: Recipe) -> bool:
    return recipe.model.task == "classification"


def check_classification(recipe: Recipe) -> None:
    """RecipeError for what a classifier cannot be trained with."""
    if not is_classification(recipe):
        return
    adapter, training = recipe.adapter, recipe.training
    method, start = str(adapter.get("peft_type", "FVAE_LORA")), str(adapter.get("init_lora_weights")).lower()
    refused = {
        "data.packing: true": (recipe.data.packing, "a classifier reads one text a row"),
        "data.overlong: split": (recipe.data.overlong == "split", "a piece of a text has no label of its own"),
        "training.side_loss_tokens: labelled": (
            training.side_loss_tokens == "labelled",
            "no token of a text has a label, the text has",
        ),
        "training.head: fused": (training.head == "fused", "is a language-model head"),
        "training.use_liger_kernel: true": (training.use_liger_kernel is True, "is not used in classifiers"),
        "training.sequence_parallel": (training.sequence_parallel > 1, "the head needs the row's last token whole"),
        "training.tiled_mlp: true": (training.tiled_mlp, "is for long rows of language models"),
        "training.activation_offload: true": (training.activation_offload, "is TRL's, whose trainer is for text"),
        "training.recompute: selective": (training.recompute == "selective", "is TRL's, whose trainer is for text"),
        "adapter.peft_type: FULL": (method == "FULL", "trains every weight and saves no adapter to evaluate"),
        "adapter.peft_type: ADALORA": (method == "ADALORA", "is not trained for classification here"),
        f"adapter.init_lora_weights: {start}": (
            start in ("eva", "lora_ga", "corda"),
            "computes its start from a language model's loss or data",
        ),
    }
    for setting, (is_set, why) in refused.items():
        if is_set:
            raise RecipeError(f"{setting}: goes not with model.task classification: {why}")


def give_head(model: nn.Module, config: PretrainedConfig, seed: int = 0) -> None:
    """Replace the model's head by a new one in fp32, the same on every rank.

    Raises:
        RecipeError: an architecture whose head is not a linear layer `score` without bias.
    """
    old = getattr(model, HEAD, None)
    if not isinstance(old, nn.Linear) or old.bias is not None:
        name = type(model).__name__
        raise RecipeError(f"model.task: classification: {name} has no linear head named {HEAD}, as decoders have")
    head = nn.Linear(old.in_features, old.out_features, bias=False, device=old.weight.device, dtype=torch.float32)
    if not head.weight.is_meta:
        generator = torch.Generator().manual_seed(seed)
        deviation = getattr(config.get_text_config(), "initializer_range", 0.02)
        values = torch.randn(head.weight.shape, generator=generator) * deviation
        with torch.no_grad():
            head.weight.copy_(values)
    head.register_forward_pre_hook(_in_the_heads_dtype)
    setattr(model, HEAD, head)


def _in_the_heads_dtype(head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The base's bf16 hidden states, as the fp32 head takes them."""
    return (inputs[0].to(head.weight.dtype), *inputs[1:])


def load_classifier(name: str, config: PretrainedConfig, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A causal language model's layers from its weights, under a new head; `config` names the labels.

    Raises:
        RecipeError: an architecture without a head of the kind that is known here.
        OSError, ValueError: as transformers' `from_pretrained`, and others.
    """
    model = AutoModelForSequenceClassification.from_pretrained(name, config=config, **kwargs)
    give_head(model, config, seed)
    return model


def empty_classifier(config: PretrainedConfig, seed: int = 0, **kwargs: Any) -> nn.Module:
    """The same with random weights, or none on the meta device."""
    model = AutoModelForSequenceClassification.from_config(config, **kwargs)
    give_head(model, config, seed)
    return model


def check_method_of_head(model: Any, adapter: dict[str, Any]) -> None:
    """RecipeError where the method leaves the head as it is, or would have it read the wrong token."""
    problem = ""
    if model.active_peft_config.is_prompt_learning:  # given embeddings, transformers takes a batch's last column
        problem = "the head would read the padding of shorter texts"
    elif not isinstance(getattr(model.get_base_model(), HEAD), ModulesToSaveWrapper):
        problem = "the head would not be trained"
    if problem:
        name = adapter.get("peft_type", "FVAE_LORA")
        raise RecipeError(f"adapter.peft_type: {name}: goes not with model.task classification: {problem}")


# ------------------------------------------------------------------------------------------------------------- batches


class TextCollator:
    """Rows of input_ids and one label, padded on the right."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids and attention_mask (B, T), labels (B,)."""
        longest = max(len(example["input_ids"]) for example in examples)
        ids = torch.full((len(examples), longest), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            ids[row, :length] = torch.tensor(example["input_ids"])
            mask[row, :length] = 1
        labels = torch.tensor([example["labels"][0] for example in examples])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def row_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Cross entropy of the classes, summed over the rows and divided by those of the optimizer step, or averaged.

    transformers' own loss of a classifier averages over each micro-batch, though the trainer takes it for normalised.
    """
    logits_BK = outputs.logits.float()
    if num_items_in_batch is None:
        return cross_entropy(logits_BK, labels, ignore_index=IGNORED_LABEL)
    total = cross_entropy(logits_BK, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)
