"""What stands between the two products of a language model's head and loss (`head.py`)."""

# mypy: ignore-errors

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from fvae_dist.kernels.triton_parts import cast


@triton.jit(do_not_specialize=["T"])
def cross_entropy_kernel(
    logits_ptr, labels_ptr, found_ptr, T, V, IGNORED: tl.constexpr, INTERPRETED: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """Of a token's logits (V): writes their loss's gradient in their place, and in `found` (3, T) its loss, its
    entropy and whether the label is the first of the largest logits; zeros without a label."""
    token = tl.program_id(0)
    label = tl.load(labels_ptr + token)
    row_ptr = logits_ptr + token.to(tl.int64) * V
    is_counted = label != IGNORED
    largest = -float("inf")
    before = -float("inf")
    total = 0.0
    weighted = 0.0
    if is_counted:
        of_label = tl.load(row_ptr + label).to(tl.float32)  # before anything is written in its place
        for start in range(0, V, BV):
            words = start + tl.arange(0, BV)
            is_word = words < V
            logits = tl.load(row_ptr + words, mask=is_word, other=-float("inf")).to(tl.float32)
            before = tl.maximum(before, tl.max(tl.where(words < label, logits, -float("inf")), 0))
            now_largest = tl.maximum(largest, tl.max(logits, 0))
            shrink = tl.exp(largest - now_largest)
            exps = tl.exp(logits - now_largest)
            total = total * shrink + tl.sum(exps, 0)
            weighted = weighted * shrink + tl.sum(exps * tl.where(is_word, logits, 0.0), 0)
            largest = now_largest
        log_sum = largest + tl.log(total)
        tl.store(found_ptr + token, log_sum - of_label)
        tl.store(found_ptr + T + token, log_sum - weighted / total)
        tl.store(found_ptr + 2 * T + token, ((of_label >= largest) & (of_label > before)).to(tl.float32))
        for start in range(0, V, BV):
            words = start + tl.arange(0, BV)
            is_word = words < V
            logits = tl.load(row_ptr + words, mask=is_word, other=0.0).to(tl.float32)
            gradient = tl.exp(logits - log_sum) - tl.where(words == label, 1.0, 0.0)
            tl.store(row_ptr + words, cast(gradient, logits_ptr.dtype.element_ty, INTERPRETED), mask=is_word)
    else:
        for start in range(0, V, BV):
            words = start + tl.arange(0, BV)
            tl.store(row_ptr + words, tl.zeros((BV,), logits_ptr.dtype.element_ty), mask=words < V)
        for which in range(3):
            tl.store(found_ptr + which * T + token, 0.0)


INTERPRETED = isinstance(cross_entropy_kernel, InterpretedFunction)
