"""lora_B, the linear that brings z1 up to the base layer's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fvae_dist.adapter.flat import Fp32Module
from fvae_dist.adapter.linears import CastLinear
from fvae_dist.kernels.products import wide_product


class UpProjection(Fp32Module, CastLinear):
    """lora_B: (out_features, r), no bias, N(0, 0.02^2) at the start."""

    def __init__(self, r: int, out_features: int):
        super().__init__(r, out_features, bias=False)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, z1: Tensor, scaling: float, dtype: torch.dtype, base: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """scaling * B z1, (..., r) -> (..., out_features), computed in `dtype`; added to `base` where one is given."""
        if base is not None and base.dtype == dtype:
            return _Update.apply(base, z1, self.weight, scaling)
        update = super().forward(z1.to(dtype)) * scaling
        return update if base is None else base + update.to(base.dtype)


class _Update(torch.autograd.Function):
    """base + scaling * z1 @ weight.T in base's dtype, in one pass over the output: what autograd would record are
    seven operations, more work for the host than for a GPU."""

    @staticmethod
    def forward(ctx, base: Tensor, z1: Tensor, weight: Tensor, scaling: float) -> Tensor:  # type: ignore[override]
        rows, narrow = z1.reshape(-1, z1.shape[-1]).to(base.dtype), weight.to(base.dtype)
        ctx.save_for_backward(rows, narrow)
        ctx.scaling, ctx.shape, ctx.dtypes = scaling, z1.shape, (z1.dtype, weight.dtype)
        return torch.addmm(base.reshape(len(rows), -1), rows, narrow.t(), alpha=scaling).view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_output: Tensor):  # type: ignore[override]
        rows, narrow = ctx.saved_tensors
        gradient = d_output.reshape(len(rows), -1)
        z1_dtype, weight_dtype = ctx.dtypes
        d_z1 = d_weight = None
        if ctx.needs_input_grad[1]:
            d_z1 = wide_product(gradient, narrow, rows.new_empty(rows.shape, dtype=z1_dtype))
            d_z1 = _scaled(d_z1, ctx.scaling).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            d_weight = wide_product(gradient.t(), rows, rows.new_empty(narrow.shape, dtype=weight_dtype))
            d_weight = _scaled(d_weight, ctx.scaling)
        return d_output, d_z1, d_weight, None


def _scaled(values: Tensor, scaling: float) -> Tensor:
    return values if scaling == 1 else values.mul_(scaling)
