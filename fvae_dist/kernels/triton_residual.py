"""Of many tokens the products of the likelihood's backward are the matrix library's (`likelihood.py`); the kernel here
does what is between them, at the speed of memory. `vae_triton` describes the others."""

# mypy: ignore-errors

import triton
import triton.language as tl

from fvae_dist.kernels.triton_parts import EPSILON, cast


@triton.jit(do_not_specialize=["T", "first", "count", "chunk", "size"])
def backward_residual_kernel(
    x_ptr, xhat_ptr, parameters_ptr, d_loss_ptr, d_x_ptr, out_ptr, T, D, stride, first, count, chunk, size, c_nll,
    NEEDS_X: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Of `count` tokens from `first` on, from x (count, D) and the decoders' products xhat (G, size, D): writes the
    gradient of the products over them and what all adapters give to that of x (count, D), and sums the gradients of
    output biases and scales, in `out` a row (G, 2, D) for each `chunk` of tokens, to which later parts add theirs."""
    features = tl.program_id(0) * BD + tl.arange(0, BD)
    is_feature = features < D
    which = tl.arange(0, GB)[:, None]
    d_bias = tl.zeros((GB, BD), tl.float32)
    d_scale = tl.zeros((GB, BD), tl.float32)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, count)
    for start in range(begin, end, BT):
        local = start + tl.arange(0, BT)
        is_token = local < end
        is_tile = is_token[:, None] & is_feature[None, :]
        at = local[:, None].to(tl.int64) * D + features[None, :]
        x = tl.load(x_ptr + at, mask=is_tile, other=0.0).to(tl.float32)
        d_x = tl.zeros((BT, BD), tl.float32)
        for of in tl.static_range(G):
            bias_ptr = parameters_ptr + of * stride
            bias = tl.load(bias_ptr + features, mask=is_feature, other=0.0)
            scale = tl.load(bias_ptr + D + features, mask=is_feature, other=1.0)
            inverse = (1.0 / (tl.abs(scale) + EPSILON))[None, :]
            xhat_at = xhat_ptr + (of * size + local)[:, None].to(tl.int64) * D + features[None, :]
            xhat = tl.load(xhat_at, mask=is_tile, other=0.0).to(tl.float32)
            loss_at = d_loss_ptr + of * T.to(tl.int64) + first + local
            d_nll = tl.load(loss_at, mask=is_token, other=0.0)[:, None] * c_nll
            standardised = (x - bias[None, :] - xhat) * inverse
            d_xhat = -d_nll * standardised * inverse
            tl.store(xhat_at, cast(d_xhat, xhat_ptr.dtype.element_ty, INTERPRETED), mask=is_tile)
            d_x -= d_xhat
            d_bias += tl.where(which == of, tl.sum(d_xhat, 0)[None, :], 0.0)
            d_raw = d_nll * inverse * (1.0 - standardised * standardised)
            d_scale += tl.where(which == of, tl.sum(d_raw, 0)[None, :], 0.0)
        if NEEDS_X:
            tl.store(d_x_ptr + at, cast(d_x, d_x_ptr.dtype.element_ty, INTERPRETED), mask=is_tile)
    is_sum = (which < G) & is_feature[None, :]
    scales = tl.load(parameters_ptr + which * stride + D + features[None, :], mask=is_sum, other=0.0)
    sign = tl.where(scales > 0, 1.0, tl.where(scales < 0, -1.0, 0.0))
    out = out_ptr + (tl.program_id(1) * G + which) * 2 * D + features[None, :]
    is_later = is_sum & (first > 0)
    tl.store(out, tl.load(out, mask=is_later, other=0.0) + d_bias, mask=is_sum)
    tl.store(out + D, tl.load(out + D, mask=is_later, other=0.0) + d_scale * sign, mask=is_sum)
