"""Rows padded on the right, without a mask.

In a causal model no token attends to padding behind it. Without a mask attention takes its fastest kernels, and
transformers does not wait for the device to hear whether there is padding, or, there being no mask, whether rows hold
several documents: the collator knows the one, the batch's keys tell the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import masking_utils, modeling_flash_attention_utils

from fvae_dist.planning.trace import base_of
from fvae_dist.training.batches import PADDED_BEHIND, WithHostFacts

if TYPE_CHECKING:
    from trl import SFTTrainer as _TrainerBase  # what the mixin is mixed into
else:
    _TrainerBase = object

# Of transformers' attention, those that take causality from the layer, or make their own mask of it.
_KNOWN = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
# Where transformers looks for several documents in a row, and what it finds in a row that has one.
_SEARCHES = (
    (masking_utils, "find_packed_sequence_indices", None),
    (modeling_flash_attention_utils, "_is_packed_sequence", False),
)


def is_causal(model: nn.Module) -> bool:
    """Whether all of its attention layers are known to be causal without a mask."""
    kinds = {module.is_causal for module in model.modules() if hasattr(module, "is_causal")}
    return kinds == {True} and getattr(getattr(model, "config", None), "_attn_implementation", None) in _KNOWN


class MasklessMixin(_TrainerBase):
    """Mix in before HeadMixin: the model is given no attention_mask where neither it nor the loss needs one."""

    is_plain_loss: bool  # HeadMixin's

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._base: Any = base_of(self.model)
        # A router's loss leaves padding out by the mask, and TRL's own way to a loss counts tokens by it.
        self._needs_no_mask = is_causal(self._base) and self.is_plain_loss
        self.data_collator = WithHostFacts(self.data_collator)

    def training_step(self, model, inputs, *args: Any, **kwargs: Any):
        """As the trainer's; its recomputation too."""
        with self._told_of_documents(inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As the trainer's."""
        if inputs.pop(PADDED_BEHIND, False) and self._needs_no_mask:
            inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _told_of_documents(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        """Rows without positions of their own hold one document; of others flash-attn is told the borders."""
        is_flash = "flash" in str(getattr(self._base.config, "_attn_implementation", ""))
        is_told = "position_ids" not in inputs or ("cu_seq_lens_q" in inputs and is_flash)
        return _no_search_for_documents() if is_told else nullcontext()


@contextmanager
def _no_search_for_documents() -> Iterator[None]:
    """Inside, transformers does not look for documents, for which it would wait for the device."""
    searches = [(module, name, getattr(module, name)) for module, name, _ in _SEARCHES if hasattr(module, name)]
    for module, name, found in _SEARCHES:
        if hasattr(module, name):
            setattr(module, name, lambda *_, found=found, **__: found)
    try:
        yield
    finally:
        for module, name, search in searches:
            setattr(module, name, search)
