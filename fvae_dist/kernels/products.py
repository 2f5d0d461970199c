"""Products of 16-bit matrices that are not rounded to 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, (m, k) and (k, n) of one dtype, in out's; not rounded on the way where the device has that."""
    if a.is_cuda and a.dtype != out.dtype:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b))
