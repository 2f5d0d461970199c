"""What the trainer must know of a batch: which of its tokens count, which of its rows are fillers, whose records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fvae_dist.kernels.head import IGNORED_LABEL

SideLossTokens = Literal["all", "labelled"]
# Keys that travel in a batch from collation to the loss; models never see them.
COUNTED = "fvae_counted_tokens"
LENGTHS = "fvae_example_lengths"
# The same, known on the host where the batch is made: True where whatever is padded stands at its rows' ends; how many
# of its tokens have a label (or more: some lose theirs later).
PADDED_BEHIND = "fvae_padded_behind"
NUM_LABELLED = "fvae_num_labelled"


def token_mask_of(inputs: dict[str, Any], tokens: SideLossTokens = "all") -> Tensor:
    """1 for the tokens of a batch that count in the side loss, the shape of input_ids.

    Real tokens: those of its attention mask, or all where nothing is padded; of these "labelled" keeps those that the
    task loss wants predicted.
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(inputs["input_ids"])
    if mask.dim() != 2:
        raise ValueError(f"attention_mask of shape {tuple(mask.shape)}: the side loss needs the 2-D padding mask")
    if tokens == "all":
        return mask
    if inputs["labels"].shape != mask.shape:
        raise ValueError(f"side_loss_tokens='labelled': labels of shape {tuple(inputs['labels'].shape)} are no tokens'")
    return mask * (inputs["labels"] != IGNORED_LABEL)


def unlabel_after_padding(inputs: dict[str, Any]) -> None:
    """Drop labels that padding on the left would have to predict; with padding on the right nothing predicts them."""
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if mask is not None and labels is not None and labels.shape == mask.shape:
        inputs["labels"] = labels.clone()
        inputs["labels"][:, 1:][mask[:, :-1] == 0] = IGNORED_LABEL


def drop_fillers(inputs: dict[str, Any], num_real: int) -> None:
    """Make all rows of a batch from `num_real` on count for nothing: no label, no token in the side loss.

    They are what accelerate fills the last batch of an epoch with, so that all ranks have one: rows of the epoch's
    start, which would be learned twice, and how often depends on the number of ranks.
    """
    if LENGTHS in inputs:  # one row of all examples, without padding
        first = int(inputs[LENGTHS][:num_real].sum())
        fillers: Any = (slice(None), slice(first, None))
    else:
        fillers = slice(num_real, None)
    for key, value in (("labels", IGNORED_LABEL), ("shift_labels", IGNORED_LABEL), (COUNTED, 0)):
        if key in inputs:
            inputs[key] = inputs[key].clone()
            inputs[key][fillers] = value


class _Wrapper:
    """Another collator, and more said of its batches."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # not there yet while being unpickled in a loader process
            raise AttributeError(name)
        return getattr(self.collator, name)


class WithLengths(_Wrapper):
    """A padding-free collator that also says how long each of its examples is."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        return self.collator(examples) | {LENGTHS: lengths}


class WithHostFacts(_Wrapper):
    """A collator that also says what the host would have to wait for once the batch is on the device."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        facts: dict[str, Any] = {}
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            facts[PADDED_BEHIND] = bool((mask[:, 1:] <= mask[:, :-1]).all())
        if isinstance(labels, Tensor):
            facts[NUM_LABELLED] = int((labels != IGNORED_LABEL).sum())
        return {**batch, **facts}


def find_records(dataset: Any, input_ids: Tensor) -> list[int]:
    """Indexes of the dataset's records whose tokens stand in the batch. Scans the data: only for an error message."""
    import numpy as np

    batch = input_ids.detach().cpu().numpy().astype(np.int32).tobytes()
    found = []
    for index in range(len(dataset)):
        record = np.asarray(dataset[index]["input_ids"], dtype=np.int32).tobytes()
        position = batch.find(record)
        while position >= 0 and position % 4:
            position = batch.find(record, position + 1)
        if record and position >= 0:
            found.append(index)
    return found
