"""The language-model head and its loss in TRL's trainer, without waiting for the device.

TRL's head makes the logits twice, tile by tile: for the loss, and again for its gradient in the backward pass. It waits
for the device to hear which tokens have a label, and TRL's trainer to tell its metrics. A frozen head's logits need be
made once (`fvae_dist.kernels.head`); how many labels there are, the collator has counted; and metrics stay on the
device until a log line tells them. They are means over the tokens since the line before, whichever the head.
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.modeling_outputs import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from fvae_dist.kernels.head import head_loss
from fvae_dist.planning.trace import base_of
from fvae_dist.training.batches import IGNORED_LABEL, NUM_LABELLED

if TYPE_CHECKING:
    from trl import SFTTrainer as _TrainerBase  # what the mixin is mixed into
else:
    _TrainerBase = object

# Of a configuration: what TRL's head applies to the logits and ours does not.
_FACTORS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_METRICS = ("mean_token_accuracy", "entropy")


def head_problem(model: Any) -> str | None:
    """Why the fused head cannot take the place of TRL's, in a model or a PeftModel; None if it can."""
    model = base_of(model)
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:  # an adapted one is another class
        return "the model's head is no plain matrix"
    if head.weight.requires_grad:
        return "the head is trained"
    for key in _FACTORS:
        if getattr(config, key, None) not in (None, 0, 1):
            return f"the model's head has a {key}"
    # TRL's trainer asks the router for its logits wherever the configuration has a weight for their loss.
    if hasattr(config, "output_router_logits") and getattr(config, "router_aux_loss_coef", 0.0):
        return "the model adds a loss of its own"
    return None


def give_head(model: Any) -> None:
    """Let the model's forward, which TRL has changed to know `fused_lm_head`, go through the fused head in training."""
    forward_of_trl = model.forward

    @functools.wraps(type(model).forward)  # generation looks at the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_labelled: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head or not self.training:
            given = {"labels": labels, "shift_labels": shift_labels}
            kwargs |= {key: value for key, value in given.items() if value is not None}
            return forward_of_trl(*args, fused_lm_head=fused_lm_head, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        if shift_labels is None:
            assert labels is not None
            shift_labels = pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
        weight = self.get_output_embeddings().weight
        with maybe_gather_lm_head_ctx(weight):  # where ZeRO-3 shards it; the backward pass does not need it
            found = head_loss(hidden.flatten(0, 1).to(weight.dtype), weight, shift_labels.flatten(), num_labelled)
        return ModelOutput(found._asdict())

    model.forward = types.MethodType(forward, model)


class HeadMixin(_TrainerBase):
    """Mix in before SFTTrainer. Losses other than the plain negative log-likelihood are left to it.

    Args (beside the trainer's, by keyword):
        fused_head: whether the fused head takes the place of TRL's in training.

    Attributes:
        is_plain_loss: whether the loss is computed here.

    Raises:
        ValueError: it cannot.
    """

    def __init__(self, *args: Any, fused_head: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fused_head = fused_head
        self._head_sums: Tensor | None = None
        settings: Any = self.args
        is_nll = settings.loss_type == "nll" and self.label_smoother is None and self.compute_loss_func is None
        self.is_plain_loss = is_nll and not self.aux_loss_enabled
        if fused_head:
            if problem := head_problem(self.model) or (None if is_nll else "the loss is not the plain likelihood"):
                raise ValueError(f"the fused head: {problem}")
            give_head(base_of(self.model))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As TRL's; the negative log-likelihood over `num_items_in_batch` labels without waiting."""
        num_labelled = inputs.pop(NUM_LABELLED, None)
        if not model.training or return_outputs or not self.is_plain_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.fused_head:
            inputs["num_labelled"] = num_labelled
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        if "log_probs" in outputs:
            sums = [-outputs.log_probs.sum(), outputs.entropy.detach().sum(), outputs.is_top1.sum()]
        else:
            sums = [outputs.loss, outputs.entropy, outputs.num_right]
        labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]
        num_labels = (labels != IGNORED_LABEL).sum()
        num_items = num_labels if num_items_in_batch is None else num_items_in_batch
        loss = sums[0] / torch.as_tensor(num_items).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        found = torch.stack([sums[2].float(), sums[1].float(), num_labels.float()])
        self._head_sums = found if self._head_sums is None else self._head_sums + found
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, with the metrics since the last line. All ranks must call this."""
        if "loss" in logs and self._head_sums is not None:
            found, self._head_sums = self._head_sums, None
            *sums, num_labels = self.accelerator.reduce(found).tolist()
            self._metrics["train"] |= {
                key: [value / max(num_labels, 1)] for key, value in zip(_METRICS, sums, strict=True)
            }
        self._metrics["eval"].pop("num_tokens", None)  # TRL's count of training tokens, which is not kept
        super().log(logs, start_time)
