"""The forward's kernels; `vae_triton` describes them all."""

# mypy: ignore-errors

import triton
import triton.language as tl

from fvae_dist.kernels.triton_parts import (
    LOG_2PI,
    activate,
    bias_of,
    cast,
    clamp,
    decoder_of,
    dot,
    fuse,
    heads,
    inner,
    latents_of,
    narrow_of,
    normals,
    residual,
)


@triton.jit
def _copy(source, target, size, BLOCK: tl.constexpr):
    """The block of `size` numbers that is this program's, if there is one."""
    if tl.program_id(0) * BLOCK < size:
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target + index, tl.load(source + index, mask=index < size, other=0.0), mask=index < size)


@triton.jit
def pack_kernel(
    weights_0, biases_0, up_0, weights_1, biases_1, up_1, weights_2, biases_2, up_2, packed_ptr, parameters_ptr,
    D, stride, num_up_0, num_up_1, num_up_2, H: tl.constexpr, W: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr,
    PAIRS: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The wide weights of all adapters in x's dtype: of both trunks (G, PARTS, 2H, D), for 16 bit in two parts, which
    is as exact as a 16-bit x allows; the decoder's output weight (G, D, W); the up-projections, one after the other.
    All others as they are: parameters (G, stride). PAIRS: numbers of weight and bias of heads and hidden layers."""
    ELEMENT: tl.constexpr = packed_ptr.dtype.element_ty
    of = tl.program_id(1)
    weights, biases, up, num_up, first_up = weights_0, biases_0, up_0, num_up_0, 0
    if G > 1 and of == 1:
        weights, biases, up, num_up, first_up = weights_1, biases_1, up_1, num_up_1, num_up_0
    if G > 2 and of == 2:
        weights, biases, up, num_up, first_up = weights_2, biases_2, up_2, num_up_2, num_up_0 + num_up_1
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weights + index, mask=index < 2 * H * D, other=0.0)
    high = cast(weight, ELEMENT, INTERPRETED)
    trunks = packed_ptr + of * (PARTS * 2 * H * D) + index
    tl.store(trunks, high, mask=index < 2 * H * D)
    if PARTS > 1:
        low = cast(weight - high.to(tl.float32), ELEMENT, INTERPRETED)
        tl.store(trunks + 2 * H * D, low, mask=index < 2 * H * D)
    narrow = narrow_of(packed_ptr, D, 2 * H, G, PARTS)
    value = tl.load(weights + 2 * H * D + index, mask=index < D * W, other=0.0)
    tl.store(narrow + of * (D * W) + index, cast(value, ELEMENT, INTERPRETED), mask=index < D * W)
    value = tl.load(up + index, mask=index < num_up, other=0.0)
    tl.store(narrow + G * D * W + first_up + index, cast(value, ELEMENT, INTERPRETED), mask=index < num_up)
    weights += (2 * H + W) * D
    parameters_ptr += of * stride
    # The output's bias, the scale and both trunks' biases are one block here and there.
    _copy(biases, parameters_ptr, 2 * D + 2 * H, BLOCK)
    biases += 2 * D + 2 * H
    parameters_ptr += 2 * D + 2 * H
    for i in tl.static_range(len(PAIRS)):
        _copy(weights, parameters_ptr, PAIRS[i][0], BLOCK)
        parameters_ptr += PAIRS[i][0]
        weights += PAIRS[i][0]
        _copy(biases, parameters_ptr, PAIRS[i][1], BLOCK)
        parameters_ptr += PAIRS[i][1]
        biases += PAIRS[i][1]


@triton.jit(do_not_specialize=["T"])
def encode_kernel(
    x_ptr, packed_ptr, partial_ptr, T, D, chunk, H2: tl.constexpr, HB2: tl.constexpr, G: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """x @ trunks.T over `chunk` features: partial (chunks, G, T, 2H)."""
    of = tl.program_id(0) % G
    rows = tl.program_id(0) // G * BT + tl.arange(0, BT)
    trunks_ptr = packed_ptr + of * (PARTS * H2 * D)
    is_token = rows < T
    x_rows = x_ptr + rows[:, None].to(tl.int64) * D
    units = tl.arange(0, HB2)
    first = tl.program_id(1) * chunk
    total = tl.zeros((BT, HB2), tl.float32)
    for start in range(first, tl.minimum(first + chunk, D), BD):
        features = start + tl.arange(0, BD)
        is_feature = features < D
        x = tl.load(x_rows + features[None, :], mask=is_token[:, None] & is_feature[None, :], other=0.0)
        for part in tl.static_range(PARTS):
            at = (part * H2 + units)[:, None] * D + features[None, :]
            weight = tl.load(trunks_ptr + at, mask=(units < H2)[:, None] & is_feature[None, :], other=0.0)
            total += dot(x, tl.trans(weight), PRECISION, INTERPRETED)
    at = ((tl.program_id(1) * G + of) * T.to(tl.int64) + rows)[:, None] * H2 + units[None, :]
    tl.store(partial_ptr + at, total, mask=is_token[:, None] & (units < H2)[None, :])


@triton.jit(do_not_specialize=["T", "salt0", "salt1", "salt2"])
def latents_kernel(
    partial_ptr, keys_ptr, parameters_ptr, latents_ptr, units_ptr, terms_ptr, T, D, stride, salt0, salt1, salt2,
    scaling, c_kl1, c_kl2, c_z1, c_z2, c_0, prior_mean, prior_std,
    R: tl.constexpr, RB: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, W: tl.constexpr, WB: tl.constexpr,
    DEPTH: tl.constexpr, CONCAT: tl.constexpr, WORDS: tl.constexpr, ENCODER_THRESHOLD: tl.constexpr,
    ENCODER_P: tl.constexpr, DECODER_FIRST: tl.constexpr, DECODER_THRESHOLD: tl.constexpr, DECODER_P: tl.constexpr,
    G: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """From the trunks' products, each (G, ...). Latents: z1, z2 (T, R), encoded (T, 2H), the trunks' hidden units,
    posterior (T, 4, R), mean and log-variance before its clamp, of both encoders. Units, in x's dtype: scaling * z1
    (T, R), decoded (DEPTH, T, W), the decoder's hidden units. Of terms (5, T) the loss without its nll, kl_z1, z1_sq,
    z2_sq in rows 0 and 2 to 4."""
    of = tl.program_id(0) % G
    block = tl.program_id(0) // G
    salt = tl.where(of == 0, salt0.to(tl.int64), tl.where(of == 1, salt1.to(tl.int64), salt2.to(tl.int64)))
    small = parameters_ptr + of * stride + 2 * D
    first = of * T.to(tl.int64)
    partial_ptr += first * (2 * H)
    terms_ptr += first * 5
    z1_ptr, z2_ptr, encoded_ptr, posterior_ptr = latents_of(of, latents_ptr, T, R, H, G)
    narrow_z1_ptr = units_ptr + first * R
    decoded_ptr = units_ptr + G * R * T.to(tl.int64) + first * (DEPTH * W)
    ELEMENT: tl.constexpr = units_ptr.dtype.element_ty
    rows = block * BT + tl.arange(0, BT)
    is_token = rows < T
    hidden_units = tl.arange(0, HB)
    is_hidden = is_token[:, None] & (hidden_units < H)[None, :]
    at = rows[:, None].to(tl.int64) * (2 * H) + hidden_units[None, :]
    hidden1 = tl.zeros((BT, HB), tl.float32)
    hidden2 = tl.zeros((BT, HB), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        products = partial_ptr + chunk * G * T.to(tl.int64) * (2 * H) + at
        hidden1 += tl.load(products, mask=is_hidden, other=0.0)
        hidden2 += tl.load(products + H, mask=is_hidden, other=0.0)
    keys = tl.load(keys_ptr + rows, mask=is_token, other=0)[:, None]
    hidden1 = activate(hidden1 + bias_of(small, H, HB), keys, salt, HB, 0, R, WORDS, ENCODER_THRESHOLD, ENCODER_P)
    hidden2 = activate(hidden2 + bias_of(small + H, H, HB), keys, salt, HB, H, R, WORDS, ENCODER_THRESHOLD, ENCODER_P)
    tl.store(encoded_ptr + at, hidden1, mask=is_hidden)
    tl.store(encoded_ptr + at + H, hidden2, mask=is_hidden)

    mean1, logvar1 = heads(hidden1, small + 2 * H, R, RB, H, HB, HEAD_PRECISION, INTERPRETED)
    mean2, logvar2 = heads(hidden2, small + 2 * H + 2 * R * (H + 1), R, RB, H, HB, HEAD_PRECISION, INTERPRETED)
    latent = tl.arange(0, RB)
    is_latent = (latent < R)[None, :]
    is_z = is_token[:, None] & is_latent
    at = rows[:, None].to(tl.int64) * (4 * R) + latent[None, :]
    tl.store(posterior_ptr + at, mean1, mask=is_z)
    tl.store(posterior_ptr + at + R, logvar1, mask=is_z)
    tl.store(posterior_ptr + at + 2 * R, mean2, mask=is_z)
    tl.store(posterior_ptr + at + 3 * R, logvar2, mask=is_z)
    logvar1, logvar2 = clamp(logvar1), clamp(logvar2)
    std1, std2 = tl.exp(0.5 * logvar1), tl.exp(0.5 * logvar2)
    eps1, eps2 = normals(keys, salt, RB)
    z1 = tl.where(is_latent, mean1 + std1 * eps1, 0.0)
    z2 = tl.where(is_latent, mean2 + std2 * eps2, 0.0)
    at = rows[:, None].to(tl.int64) * R + latent[None, :]
    tl.store(z1_ptr + at, z1, mask=is_z)
    tl.store(narrow_z1_ptr + at, cast(z1 * scaling, ELEMENT, INTERPRETED), mask=is_z)
    tl.store(z2_ptr + at, z2, mask=is_z)
    kl1 = 0.5 * tl.sum(tl.where(is_latent, mean1 * mean1 + std1 * std1 - 1 - logvar1, 0.0), 1)
    ratio = logvar2 - 2 * tl.log(prior_std)
    offset2 = (mean2 - prior_mean) / prior_std
    kl2 = 0.5 * tl.sum(tl.where(is_latent, offset2 * offset2 + tl.exp(ratio) - 1 - ratio, 0.0), 1)
    z1_sq = tl.sum(z1 * z1, 1) / R
    z2_sq = tl.sum(tl.where(is_latent, (z2 - prior_mean) * (z2 - prior_mean), 0.0), 1) / R
    tl.store(terms_ptr + rows, c_kl1 * kl1 + c_kl2 * kl2 + c_z1 * z1_sq + c_z2 * z2_sq + c_0, mask=is_token)
    tl.store(terms_ptr + 2 * T + rows, kl1, mask=is_token)
    tl.store(terms_ptr + 3 * T + rows, z1_sq, mask=is_token)
    tl.store(terms_ptr + 4 * T + rows, z2_sq, mask=is_token)

    units = tl.arange(0, WB)
    decoded = decoded_ptr + rows[:, None].to(tl.int64) * W + units[None, :]
    is_hidden = is_token[:, None] & (units < W)[None, :]
    decoder = small + 2 * H + 4 * R * (H + 1)
    # Rounded to 10 bits, too many units would switch at their ReLU.
    hidden = fuse(z1, z2, decoder, R, RB, W, WB, CONCAT, HEAD_PRECISION, INTERPRETED)
    hidden = activate(hidden, keys, salt, WB, DECODER_FIRST, R, WORDS, DECODER_THRESHOLD, DECODER_P)
    tl.store(decoded, cast(hidden, ELEMENT, INTERPRETED), mask=is_hidden)
    decoder += (2 * R if CONCAT else R) * W + W
    for depth in tl.static_range(1, DEPTH):
        hidden = inner(hidden, decoder, W, WB, HEAD_PRECISION, INTERPRETED)
        hidden = activate(hidden, keys, salt, WB, DECODER_FIRST + depth * W, R, WORDS, DECODER_THRESHOLD, DECODER_P)
        decoder += W * W + W
        decoded += T.to(tl.int64) * W
        tl.store(decoded, cast(hidden, ELEMENT, INTERPRETED), mask=is_hidden)


@triton.jit(do_not_specialize=["T"])
def likelihood_kernel(
    x_ptr, parameters_ptr, packed_ptr, units_ptr, terms_ptr, partial_ptr, T, D, stride, chunk, c_nll, R: tl.constexpr,
    H2: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, DEPTH: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr,
    STATS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """From the decoder's last hidden units, over `chunk` features: partial sums of the loss (chunks, G, T), the first
    of them with the rest of it from terms; with STATS (chunks, 2, G, T), of the nll and of the squared error."""
    of = tl.program_id(0) % G
    rows = tl.program_id(0) // G * BT + tl.arange(0, BT)
    out_weight_ptr, out_bias_ptr, scale_ptr, last_ptr = decoder_of(
        of, parameters_ptr, packed_ptr, units_ptr, T, D, stride, R, H2, W, DEPTH, G, PARTS
    )
    is_token = rows < T
    x_rows = x_ptr + rows[:, None].to(tl.int64) * D
    units = tl.arange(0, WB)
    is_hidden = is_token[:, None] & (units < W)[None, :]
    last = tl.load(last_ptr + rows[:, None].to(tl.int64) * W + units[None, :], mask=is_hidden, other=0.0)
    squares = tl.zeros((BT, BD), tl.float32)
    errors = tl.zeros((BT, BD), tl.float32)
    log_scale = tl.zeros((BD,), tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, D), BD):
        features = start + tl.arange(0, BD)
        is_feature = features < D
        x = tl.load(x_rows + features[None, :], mask=is_token[:, None] & is_feature[None, :], other=0.0)
        error, _, scale = residual(
            x, last, out_weight_ptr, out_bias_ptr, scale_ptr, features, is_feature, D, W, WB, PRECISION, INTERPRETED
        )
        standardised = error * (1.0 / scale)[None, :]
        squares += standardised * standardised
        log_scale += tl.where(is_feature, tl.log(scale) + 0.5 * LOG_2PI, 0.0)
        if STATS:
            errors += error * error
    nll = 0.5 * tl.sum(squares, 1) + tl.sum(log_scale, 0)
    if STATS:
        out = partial_ptr + (tl.program_id(1) * 2 * G + of) * T.to(tl.int64) + rows
        tl.store(out, nll, mask=is_token)
        tl.store(out + G * T.to(tl.int64), tl.sum(errors, 1), mask=is_token)
    else:
        is_first = is_token & (tl.program_id(1) == 0)
        rest = tl.load(terms_ptr + of * 5 * T.to(tl.int64) + rows, mask=is_first, other=0.0)
        out = partial_ptr + (tl.program_id(1) * G + of) * T.to(tl.int64) + rows
        tl.store(out, c_nll * nll + rest, mask=is_token)
