"""Liger's fused head and loss in TRL's trainer, for a head that is frozen.

TRL's own head makes the logits twice, tile by tile: for the loss, and again for its gradient in the backward pass. It
waits for the GPU three times a step, to tell its metrics. Liger's makes the gradient to the hidden states beside the
loss and keeps that alone; with a frozen head nothing else is asked for. The loss is the same; of TRL's metrics
mean_token_accuracy is left, over all tokens since the last log line; entropy and num_tokens are not made.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_outputs import ModelOutput

from fvae_dist.training.batches import IGNORED_LABEL

if TYPE_CHECKING:
    from trl import SFTTrainer as _TrainerBase  # what the mixin is mixed into
else:
    _TrainerBase = object

# Logits of so many times the hidden states' size at a time, at most: larger products than by Liger's default, 1. Less
# from 8,192 tokens on, where the factor times the tokens would be more than the second: so the logits take half a GiB
# (4,096 hidden features) up to 65,536 tokens.
_CHUNK, _CHUNK_TOKENS = 8, 65536
# Of a configuration: what TRL's head applies to the logits and Liger's does not.
_FACTORS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def head_problem(model: Any) -> str | None:
    """Why Liger's head cannot take the place of TRL's; None if it can."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        return "the model's head has a bias, or there is none"
    if head.weight.requires_grad:
        return "the head is trained"
    for key in _FACTORS:
        if getattr(config, key, None) not in (None, 0, 1):
            return f"the model's head has a {key}"
    return None


def give_head(model: Any) -> None:
    """Let the model's forward, which TRL has changed to know `fused_lm_head`, go through Liger's head in training.

    With weights that ZeRO-3 holds in shards it goes on through TRL's, which gathers them.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    forward_of_trl = model.forward

    @functools.wraps(type(model).forward)  # generation looks at the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        # Not by name: at that ZeRO-3 would gather it, before the layers run.
        weight = dict(self.get_output_embeddings().named_parameters(recurse=False))["weight"]
        if not fused_lm_head or not self.training or hasattr(weight, "ds_id"):
            given = {"labels": labels, "shift_labels": shift_labels}
            kwargs |= {key: value for key, value in given.items() if value is not None}
            return forward_of_trl(*args, fused_lm_head=fused_lm_head, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        if shift_labels is None:
            assert labels is not None
            shift_labels = pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        found = liger_fused_linear_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            shift_labels.flatten(),
            reduction="sum",
            return_token_accuracy=True,
            chunk_mem_const=max(1, min(_CHUNK, _CHUNK_TOKENS // shift_labels.numel())),
        )
        num_labels = (shift_labels != IGNORED_LABEL).sum()
        accuracy = found.token_accuracy.detach().float().nan_to_num()  # of no label at all
        return ModelOutput(loss=found.loss, num_labels=num_labels, num_right=accuracy * num_labels)

    model.forward = types.MethodType(forward, model)


class LigerHeadMixin(_TrainerBase):
    """Mix in before SFTTrainer.

    Args (beside the trainer's, by keyword):
        liger_head: whether Liger's head takes the place of TRL's in training.

    Raises:
        ValueError: it cannot.
    """

    def __init__(self, *args: Any, liger_head: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.liger_head = liger_head
        self._right_and_labels: Tensor | None = None
        if liger_head:
            model: Any = self.model
            base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
            problem = head_problem(base) or ("the model adds a loss of its own" if self.aux_loss_enabled else None)
            if problem:
                raise ValueError(f"Liger's head: {problem}")
            give_head(base)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As TRL's, negative log-likelihood over `num_items_in_batch` labels."""
        if not self.liger_head or not model.training or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        if "num_labels" in outputs:
            loss, num_labels, num_right = outputs.loss, outputs.num_labels, outputs.num_right
        else:  # TRL's
            loss, num_labels, num_right = (
                -outputs.log_probs.sum(),
                outputs.label_mask.sum(),
                outputs.is_top1.sum(),
            )
        num_items = num_labels if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(num_items).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        found = torch.stack([num_right.float(), num_labels.float()])
        self._right_and_labels = found if self._right_and_labels is None else self._right_and_labels + found
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, with the accuracy since the last line. All ranks must call this."""
        found, self._right_and_labels = self._right_and_labels, None
        if found is not None:
            right, labels = self.accelerator.reduce(found).tolist()
            self._metrics["train"]["mean_token_accuracy"] = [right / max(labels, 1)]
        super().log(logs, start_time)
