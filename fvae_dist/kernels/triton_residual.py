"""Of many tokens the decoder's products are the matrix library's (`likelihood.py`); the kernels here do what is between
them, at the speed of memory. `vae_triton` describes the others."""

# mypy: ignore-errors

import triton
import triton.language as tl

from fvae_dist.kernels.triton_parts import EPSILON, LOG_2PI, cast


@triton.jit
def _of_features(parameters_ptr, of, stride, features, is_feature, D):
    """The output bias (BD), the scale as it is (BD) and the standard deviation that it stands for; beyond D 0, 1, 1."""
    bias_ptr = parameters_ptr + of * stride
    bias = tl.load(bias_ptr + features, mask=is_feature, other=0.0)
    raw_scale = tl.load(bias_ptr + D + features, mask=is_feature, other=1.0)
    return bias, raw_scale, tl.where(is_feature, tl.abs(raw_scale) + EPSILON, 1.0)


@triton.jit(do_not_specialize=["T", "of", "first", "count"])
def residual_kernel(
    x_ptr, xhat_ptr, parameters_ptr, terms_ptr, out_ptr, T, D, stride, of, first, count, c_nll, G: tl.constexpr,
    STATS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of `count` tokens from `first` on, from the products xhat (count, D): the adapter's loss (G, T), with the rest of
    it from terms; with STATS (2, G, T), the nll and the squared error."""
    local = tl.program_id(0) * BT + tl.arange(0, BT)
    is_token = local < count
    rows = first + local
    x_rows = x_ptr + rows[:, None].to(tl.int64) * D
    xhat_rows = xhat_ptr + local[:, None].to(tl.int64) * D
    squares = tl.zeros((BT, BD), tl.float32)
    errors = tl.zeros((BT, BD), tl.float32)
    log_scale = tl.zeros((BD,), tl.float32)
    for start in range(0, D, BD):
        features = start + tl.arange(0, BD)
        is_feature = features < D
        is_tile = is_token[:, None] & is_feature[None, :]
        x = tl.load(x_rows + features[None, :], mask=is_tile, other=0.0).to(tl.float32)
        xhat = tl.load(xhat_rows + features[None, :], mask=is_tile, other=0.0).to(tl.float32)
        bias, _, scale = _of_features(parameters_ptr, of, stride, features, is_feature, D)
        error = x - bias[None, :] - xhat
        standardised = error * (1.0 / scale)[None, :]
        squares += standardised * standardised
        log_scale += tl.where(is_feature, tl.log(scale) + 0.5 * LOG_2PI, 0.0)
        if STATS:
            errors += error * error
    nll = 0.5 * tl.sum(squares, 1) + tl.sum(log_scale, 0)
    out = out_ptr + of * T.to(tl.int64) + rows
    if STATS:
        tl.store(out, nll, mask=is_token)
        tl.store(out + G * T.to(tl.int64), tl.sum(errors, 1), mask=is_token)
    else:
        rest = tl.load(terms_ptr + of * 5 * T.to(tl.int64) + rows, mask=is_token, other=0.0)
        tl.store(out, c_nll * nll + rest, mask=is_token)


@triton.jit(do_not_specialize=["T", "of", "first", "count", "chunk", "row"])
def backward_residual_kernel(
    x_ptr, xhat_ptr, parameters_ptr, d_loss_ptr, d_x_ptr, out_ptr, T, D, stride, of, first, count, chunk, row, c_nll,
    NEEDS_X: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Of `count` tokens from `first` on: writes the gradient of the products over them (count, D), adds what they give
    to that of x (the first adapter writes it), and for each `chunk` of them sums the gradients of output bias and
    scale: in `out`, from `row` on, a row (2, D)."""
    features = tl.program_id(0) * BD + tl.arange(0, BD)
    is_feature = features < D
    bias, raw_scale, scale = _of_features(parameters_ptr, of, stride, features, is_feature, D)
    inverse = (1.0 / scale)[None, :]
    d_bias = tl.zeros((BD,), tl.float32)
    d_scale = tl.zeros((BD,), tl.float32)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, count)
    for start in range(begin, end, BT):
        local = start + tl.arange(0, BT)
        is_token = local < end
        rows = (first + local).to(tl.int64)
        is_tile = is_token[:, None] & is_feature[None, :]
        at = rows[:, None] * D + features[None, :]
        xhat_at = xhat_ptr + local[:, None].to(tl.int64) * D + features[None, :]
        x = tl.load(x_ptr + at, mask=is_tile, other=0.0).to(tl.float32)
        xhat = tl.load(xhat_at, mask=is_tile, other=0.0).to(tl.float32)
        d_nll = tl.load(d_loss_ptr + of * T.to(tl.int64) + rows, mask=is_token, other=0.0)[:, None] * c_nll
        standardised = (x - bias[None, :] - xhat) * inverse
        d_xhat = -d_nll * standardised * inverse
        d_bias += tl.sum(d_xhat, 0)
        d_scale += tl.sum(d_nll * inverse * (1.0 - standardised * standardised), 0)
        tl.store(xhat_at, cast(d_xhat, xhat_ptr.dtype.element_ty, INTERPRETED), mask=is_tile)
        if NEEDS_X:
            before = tl.load(d_x_ptr + at, mask=is_tile & (of > 0), other=0.0).to(tl.float32)
            tl.store(d_x_ptr + at, cast(before - d_xhat, d_x_ptr.dtype.element_ty, INTERPRETED), mask=is_tile)
    out = out_ptr + (row + tl.program_id(1)).to(tl.int64) * 2 * D + features
    tl.store(out, d_bias, mask=is_feature)
    sign = tl.where(raw_scale > 0, 1.0, tl.where(raw_scale < 0, -1.0, 0.0))
    tl.store(out + D, d_scale * sign, mask=is_feature)
