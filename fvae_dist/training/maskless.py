"""Rows padded on the right, without a mask.

In a causal model no token attends to padding behind it. Without a mask attention takes its fastest kernels, and
transformers does not wait for the device to hear whether there is padding, or, there being no mask, whether rows hold
several documents: the collator knows the one, the batch's keys tell the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import masking_utils

if TYPE_CHECKING:
    from trl import SFTTrainer as _TrainerBase  # what the mixin is mixed into
else:
    _TrainerBase = object

# A batch's key: True where whatever is padded stands at its rows' ends.
PADDED_BEHIND = "fvae_padded_behind"
# Of transformers' attention, those that take causality from the layer, or make their own mask of it.
_KNOWN = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


class SaysWherePadded:
    """A collator that also says whether padding stands behind the tokens, on the host, where the batch is made."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        mask = batch.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return batch
        return {**batch, PADDED_BEHIND: bool((mask[:, 1:] <= mask[:, :-1]).all())}

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # not there yet while being unpickled in a loader process
            raise AttributeError(name)
        return getattr(self.collator, name)


def is_causal(model: nn.Module) -> bool:
    """Whether all of its attention layers are known to be causal without a mask."""
    kinds = {module.is_causal for module in model.modules() if hasattr(module, "is_causal")}
    return kinds == {True} and getattr(getattr(model, "config", None), "_attn_implementation", None) in _KNOWN


class MasklessMixin(_TrainerBase):
    """Mix in before SFTTrainer, whose model is given no attention_mask where it needs none."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        own: Any = self.model
        self._base: Any = own.get_base_model() if hasattr(own, "get_base_model") else own
        self._is_causal = is_causal(self._base)
        collator: Any = self.data_collator
        if not self._is_causal and getattr(collator, "pad_to_multiple_of", None):
            collator.pad_to_multiple_of = None  # rows that are filled up would need a mask
        self.data_collator = SaysWherePadded(collator)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As the trainer's."""
        if inputs.pop(PADDED_BEHIND, False) and self._is_causal:
            inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
        is_flash = "flash" in str(getattr(self._base.config, "_attn_implementation", ""))
        is_told = "position_ids" not in inputs or ("cu_seq_lens_q" in inputs and is_flash)
        with _no_search_for_documents() if is_told else nullcontext():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@contextmanager
def _no_search_for_documents() -> Iterator[None]:
    """Inside, transformers makes no mask that keeps documents of a row apart: there is one, or flash-attn is told."""
    search = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = search
