"""The backward's kernels; `vae_triton` describes them all."""

# mypy: ignore-errors

import triton
import triton.language as tl

from fvae_dist.kernels.triton_parts import LIMIT, cast, clamp, decoder_of, dot, latents_of, output, residual, weight_of


@triton.jit
def _add(pointer, value, mask, is_first):
    """Add to this program's own row of partial sums."""
    old = tl.load(pointer, mask=mask & (is_first == 0), other=0.0)
    tl.store(pointer, old + value, mask=mask)


@triton.jit
def _add_linear(
    partial, gradient, values, is_first, OUT: tl.constexpr, OUT_B: tl.constexpr, IN: tl.constexpr, IN_B: tl.constexpr,
    STRIDE: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Gradient of a weight (OUT, IN) from that of its output (BT, OUT_B) and its input (BT, IN_B)."""
    if IN_B < OUT_B:
        row, column = tl.arange(0, OUT_B)[None, :], tl.arange(0, IN_B)[:, None]
        value = dot(tl.trans(values), gradient, PRECISION, INTERPRETED)
    else:
        row, column = tl.arange(0, OUT_B)[:, None], tl.arange(0, IN_B)[None, :]
        value = dot(tl.trans(gradient), values, PRECISION, INTERPRETED)
    _add(partial + row * STRIDE + column, value, (row < OUT) & (column < IN), is_first)


@triton.jit
def _add_bias(partial, gradient, is_first, OUT: tl.constexpr, OUT_B: tl.constexpr):
    index = tl.arange(0, OUT_B)
    _add(partial + index, tl.sum(gradient, 0), index < OUT, is_first)


@triton.jit
def _heads_backward(
    hidden, d_mean, d_logvar, small, partial, is_first, R: tl.constexpr, RB: tl.constexpr, H: tl.constexpr,
    HB: tl.constexpr, P: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """With SUMS adds the heads' gradients; returns that of the trunk before its activation, (BT, HB)."""
    if SUMS:
        _add_linear(partial, d_mean, hidden, is_first, R, RB, H, HB, H, PRECISION, INTERPRETED)
        _add_bias(partial + R * H, d_mean, is_first, R, RB)
        _add_linear(partial + R * H + R, d_logvar, hidden, is_first, R, RB, H, HB, H, PRECISION, INTERPRETED)
        _add_bias(partial + 2 * R * H + R, d_logvar, is_first, R, RB)
    d_hidden = dot(d_mean, weight_of(small, R, RB, H, HB, H), PRECISION, INTERPRETED)
    d_hidden += dot(d_logvar, weight_of(small + R * H + R, R, RB, H, HB, H), PRECISION, INTERPRETED)
    return tl.where(hidden > 0, d_hidden * (1.0 / (1.0 - P)), 0.0)


@triton.jit(do_not_specialize=["T"])
def backward_likelihood_kernel(
    x_ptr, parameters_ptr, packed_ptr, units_ptr, d_loss_ptr, partial_ptr, T, D, stride, chunk, c_nll, R: tl.constexpr,
    H2: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, DEPTH: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradient of the decoder's last hidden units over `chunk` features: partial (chunks, G, T, W)."""
    ELEMENT: tl.constexpr = x_ptr.dtype.element_ty
    of = tl.program_id(0) % G
    rows = tl.program_id(0) // G * BT + tl.arange(0, BT)
    out_weight_ptr, out_bias_ptr, scale_ptr, last_ptr = decoder_of(
        of, parameters_ptr, packed_ptr, units_ptr, T, D, stride, R, H2, W, DEPTH, G, PARTS
    )
    d_loss_ptr += of * T.to(tl.int64)
    is_token = rows < T
    x_rows = x_ptr + rows[:, None].to(tl.int64) * D
    units = tl.arange(0, WB)
    is_hidden = is_token[:, None] & (units < W)[None, :]
    at_hidden = rows[:, None].to(tl.int64) * W + units[None, :]
    last = tl.load(last_ptr + at_hidden, mask=is_hidden, other=0.0)
    d_nll = tl.load(d_loss_ptr + rows, mask=is_token, other=0.0)[:, None] * c_nll
    d_last = tl.zeros((BT, WB), tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, D), BD):
        features = start + tl.arange(0, BD)
        is_feature = features < D
        x = tl.load(x_rows + features[None, :], mask=is_token[:, None] & is_feature[None, :], other=0.0)
        error, weight, scale = residual(
            x, last, out_weight_ptr, out_bias_ptr, scale_ptr, features, is_feature, D, W, WB, PRECISION, INTERPRETED
        )
        d_xhat = -d_nll * error * (1.0 / (scale * scale))[None, :]
        d_last += dot(cast(d_xhat, ELEMENT, INTERPRETED), weight, PRECISION, INTERPRETED)
    partial_ptr += (tl.program_id(1) * G + of) * T.to(tl.int64) * W
    tl.store(partial_ptr + at_hidden, d_last, mask=is_hidden)


@triton.jit(do_not_specialize=["T", "num_blocks"])
def backward_latents_kernel(
    partial_ptr, parameters_ptr, latents_ptr, units_ptr, d_loss_ptr, d_z1_ptr, d_units_ptr, d_posterior_ptr, sums_ptr,
    T, D, stride, num_blocks, scaling, c_kl1, c_kl2, c_z1, c_z2,
    prior_mean, prior_std, R: tl.constexpr, RB: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, W: tl.constexpr,
    WB: tl.constexpr, DEPTH: tl.constexpr, CONCAT: tl.constexpr, ENCODER_P: tl.constexpr, DECODER_P: tl.constexpr,
    G: tl.constexpr, CHUNKS: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """Gradients, each (G, ...), of the trunks before their activation (T, 2H) and, behind them, of the decoder's hidden
    layers before theirs (DEPTH, T, W). With SUMS also sums (programs, G, ...) of the gradients of the trunks' biases,
    heads and the decoder's first layer, else (where they are too large for a program) the gradient of the posterior
    (T, 4, R). d_z1 (G, T, R) counts `scaling` times."""
    ELEMENT: tl.constexpr = units_ptr.dtype.element_ty
    Z: tl.constexpr = 2 * R if CONCAT else R
    HEADS1: tl.constexpr = 2 * H
    HEADS2: tl.constexpr = 2 * H + 2 * R * (H + 1)
    DECODER: tl.constexpr = 2 * H + 4 * R * (H + 1)
    INNER: tl.constexpr = DECODER + Z * W + W
    of = tl.program_id(0) % G
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * INNER
    small = parameters_ptr + of * stride + 2 * D
    first = of * T.to(tl.int64)
    partial_ptr += first * W
    z1_ptr, z2_ptr, encoded_ptr, posterior_ptr = latents_of(of, latents_ptr, T, R, H, G)
    decoded_ptr = units_ptr + G * R * T.to(tl.int64) + first * (DEPTH * W)
    d_loss_ptr += first
    d_z1_ptr += first * R
    d_encoded_ptr = d_units_ptr + first * (2 * H)
    d_decoded_ptr = d_units_ptr + G * 2 * H * T.to(tl.int64) + first * (DEPTH * W)
    d_posterior_ptr += first * (4 * R)
    hidden_units = tl.arange(0, HB)
    units = tl.arange(0, WB)
    latent = tl.arange(0, RB)
    is_latent = (latent < R)[None, :]
    is_first = 1
    for block in range(tl.program_id(0) // G, num_blocks, tl.num_programs(0) // G):
        rows = block * BT + tl.arange(0, BT)
        is_token = rows < T
        is_hidden = is_token[:, None] & (units < W)[None, :]
        at = rows[:, None].to(tl.int64) * W + units[None, :]
        d_last = tl.zeros((BT, WB), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            d_last += tl.load(partial_ptr + chunk * G * T.to(tl.int64) * W + at, mask=is_hidden, other=0.0)
        at += (DEPTH - 1) * T.to(tl.int64) * W
        hidden = tl.load(decoded_ptr + at, mask=is_hidden, other=0.0)
        d_hidden = tl.where(hidden > 0, d_last * (1.0 / (1.0 - DECODER_P)), 0.0)
        d_hidden = cast(d_hidden, ELEMENT, INTERPRETED)
        tl.store(d_decoded_ptr + at, d_hidden, mask=is_hidden)
        offset = small + INNER + (DEPTH - 2) * W * (W + 1)
        for _ in tl.static_range(1, DEPTH):
            at -= T.to(tl.int64) * W
            weight = cast(weight_of(offset, W, WB, W, WB, W), ELEMENT, INTERPRETED)
            d_hidden = dot(d_hidden, weight, PRECISION, INTERPRETED)
            hidden = tl.load(decoded_ptr + at, mask=is_hidden, other=0.0)
            d_hidden = tl.where(hidden > 0, d_hidden * (1.0 / (1.0 - DECODER_P)), 0.0)
            d_hidden = cast(d_hidden, ELEMENT, INTERPRETED)
            tl.store(d_decoded_ptr + at, d_hidden, mask=is_hidden)
            offset -= W * (W + 1)
        d_first = d_hidden.to(tl.float32)

        d_loss = tl.load(d_loss_ptr + rows, mask=is_token, other=0.0)[:, None]
        is_z = is_token[:, None] & is_latent
        at = rows[:, None].to(tl.int64) * R + latent[None, :]
        z1 = tl.load(z1_ptr + at, mask=is_z, other=0.0)
        z2 = tl.load(z2_ptr + at, mask=is_z, other=0.0)
        d_z1 = tl.load(d_z1_ptr + at, mask=is_z, other=0.0) * scaling
        if SUMS:
            _add_bias(sums + DECODER + Z * W, d_first, is_first, W, WB)
            if CONCAT:
                _add_linear(sums + DECODER, d_first, z1, is_first, W, WB, R, RB, Z, PRECISION, INTERPRETED)
                _add_linear(sums + DECODER + R, d_first, z2, is_first, W, WB, R, RB, Z, PRECISION, INTERPRETED)
            else:
                fused = (z1 + z2) * 0.5
                _add_linear(sums + DECODER, d_first, fused, is_first, W, WB, R, RB, Z, PRECISION, INTERPRETED)
        if CONCAT:
            d_z1 += dot(d_first, weight_of(small + DECODER, W, WB, R, RB, Z), PRECISION, INTERPRETED)
            d_z2 = dot(d_first, weight_of(small + DECODER + R, W, WB, R, RB, Z), PRECISION, INTERPRETED)
        else:
            d_z2 = 0.5 * dot(d_first, weight_of(small + DECODER, W, WB, R, RB, Z), PRECISION, INTERPRETED)
            d_z1 += d_z2

        at = rows[:, None].to(tl.int64) * (4 * R) + latent[None, :]
        mean1 = tl.load(posterior_ptr + at, mask=is_z, other=0.0)
        logvar1 = tl.load(posterior_ptr + at + R, mask=is_z, other=0.0)
        mean2 = tl.load(posterior_ptr + at + 2 * R, mask=is_z, other=0.0)
        logvar2 = tl.load(posterior_ptr + at + 3 * R, mask=is_z, other=0.0)
        variance1 = tl.exp(clamp(logvar1))
        variance2 = tl.exp(clamp(logvar2))
        d_z1 = tl.where(is_latent, d_z1 + d_loss * (c_z1 * 2 / R) * z1, 0.0)
        d_z2 = tl.where(is_latent, d_z2 + d_loss * (c_z2 * 2 / R) * (z2 - prior_mean), 0.0)
        prior_variance = prior_std * prior_std
        d_mean1 = d_z1 + d_loss * c_kl1 * mean1
        d_mean2 = tl.where(is_latent, d_z2 + d_loss * c_kl2 * (mean2 - prior_mean) / prior_variance, 0.0)
        # std * eps = z - mean
        d_logvar1 = 0.5 * (d_z1 * (z1 - mean1) + d_loss * c_kl1 * (variance1 - 1))
        d_logvar2 = 0.5 * (d_z2 * (z2 - mean2) + d_loss * c_kl2 * (variance2 / prior_variance - 1))
        d_logvar1 = tl.where((tl.abs(logvar1) <= LIMIT) & is_latent, d_logvar1, 0.0)
        d_logvar2 = tl.where((tl.abs(logvar2) <= LIMIT) & is_latent, d_logvar2, 0.0)
        if not SUMS:
            tl.store(d_posterior_ptr + at, d_mean1, mask=is_z)
            tl.store(d_posterior_ptr + at + R, d_logvar1, mask=is_z)
            tl.store(d_posterior_ptr + at + 2 * R, d_mean2, mask=is_z)
            tl.store(d_posterior_ptr + at + 3 * R, d_logvar2, mask=is_z)
        at = rows[:, None].to(tl.int64) * (2 * H) + hidden_units[None, :]
        is_hidden = is_token[:, None] & (hidden_units < H)[None, :]
        hidden1 = tl.load(encoded_ptr + at, mask=is_hidden, other=0.0)
        hidden2 = tl.load(encoded_ptr + at + H, mask=is_hidden, other=0.0)
        d_pre1 = _heads_backward(
            hidden1, d_mean1, d_logvar1, small + HEADS1, sums + HEADS1, is_first, R, RB, H, HB, ENCODER_P, SUMS,
            PRECISION, INTERPRETED,
        )  # fmt: skip
        d_pre2 = _heads_backward(
            hidden2, d_mean2, d_logvar2, small + HEADS2, sums + HEADS2, is_first, R, RB, H, HB, ENCODER_P, SUMS,
            PRECISION, INTERPRETED,
        )  # fmt: skip
        if SUMS:
            _add_bias(sums, d_pre1, is_first, H, HB)
            _add_bias(sums + H, d_pre2, is_first, H, HB)
        tl.store(d_encoded_ptr + at, cast(d_pre1, ELEMENT, INTERPRETED), mask=is_hidden)
        tl.store(d_encoded_ptr + at + H, cast(d_pre2, ELEMENT, INTERPRETED), mask=is_hidden)
        is_first = 0


@triton.jit(do_not_specialize=["T"])
def backward_input_kernel(
    x_ptr, parameters_ptr, packed_ptr, units_ptr, d_units_ptr, d_loss_ptr, d_x_ptr, T, D, stride, c_nll,
    R: tl.constexpr, H2: tl.constexpr, HB2: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, DEPTH: tl.constexpr,
    G: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Gradient to x (T, D) from all adapters, a tile for each program."""
    rows = tl.program_id(1) * BT + tl.arange(0, BT)
    is_token = rows < T
    features = tl.program_id(0) * BD + tl.arange(0, BD)
    is_feature = features < D
    units = tl.arange(0, WB)
    hidden_units = tl.arange(0, HB2)
    at_row = rows[:, None].to(tl.int64) * D
    is_tile = is_token[:, None] & is_feature[None, :]
    x = tl.load(x_ptr + at_row + features[None, :], mask=is_tile, other=0.0)
    is_last = is_token[:, None] & (units < W)[None, :]
    is_hidden = is_token[:, None] & (hidden_units < H2)[None, :]
    at_trunk = hidden_units[:, None] * D + features[None, :]
    is_trunk = (hidden_units < H2)[:, None] & is_feature[None, :]
    d_x = tl.zeros((BT, BD), tl.float32)
    for of in tl.static_range(G):
        out_weight_ptr, out_bias_ptr, scale_ptr, last_ptr = decoder_of(
            of, parameters_ptr, packed_ptr, units_ptr, T, D, stride, R, H2, W, DEPTH, G, PARTS
        )
        last = tl.load(last_ptr + rows[:, None].to(tl.int64) * W + units[None, :], mask=is_last, other=0.0)
        d_nll = tl.load(d_loss_ptr + of * T.to(tl.int64) + rows, mask=is_token, other=0.0)[:, None] * c_nll
        error, _, scale = residual(
            x, last, out_weight_ptr, out_bias_ptr, scale_ptr, features, is_feature, D, W, WB, PRECISION, INTERPRETED
        )
        d_x += d_nll * error * (1.0 / (scale * scale))[None, :]
        at_hidden = (of * T.to(tl.int64) + rows)[:, None] * H2 + hidden_units[None, :]
        d_encoded = tl.load(d_units_ptr + at_hidden, mask=is_hidden, other=0.0)
        trunk = tl.load(packed_ptr + of * (PARTS * H2 * D) + at_trunk, mask=is_trunk, other=0.0)
        d_x += dot(d_encoded, trunk, PRECISION, INTERPRETED)
    d_x = cast(d_x, x_ptr.dtype.element_ty, INTERPRETED)
    tl.store(d_x_ptr + at_row + features[None, :], d_x, mask=is_tile)


@triton.jit(do_not_specialize=["T", "chunk"])
def backward_inner_kernel(
    units_ptr, d_units_ptr, out_ptr, T, chunk, R: tl.constexpr, H2: tl.constexpr, W: tl.constexpr, WB: tl.constexpr,
    DEPTH: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Gradients of the decoder's inner layers over `chunk` tokens: for each chunk a row (G, DEPTH - 1, W * (W + 1)). A
    program has BD of a layer's units."""
    of = tl.program_id(0) % G
    layer = tl.program_id(0) // G
    decoded_ptr = units_ptr + G * R * T.to(tl.int64)
    d_decoded_ptr = d_units_ptr + G * H2 * T.to(tl.int64)
    units = tl.program_id(2) * BD + tl.arange(0, BD)
    column = tl.arange(0, WB)[None, :]
    weight = tl.zeros((BD, WB), tl.float32)
    bias = tl.zeros((BD,), tl.float32)
    first = tl.program_id(1) * chunk
    at_layer = (of * DEPTH + layer).to(tl.int64) * T * W
    for start in range(first, tl.minimum(first + chunk, T), BT):
        rows = start + tl.arange(0, BT)[:, None]
        is_token = rows < tl.minimum(first + chunk, T)
        at = at_layer + rows.to(tl.int64) * W
        hidden = tl.load(decoded_ptr + at + column, mask=is_token & (column < W), other=0.0)
        d_at = d_decoded_ptr + T.to(tl.int64) * W + at + units[None, :]
        d_hidden = tl.load(d_at, mask=is_token & (units < W)[None, :], other=0.0)
        weight += dot(tl.trans(d_hidden), hidden, PRECISION, INTERPRETED)
        bias += tl.sum(d_hidden.to(tl.float32), 0)
    row = tl.program_id(1).to(tl.int64) * G + of
    out = out_ptr + (row * (DEPTH - 1) + layer) * (W * (W + 1))
    tl.store(out + units[:, None] * W + column, weight, mask=(units < W)[:, None] & (column < W))
    tl.store(out + W * W + units, bias, mask=units < W)


# -------------------------------------------------------------------------------------------------- backward, features


@triton.jit(do_not_specialize=["T", "chunk"])
def backward_features_kernel(
    x_ptr, parameters_ptr, packed_ptr, units_ptr, d_units_ptr, d_loss_ptr, out_ptr, T, D, stride, out_stride, c_nll,
    chunk, R: tl.constexpr, H2: tl.constexpr, HB2: tl.constexpr, W: tl.constexpr, WB: tl.constexpr,
    DEPTH: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters that have values for each feature, over `chunk` tokens: for each chunk and adapter
    the trunks' weights (2, H, D), output weight (D, W), its bias (D) and scale (D), the first of `out_stride` numbers.
    """
    ELEMENT: tl.constexpr = x_ptr.dtype.element_ty
    of = tl.program_id(0) % G
    features = tl.program_id(0) // G * BD + tl.arange(0, BD)
    out_weight_ptr, out_bias_ptr, scale_ptr, last_ptr = decoder_of(
        of, parameters_ptr, packed_ptr, units_ptr, T, D, stride, R, H2, W, DEPTH, G, PARTS
    )
    d_loss_ptr += of * T.to(tl.int64)
    d_encoded_ptr = d_units_ptr + of * T.to(tl.int64) * H2
    is_feature = features < D
    units = tl.arange(0, WB)
    hidden_units = tl.arange(0, HB2)
    # Everything with a feature in each row.
    weight, bias, scale = output(out_weight_ptr, out_bias_ptr, scale_ptr, features, is_feature, units, W)
    bias, inverse = bias[:, None], (1.0 / scale)[:, None]
    d_weight = tl.zeros((BD, WB), tl.float32)
    d_trunks = tl.zeros((BD, HB2), tl.float32)
    d_bias = tl.zeros((BD,), tl.float32)
    d_scale = tl.zeros((BD,), tl.float32)
    first = tl.program_id(1) * chunk
    end = tl.minimum(first + chunk, T)
    for start in range(first, end, BT):
        rows = start + tl.arange(0, BT)
        is_token = rows < end
        x_at = x_ptr + rows[None, :].to(tl.int64) * D + features[:, None]
        x = tl.load(x_at, mask=is_token[None, :] & is_feature[:, None], other=0.0)
        is_hidden = is_token[:, None] & (units < W)[None, :]
        last = tl.load(last_ptr + rows[:, None].to(tl.int64) * W + units[None, :], mask=is_hidden, other=0.0)
        d_nll = tl.load(d_loss_ptr + rows, mask=is_token, other=0.0)[None, :] * c_nll
        is_hidden = is_token[:, None] & (hidden_units < H2)[None, :]
        at = rows[:, None].to(tl.int64) * H2 + hidden_units[None, :]
        d_encoded = tl.load(d_encoded_ptr + at, mask=is_hidden, other=0.0)
        standardised = (x.to(tl.float32) - bias - dot(weight, tl.trans(last), PRECISION, INTERPRETED)) * inverse
        d_xhat = -d_nll * standardised * inverse
        d_weight += dot(cast(d_xhat, ELEMENT, INTERPRETED), last, PRECISION, INTERPRETED)
        d_bias += tl.sum(d_xhat, 1)
        d_scale += tl.sum(d_nll * inverse * (1.0 - standardised * standardised), 1)
        d_trunks += dot(x, d_encoded, PRECISION, INTERPRETED)
    out = out_ptr + (tl.program_id(1) * G + of).to(tl.int64) * out_stride
    at = hidden_units[None, :] * D + features[:, None]
    tl.store(out + at, d_trunks, mask=(hidden_units < H2)[None, :] & is_feature[:, None])
    out += D * H2
    is_weight = is_feature[:, None] & (units < W)[None, :]
    tl.store(out + features[:, None] * W + units[None, :], d_weight, mask=is_weight)
    out += D * W
    tl.store(out + features, d_bias, mask=is_feature)
    raw_scale = tl.load(scale_ptr + features, mask=is_feature, other=1.0)
    sign = tl.where(raw_scale > 0, 1.0, tl.where(raw_scale < 0, -1.0, 0.0))
    tl.store(out + D + features, d_scale * sign, mask=is_feature)
