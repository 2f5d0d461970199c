"""The adapter's linears: their dtypes, and products that take many tokens a part at a time.

In a long sequence the reconstruction, what its gradient takes and an fp32 copy of x, several tensors of (T, D), would
be more than the layer itself. Past `ELEMENTS` they exist for some tokens at a time only; the reconstruction is computed
again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fvae_dist.adapter.flat import NARROW, InFlat
from fvae_dist.adapter.objective import diag_gaussian_nll, wide

ELEMENTS = 2**25  # of a tensor that exists at a time: 8192 tokens of 4096 features, 128 MiB in fp32


def rows_at_a_time(features: int) -> int:
    """Tokens of so many features whose tensors may exist at a time."""
    return max(1, ELEMENTS // features)


class CastLinear(nn.Linear):
    """A linear that computes in the dtype of its input, whatever the dtype of its weights.

    Not through F.linear: ZeRO-3 replaces that function by a Python one, which keeps gathered base weights from staying
    alive and costs 1 ms a call; on adapter weights, which stay whole, it saves nothing.
    """

    weight: Any = InFlat("weight")
    bias: Any = InFlat("bias")

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype).t()
        rows = input.reshape(-1, self.in_features)
        if self.bias is None:
            output = rows.mm(weight)
        else:
            output = torch.addmm(self.bias.to(input.dtype), rows, weight)
        return output.view(*input.shape[:-1], self.out_features)


class _WideProduct(torch.autograd.Function):
    """x @ weight.T with the weight's fp32 values and an fp32 result, for a 16-bit x; x is kept as it is.

    In 16 bits the result would be rounded before a ReLU, or before the exponential of a log-variance: units switch,
    and encoder gradients are off by several percent, or all of it beside outlier features.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight.to(x.dtype))
        output = x.new_empty(len(x), len(weight), dtype=torch.float32)
        rows = rows_at_a_time(x.shape[-1])
        for part, xs in zip(output.split(rows), x.split(rows)):
            torch.mm(xs.float(), weight.t(), out=part)
        return output

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        x, weight = ctx.saved_tensors
        if x.dtype == torch.float16:  # whose range the gradient may leave
            gradient = gradients[0]
            return gradient.mm(weight.float()).to(x.dtype), gradient.t().mm(x.float())
        gradient = gradients[0].to(x.dtype)
        return gradient.mm(weight), gradient.t().mm(x).float()


class InputLinear(CastLinear):
    """The first linear over D: as `CastLinear`, but its result is fp32 and as exact as the input."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in NARROW:
            return super().forward(input)
        output = _WideProduct.apply(input.reshape(-1, self.in_features), self.weight)
        return (output + self.bias).view(*input.shape[:-1], self.out_features)


class Reconstruction(CastLinear):
    """(..., H) -> xhat (..., D) in the dtype of its input; given x (..., D), also its likelihood."""

    def forward(self, input: Tensor, x: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """xhat; or the negative log-likelihood of x under N(xhat, diag(scale)^2), nats per token, (...), fp32.

        Args:
            input: the decoder's hidden units (..., H).
            x: what is reconstructed, (..., D), in the dtype of `input`.
            scale: standard deviation per feature, (D,), > 0; with x.
        """
        if x is None or scale is None:
            return super().forward(input)
        rows = rows_at_a_time(self.out_features)
        if x.numel() // self.out_features <= rows:
            return diag_gaussian_nll(x, super().forward(input), scale)
        hidden, targets = input.reshape(-1, self.in_features), x.reshape(-1, self.out_features)
        return _NLLByRows.apply(hidden, targets, self.weight, self.bias, scale, rows).view(x.shape[:-1])


class _NLLByRows(torch.autograd.Function):
    """`diag_gaussian_nll` of hidden @ weight.T + bias, `rows` tokens at a time; weights' gradients add up in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(hidden, x, weight, bias, scale)
        ctx.rows = rows
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        parts = zip(hidden.split(rows), x.split(rows))
        return torch.cat([diag_gaussian_nll(xs, torch.addmm(bias, hs, weight.t()), scale) for hs, xs in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor):
        hidden, x, weight, bias, scale = ctx.saved_tensors
        narrow, narrow_bias, wide_scale = weight.to(x.dtype), bias.to(x.dtype), wide(scale)
        of_hidden, of_x = torch.empty_like(hidden), torch.empty_like(x)
        of_weight, of_bias, of_squares = (torch.zeros_like(wide(tensor)) for tensor in (weight, bias, scale))
        pieces = (tensor.split(ctx.rows) for tensor in (hidden, x, gradients[0][:, None], of_hidden, of_x))
        for hs, xs, gradient, of_hs, of_xs in zip(*pieces):
            standardised = (wide(xs) - wide(torch.addmm(narrow_bias, hs, narrow.t()))) / wide_scale
            of_squares += (standardised.square() * gradient).sum(0)
            toward_x = (standardised * gradient / wide_scale).to(x.dtype)
            of_xs.copy_(toward_x)
            of_hs.copy_(-toward_x.mm(narrow))
            of_weight -= toward_x.t().mm(hs)
            of_bias -= wide(toward_x).sum(0)
        of_scale = (gradients[0].sum() - of_squares) / wide_scale
        return of_hidden, of_x, of_weight.to(weight.dtype), of_bias.to(bias.dtype), of_scale.to(scale.dtype), None
