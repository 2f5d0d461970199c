"""A frozen language-model head and its cross-entropy, without whole logits and without making them twice.

For a part of the tokens at a time: logits = hidden W^T, a kernel that reads their loss and writes its gradient in their
place, gradient of hidden = that times W. The gradient is kept and the backward pass scales it, as Liger's fused linear
cross-entropy does (liger-kernel 0.8.5), which waits for the device to count the labels, takes all tokens, labelled or
not, and does not tell the entropy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fvae_dist.kernels.launching import on

IGNORED_LABEL = -100
# Logits that are made at a time take so many bytes: 2,093 tokens of Llama-3's in bf16.
LOGITS_BYTES = 2**29
_BLOCK = 4096


class HeadSums(NamedTuple):
    """Over the labelled tokens, fp32 scalars. `loss` alone has a gradient, to the hidden states.

    Attributes:
        loss: negative log-likelihood of the labels, in nats.
        entropy: of the predictions, in nats.
        num_right: tokens whose label is the most likely one.
    """

    loss: Tensor
    entropy: Tensor
    num_right: Tensor


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, num_labelled: int | None = None) -> HeadSums:
    """Sums over the tokens with a label.

    Args:
        hidden: (T, D), on a GPU (or in Triton's interpreter), in the dtype of `weight`.
        weight: (V, D), frozen.
        labels: (T) int64, already shifted; IGNORED_LABEL has none.
        num_labelled: how many have one, or more; if known, logits are made of so many tokens only.

    Raises:
        ValueError: the weight needs a gradient.
    """
    if weight.requires_grad:
        raise ValueError("the head's weight needs a gradient, which this loss does not give it")
    if num_labelled is not None and num_labelled < len(labels):
        # The labelled ones first, all of the same order: no index of unknown length, for which the host would wait.
        order = (labels == IGNORED_LABEL).int().argsort(stable=True)[: max(num_labelled, 1)]
        hidden, labels = hidden.index_select(0, order), labels.index_select(0, order)
    return HeadSums(*_HeadLoss.apply(hidden, weight, labels))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from fvae_dist.kernels.triton_head import INTERPRETED, cross_entropy_kernel

        hidden, weight, labels = hidden.contiguous(), weight.contiguous(), labels.contiguous()
        (tokens, _), words = hidden.shape, len(weight)
        part = max(1, min(tokens, LOGITS_BYTES // (words * weight.element_size())))
        found = hidden.new_empty((3, tokens), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        logits = hidden.new_empty((part, words))
        with on(hidden):
            for start in range(0, tokens, part):
                here = slice(start, min(start + part, tokens))
                size = here.stop - start
                torch.mm(hidden[here], weight.t(), out=logits[:size])
                sizes = (tokens, words, IGNORED_LABEL, INTERPRETED, _BLOCK)
                cross_entropy_kernel[(size,)](logits, labels[here], found[:, start:], *sizes, num_warps=8)
                torch.mm(logits[:size], weight, out=gradient[here])
        ctx.save_for_backward(gradient)
        loss, entropy, num_right = found.sum(dim=1)
        ctx.mark_non_differentiable(entropy, num_right)
        return loss, entropy, num_right

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_loss, None, None
