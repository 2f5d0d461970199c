"""The VAE of one adapted layer in Triton kernels that each do one thing, with enough programs to fill a GPU.

Forward: pack the weights in 16 bit; x times both trunks (encode); heads, sampling, KL and the decoder's hidden layers
(latents); the decoder's likelihood. Backward: the same in reverse, then the gradients to x and to the parameters.
Nothing of shape (T, D) is written but the gradient to x: the reconstruction is recomputed tile by tile. Sums over D are
split into chunks, whose partial sums the next kernel adds up.

No product has 64 rows or more in a program of four warps, where Triton takes Hopper's warp-group instructions: the
assembler of CUDA before 13.3, which Triton 3.6 and 3.7 bring, makes wrong code of several of them in a kernel (invalid
reads of shared memory, as triton-lang/triton #11366 and #11781 describe). All of this is bound by memory anyway.

Everything random is a function of (token key, salt, counter), as `fvae_dist.adapter.noise` defines it.

The small parameters come in one vector (`small`): biases of both trunks (H each); for each encoder the heads of mean
and log-variance, weight (R, H) and bias (R); for each hidden layer of the decoder weight (W, in) and bias (W). Their
gradients leave in the same order, one row for each program, to be added up in a fixed order: no atomics, so that two
runs are equal bit for bit.

Sizes: T tokens, D features, R latent dimensions, H width of the trunks, W of the decoder, DEPTH its hidden layers, Z
what it reads (2R, or R for the average); RB, HB, WB are padded to a power of two, BT and BD are tiles.
"""

# mypy: ignore-errors

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

_GOLDEN = tl.constexpr(-7046029254386353131)  # 0x9E3779B97F4A7C15 as int64
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX2 = tl.constexpr(0x94D049BB133111EB)
_TO_UNIFORM = tl.constexpr(2.0**-24)
_TWO_PI = tl.constexpr(6.283185307179586)
_LOG_2PI = tl.constexpr(1.8378770664093453)
_LIMIT = tl.constexpr(20.0)
_EPSILON = tl.constexpr(1e-5)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """a @ b in fp32; the interpreter cannot multiply bf16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _cast(values, ELEMENT: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 values in ELEMENT, rounded to nearest even; the interpreter would cut bits off."""
    if INTERPRETED and ELEMENT == tl.bfloat16:  # noqa: SIM300
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = bits.to(tl.float32, bitcast=True)
    return values.to(ELEMENT)


# --------------------------------------------------------------------------------------------------------------- noise


@triton.jit
def _words(keys, salt, counters):
    """splitmix64's finalizer of key + salt + counter * GOLDEN: (BT, 1) and (1, N) -> (BT, N) uint64."""
    word = (keys + (salt + counters * _GOLDEN)).to(tl.uint64, bitcast=True)
    word = (word ^ (word >> 30)) * _MIX1
    word = (word ^ (word >> 27)) * _MIX2
    return word ^ (word >> 31)


@triton.jit
def _normals(keys, salt, N: tl.constexpr):
    """Two standard normals for each token and latent dimension, (BT, N) each."""
    words = _words(keys, salt, tl.arange(0, N)[None, :].to(tl.int64))
    uniform1 = ((words >> 40).to(tl.float32) + 0.5) * _TO_UNIFORM
    uniform2 = (((words & 0xFFFFFFFF) >> 8).to(tl.float32) + 0.5) * _TO_UNIFORM
    radius = tl.sqrt(-2.0 * tl.log(uniform1))
    return radius * tl.cos(uniform2 * _TWO_PI), radius * tl.sin(uniform2 * _TWO_PI)


@triton.jit
def _activate(
    values, keys, salt, N: tl.constexpr, FIRST: tl.constexpr, R: tl.constexpr, WORDS: tl.constexpr,
    THRESHOLD: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """relu(values), then dropout with rate P; FIRST: of the layer's dropout decisions, the first that is used here."""
    values = tl.maximum(values, 0.0)
    if P > 0:
        index = FIRST + tl.arange(0, N)[None, :].to(tl.int64)
        is_high = index < WORDS
        words = _words(keys, salt, R + tl.where(is_high, index, index - WORDS))
        half = tl.where(is_high, words >> 32, words & 0xFFFFFFFF).to(tl.int64)
        values = tl.where(half >= THRESHOLD, values * (1.0 / (1.0 - P)), 0.0)
    return values


# ------------------------------------------------------------------------------------------------------- small linears


@triton.jit
def _weight(small, OUT: tl.constexpr, OUT_B: tl.constexpr, IN: tl.constexpr, IN_B: tl.constexpr, STRIDE: tl.constexpr):
    """A weight (OUT, IN) whose rows are STRIDE apart, padded with zeros to (OUT_B, IN_B)."""
    row, column = tl.arange(0, OUT_B)[:, None], tl.arange(0, IN_B)[None, :]
    return tl.load(small + row * STRIDE + column, mask=(row < OUT) & (column < IN), other=0.0)


@triton.jit
def _bias(small, OUT: tl.constexpr, OUT_B: tl.constexpr):
    index = tl.arange(0, OUT_B)
    return tl.load(small + index, mask=index < OUT, other=0.0)[None, :]


@triton.jit
def _heads(
    hidden, small, R: tl.constexpr, RB: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Mean and log-variance before its clamp, (BT, RB) each."""
    mean = _dot(hidden, tl.trans(_weight(small, R, RB, H, HB, H)), PRECISION, INTERPRETED)
    logvar_weight = tl.trans(_weight(small + R * H + R, R, RB, H, HB, H))
    logvar = _dot(hidden, logvar_weight, PRECISION, INTERPRETED) + _bias(small + 2 * R * H + R, R, RB)
    return mean + _bias(small + R * H, R, RB), logvar


@triton.jit
def _fuse(
    z1, z2, small, R: tl.constexpr, RB: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, CONCAT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """First linear of the decoder, (BT, RB) twice -> (BT, WB)."""
    if CONCAT:
        out = _dot(z1, tl.trans(_weight(small, W, WB, R, RB, 2 * R)), PRECISION, INTERPRETED)
        out += _dot(z2, tl.trans(_weight(small + R, W, WB, R, RB, 2 * R)), PRECISION, INTERPRETED)
        return out + _bias(small + 2 * R * W, W, WB)
    out = _dot((z1 + z2) * 0.5, tl.trans(_weight(small, W, WB, R, RB, R)), PRECISION, INTERPRETED)
    return out + _bias(small + R * W, W, WB)


@triton.jit
def _inner(hidden, small, W: tl.constexpr, WB: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """A hidden layer's linear, (BT, WB) -> (BT, WB)."""
    out = _dot(hidden, tl.trans(_weight(small, W, WB, W, WB, W)), PRECISION, INTERPRETED)
    return out + _bias(small + W * W, W, WB)


@triton.jit
def _clamp(logvar):
    return tl.minimum(tl.maximum(logvar, -_LIMIT), _LIMIT)


@triton.jit
def _output(weight_ptr, bias_ptr, scale_ptr, features, is_feature, units, W: tl.constexpr):
    """Of some features the output weight (BD, WB), bias (BD) and scale (BD); beyond D: 0, 0 and 1."""
    is_weight = is_feature[:, None] & (units < W)[None, :]
    weight = tl.load(weight_ptr + features[:, None] * W + units[None, :], mask=is_weight, other=0.0)
    bias = tl.load(bias_ptr + features, mask=is_feature, other=0.0)
    scale = tl.load(scale_ptr + features, mask=is_feature, other=1.0)
    return weight, bias, tl.where(is_feature, tl.abs(scale) + _EPSILON, 1.0)


# ------------------------------------------------------------------------------------------------------------- forward


@triton.jit
def pack_kernel(
    weight1_ptr, weight2_ptr, out_weight_ptr, trunks_ptr, narrow_ptr, D, H: tl.constexpr, W: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """trunks (2, 2H, D): both trunks' weights in two parts of 16 bit, as exact as a 16-bit x allows; narrow (D, W): the
    output weight in 16 bit."""
    ELEMENT: tl.constexpr = trunks_ptr.dtype.element_ty
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_first = index < H * D
    weight = tl.load(weight1_ptr + index, mask=is_first, other=0.0)
    weight += tl.load(weight2_ptr + index - H * D, mask=(index >= H * D) & (index < 2 * H * D), other=0.0)
    high = _cast(weight, ELEMENT, INTERPRETED)
    tl.store(trunks_ptr + index, high, mask=index < 2 * H * D)
    low = _cast(weight - high.to(tl.float32), ELEMENT, INTERPRETED)
    tl.store(trunks_ptr + 2 * H * D + index, low, mask=index < 2 * H * D)
    out_weight = tl.load(out_weight_ptr + index, mask=index < D * W, other=0.0)
    tl.store(narrow_ptr + index, _cast(out_weight, ELEMENT, INTERPRETED), mask=index < D * W)


@triton.jit(do_not_specialize=["T"])
def encode_kernel(
    x_ptr, trunks_ptr, partial_ptr, T, D, chunk, H2: tl.constexpr, HB2: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """x @ trunks.T over `chunk` features: partial (chunks, T, 2H)."""
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
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
            total += _dot(x, tl.trans(weight), PRECISION, INTERPRETED)
    at = (tl.program_id(1) * T + rows).to(tl.int64)[:, None] * H2 + units[None, :]
    tl.store(partial_ptr + at, total, mask=is_token[:, None] & (units < H2)[None, :])


@triton.jit(do_not_specialize=["T", "salt"])
def latents_kernel(
    partial_ptr, keys_ptr, small, z1_ptr, z2_ptr, terms_ptr, encoded_ptr, posterior_ptr, decoded_ptr,
    T, salt, c_kl1, c_kl2, c_z1, c_z2, c_0, prior_mean, prior_std,
    R: tl.constexpr, RB: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, W: tl.constexpr, WB: tl.constexpr,
    DEPTH: tl.constexpr, CONCAT: tl.constexpr, WORDS: tl.constexpr, ENCODER_THRESHOLD: tl.constexpr,
    ENCODER_P: tl.constexpr, DECODER_FIRST: tl.constexpr, DECODER_THRESHOLD: tl.constexpr, DECODER_P: tl.constexpr,
    CHUNKS: tl.constexpr, PRECISION: tl.constexpr, HEAD_PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """From the trunks' products: z1, z2 (T, R); of terms (5, T) the loss without its nll, kl_z1, z1_sq, z2_sq in rows
    0 and 2 to 4; encoded (T, 2H), the trunks' hidden units; posterior (T, 4, R): mean and log-variance before its
    clamp, of both encoders; decoded (DEPTH, T, W), the decoder's hidden units."""
    ELEMENT: tl.constexpr = decoded_ptr.dtype.element_ty
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    is_token = rows < T
    hidden_units = tl.arange(0, HB)
    is_hidden = is_token[:, None] & (hidden_units < H)[None, :]
    at = rows[:, None].to(tl.int64) * (2 * H) + hidden_units[None, :]
    hidden1 = tl.zeros((BT, HB), tl.float32)
    hidden2 = tl.zeros((BT, HB), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        products = partial_ptr + chunk * T.to(tl.int64) * (2 * H) + at
        hidden1 += tl.load(products, mask=is_hidden, other=0.0)
        hidden2 += tl.load(products + H, mask=is_hidden, other=0.0)
    keys = tl.load(keys_ptr + rows, mask=is_token, other=0)[:, None]
    hidden1 = _activate(hidden1 + _bias(small, H, HB), keys, salt, HB, 0, R, WORDS, ENCODER_THRESHOLD, ENCODER_P)
    hidden2 = _activate(hidden2 + _bias(small + H, H, HB), keys, salt, HB, H, R, WORDS, ENCODER_THRESHOLD, ENCODER_P)
    tl.store(encoded_ptr + at, hidden1, mask=is_hidden)
    tl.store(encoded_ptr + at + H, hidden2, mask=is_hidden)

    mean1, logvar1 = _heads(hidden1, small + 2 * H, R, RB, H, HB, HEAD_PRECISION, INTERPRETED)
    mean2, logvar2 = _heads(hidden2, small + 2 * H + 2 * R * (H + 1), R, RB, H, HB, HEAD_PRECISION, INTERPRETED)
    latent = tl.arange(0, RB)
    is_latent = (latent < R)[None, :]
    is_z = is_token[:, None] & is_latent
    at = rows[:, None].to(tl.int64) * (4 * R) + latent[None, :]
    tl.store(posterior_ptr + at, mean1, mask=is_z)
    tl.store(posterior_ptr + at + R, logvar1, mask=is_z)
    tl.store(posterior_ptr + at + 2 * R, mean2, mask=is_z)
    tl.store(posterior_ptr + at + 3 * R, logvar2, mask=is_z)
    logvar1, logvar2 = _clamp(logvar1), _clamp(logvar2)
    std1, std2 = tl.exp(0.5 * logvar1), tl.exp(0.5 * logvar2)
    eps1, eps2 = _normals(keys, salt, RB)
    z1 = tl.where(is_latent, mean1 + std1 * eps1, 0.0)
    z2 = tl.where(is_latent, mean2 + std2 * eps2, 0.0)
    at = rows[:, None].to(tl.int64) * R + latent[None, :]
    tl.store(z1_ptr + at, z1, mask=is_z)
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
    hidden = _fuse(z1, z2, decoder, R, RB, W, WB, CONCAT, PRECISION, INTERPRETED)
    hidden = _activate(hidden, keys, salt, WB, DECODER_FIRST, R, WORDS, DECODER_THRESHOLD, DECODER_P)
    tl.store(decoded, _cast(hidden, ELEMENT, INTERPRETED), mask=is_hidden)
    decoder += (2 * R if CONCAT else R) * W + W
    for depth in tl.static_range(1, DEPTH):
        hidden = _inner(hidden, decoder, W, WB, PRECISION, INTERPRETED)
        hidden = _activate(hidden, keys, salt, WB, DECODER_FIRST + depth * W, R, WORDS, DECODER_THRESHOLD, DECODER_P)
        decoder += W * W + W
        decoded += T.to(tl.int64) * W
        tl.store(decoded, _cast(hidden, ELEMENT, INTERPRETED), mask=is_hidden)


@triton.jit(do_not_specialize=["T"])
def likelihood_kernel(
    x_ptr, out_weight_ptr, out_bias_ptr, scale_ptr, last_ptr, partial_ptr, T, D, chunk, W: tl.constexpr,
    WB: tl.constexpr, STATS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """nll over `chunk` features, from the decoder's last hidden units: partial (chunks, T); with STATS (chunks, 2, T),
    the squared error beside it."""
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
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
        weight, bias, scale = _output(out_weight_ptr, out_bias_ptr, scale_ptr, features, is_feature, units, W)
        error = x.to(tl.float32) - bias[None, :] - _dot(last, tl.trans(weight), PRECISION, INTERPRETED)
        standardised = error * (1.0 / scale)[None, :]
        squares += standardised * standardised
        log_scale += tl.where(is_feature, tl.log(scale) + 0.5 * _LOG_2PI, 0.0)
        if STATS:
            errors += error * error
    nll = 0.5 * tl.sum(squares, 1) + tl.sum(log_scale, 0)
    if STATS:
        out = partial_ptr + tl.program_id(1) * 2 * T + rows
        tl.store(out, nll, mask=is_token)
        tl.store(out + T, tl.sum(errors, 1), mask=is_token)
    else:
        tl.store(partial_ptr + tl.program_id(1) * T + rows, nll, mask=is_token)


# ---------------------------------------------------------------------------------------------------- backward, tokens


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
        value = _dot(tl.trans(values), gradient, PRECISION, INTERPRETED)
    else:
        row, column = tl.arange(0, OUT_B)[:, None], tl.arange(0, IN_B)[None, :]
        value = _dot(tl.trans(gradient), values, PRECISION, INTERPRETED)
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
    d_hidden = _dot(d_mean, _weight(small, R, RB, H, HB, H), PRECISION, INTERPRETED)
    d_hidden += _dot(d_logvar, _weight(small + R * H + R, R, RB, H, HB, H), PRECISION, INTERPRETED)
    return tl.where(hidden > 0, d_hidden * (1.0 / (1.0 - P)), 0.0)


@triton.jit(do_not_specialize=["T"])
def backward_likelihood_kernel(
    x_ptr, out_weight_ptr, out_bias_ptr, scale_ptr, last_ptr, d_loss_ptr, partial_ptr, T, D, chunk, c_nll,
    W: tl.constexpr, WB: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Gradient of the decoder's last hidden units over `chunk` features: partial (chunks, T, W)."""
    ELEMENT: tl.constexpr = x_ptr.dtype.element_ty
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
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
        weight, bias, scale = _output(out_weight_ptr, out_bias_ptr, scale_ptr, features, is_feature, units, W)
        error = x.to(tl.float32) - bias[None, :] - _dot(last, tl.trans(weight), PRECISION, INTERPRETED)
        d_xhat = -d_nll * error * (1.0 / (scale * scale))[None, :]
        d_last += _dot(_cast(d_xhat, ELEMENT, INTERPRETED), weight, PRECISION, INTERPRETED)
    tl.store(partial_ptr + tl.program_id(1) * T.to(tl.int64) * W + at_hidden, d_last, mask=is_hidden)


@triton.jit(do_not_specialize=["T", "num_blocks"])
def backward_latents_kernel(
    partial_ptr, small, z1_ptr, z2_ptr, encoded_ptr, posterior_ptr, decoded_ptr, d_loss_ptr, d_z1_ptr, d_decoded_ptr,
    d_encoded_ptr, d_posterior_ptr, sums_ptr, T, num_blocks, c_kl1, c_kl2, c_z1, c_z2, prior_mean, prior_std,
    R: tl.constexpr, RB: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, W: tl.constexpr, WB: tl.constexpr,
    DEPTH: tl.constexpr, CONCAT: tl.constexpr, ENCODER_P: tl.constexpr, DECODER_P: tl.constexpr, CHUNKS: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gradients of the decoder's hidden layers before their activation (DEPTH, T, W) and of the trunks before theirs
    (T, 2H). With SUMS also sums (programs, ...) of the gradients of the trunks' biases, heads and the decoder's first
    layer, else (where they are too large for a program) the gradient of the posterior (T, 4, R)."""
    ELEMENT: tl.constexpr = decoded_ptr.dtype.element_ty
    Z: tl.constexpr = 2 * R if CONCAT else R
    HEADS1: tl.constexpr = 2 * H
    HEADS2: tl.constexpr = 2 * H + 2 * R * (H + 1)
    DECODER: tl.constexpr = 2 * H + 4 * R * (H + 1)
    INNER: tl.constexpr = DECODER + Z * W + W
    sums = sums_ptr + tl.program_id(0).to(tl.int64) * INNER
    hidden_units = tl.arange(0, HB)
    units = tl.arange(0, WB)
    latent = tl.arange(0, RB)
    is_latent = (latent < R)[None, :]
    is_first = 1
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        rows = block * BT + tl.arange(0, BT)
        is_token = rows < T
        is_hidden = is_token[:, None] & (units < W)[None, :]
        at = rows[:, None].to(tl.int64) * W + units[None, :]
        d_last = tl.zeros((BT, WB), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            d_last += tl.load(partial_ptr + chunk * T.to(tl.int64) * W + at, mask=is_hidden, other=0.0)
        at += (DEPTH - 1) * T.to(tl.int64) * W
        hidden = tl.load(decoded_ptr + at, mask=is_hidden, other=0.0)
        d_hidden = tl.where(hidden > 0, d_last * (1.0 / (1.0 - DECODER_P)), 0.0)
        d_hidden = _cast(d_hidden, ELEMENT, INTERPRETED)
        tl.store(d_decoded_ptr + at, d_hidden, mask=is_hidden)
        offset = small + INNER + (DEPTH - 2) * W * (W + 1)
        for _ in tl.static_range(1, DEPTH):
            at -= T.to(tl.int64) * W
            weight = _cast(_weight(offset, W, WB, W, WB, W), ELEMENT, INTERPRETED)
            d_hidden = _dot(d_hidden, weight, PRECISION, INTERPRETED)
            hidden = tl.load(decoded_ptr + at, mask=is_hidden, other=0.0)
            d_hidden = tl.where(hidden > 0, d_hidden * (1.0 / (1.0 - DECODER_P)), 0.0)
            d_hidden = _cast(d_hidden, ELEMENT, INTERPRETED)
            tl.store(d_decoded_ptr + at, d_hidden, mask=is_hidden)
            offset -= W * (W + 1)
        d_first = d_hidden.to(tl.float32)

        d_loss = tl.load(d_loss_ptr + rows, mask=is_token, other=0.0)[:, None]
        is_z = is_token[:, None] & is_latent
        at = rows[:, None].to(tl.int64) * R + latent[None, :]
        z1 = tl.load(z1_ptr + at, mask=is_z, other=0.0)
        z2 = tl.load(z2_ptr + at, mask=is_z, other=0.0)
        d_z1 = tl.load(d_z1_ptr + at, mask=is_z, other=0.0)
        if SUMS:
            _add_bias(sums + DECODER + Z * W, d_first, is_first, W, WB)
            if CONCAT:
                _add_linear(sums + DECODER, d_first, z1, is_first, W, WB, R, RB, Z, PRECISION, INTERPRETED)
                _add_linear(sums + DECODER + R, d_first, z2, is_first, W, WB, R, RB, Z, PRECISION, INTERPRETED)
            else:
                fused = (z1 + z2) * 0.5
                _add_linear(sums + DECODER, d_first, fused, is_first, W, WB, R, RB, Z, PRECISION, INTERPRETED)
        if CONCAT:
            d_z1 += _dot(d_first, _weight(small + DECODER, W, WB, R, RB, Z), PRECISION, INTERPRETED)
            d_z2 = _dot(d_first, _weight(small + DECODER + R, W, WB, R, RB, Z), PRECISION, INTERPRETED)
        else:
            d_z2 = 0.5 * _dot(d_first, _weight(small + DECODER, W, WB, R, RB, Z), PRECISION, INTERPRETED)
            d_z1 += d_z2

        at = rows[:, None].to(tl.int64) * (4 * R) + latent[None, :]
        mean1 = tl.load(posterior_ptr + at, mask=is_z, other=0.0)
        logvar1 = tl.load(posterior_ptr + at + R, mask=is_z, other=0.0)
        mean2 = tl.load(posterior_ptr + at + 2 * R, mask=is_z, other=0.0)
        logvar2 = tl.load(posterior_ptr + at + 3 * R, mask=is_z, other=0.0)
        variance1 = tl.exp(_clamp(logvar1))
        variance2 = tl.exp(_clamp(logvar2))
        d_z1 = tl.where(is_latent, d_z1 + d_loss * (c_z1 * 2 / R) * z1, 0.0)
        d_z2 = tl.where(is_latent, d_z2 + d_loss * (c_z2 * 2 / R) * (z2 - prior_mean), 0.0)
        prior_variance = prior_std * prior_std
        d_mean1 = d_z1 + d_loss * c_kl1 * mean1
        d_mean2 = tl.where(is_latent, d_z2 + d_loss * c_kl2 * (mean2 - prior_mean) / prior_variance, 0.0)
        # std * eps = z - mean
        d_logvar1 = 0.5 * (d_z1 * (z1 - mean1) + d_loss * c_kl1 * (variance1 - 1))
        d_logvar2 = 0.5 * (d_z2 * (z2 - mean2) + d_loss * c_kl2 * (variance2 / prior_variance - 1))
        d_logvar1 = tl.where((tl.abs(logvar1) <= _LIMIT) & is_latent, d_logvar1, 0.0)
        d_logvar2 = tl.where((tl.abs(logvar2) <= _LIMIT) & is_latent, d_logvar2, 0.0)
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
        tl.store(d_encoded_ptr + at, _cast(d_pre1, ELEMENT, INTERPRETED), mask=is_hidden)
        tl.store(d_encoded_ptr + at + H, _cast(d_pre2, ELEMENT, INTERPRETED), mask=is_hidden)
        is_first = 0


@triton.jit(do_not_specialize=["T"])
def backward_input_kernel(
    x_ptr, trunks_ptr, out_weight_ptr, out_bias_ptr, scale_ptr, last_ptr, d_encoded_ptr, d_loss_ptr, d_x_ptr, T, D,
    c_nll, H2: tl.constexpr, HB2: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradient to x (T, D), a tile for each program."""
    rows = tl.program_id(1) * BT + tl.arange(0, BT)
    is_token = rows < T
    features = tl.program_id(0) * BD + tl.arange(0, BD)
    is_feature = features < D
    units = tl.arange(0, WB)
    hidden_units = tl.arange(0, HB2)
    at = rows[:, None].to(tl.int64) * D + features[None, :]
    is_x = is_token[:, None] & is_feature[None, :]
    x = tl.load(x_ptr + at, mask=is_x, other=0.0)
    is_hidden = is_token[:, None] & (units < W)[None, :]
    last = tl.load(last_ptr + rows[:, None].to(tl.int64) * W + units[None, :], mask=is_hidden, other=0.0)
    weight, bias, scale = _output(out_weight_ptr, out_bias_ptr, scale_ptr, features, is_feature, units, W)
    d_nll = tl.load(d_loss_ptr + rows, mask=is_token, other=0.0)[:, None] * c_nll
    error = x.to(tl.float32) - bias[None, :] - _dot(last, tl.trans(weight), PRECISION, INTERPRETED)
    d_x = d_nll * error * (1.0 / (scale * scale))[None, :]
    is_hidden = is_token[:, None] & (hidden_units < H2)[None, :]
    at_hidden = rows[:, None].to(tl.int64) * H2 + hidden_units[None, :]
    d_encoded = tl.load(d_encoded_ptr + at_hidden, mask=is_hidden, other=0.0)
    at_trunk = hidden_units[:, None] * D + features[None, :]
    trunk = tl.load(trunks_ptr + at_trunk, mask=(hidden_units < H2)[:, None] & is_feature[None, :], other=0.0)
    d_x += _dot(d_encoded, trunk, PRECISION, INTERPRETED)
    tl.store(d_x_ptr + at, _cast(d_x, x_ptr.dtype.element_ty, INTERPRETED), mask=is_x)


@triton.jit(do_not_specialize=["T", "chunk"])
def backward_inner_kernel(
    decoded_ptr, d_decoded_ptr, out_ptr, T, chunk, W: tl.constexpr, WB: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of the decoder's inner layers over `chunk` tokens: for each chunk a row (DEPTH - 1, W * (W + 1)). A
    program has BD of a layer's units."""
    layer = tl.program_id(0)
    units = tl.program_id(2) * BD + tl.arange(0, BD)
    column = tl.arange(0, WB)[None, :]
    weight = tl.zeros((BD, WB), tl.float32)
    bias = tl.zeros((BD,), tl.float32)
    first = tl.program_id(1) * chunk
    at_layer = layer.to(tl.int64) * T * W
    for start in range(first, tl.minimum(first + chunk, T), BT):
        rows = start + tl.arange(0, BT)[:, None]
        is_token = rows < tl.minimum(first + chunk, T)
        at = at_layer + rows.to(tl.int64) * W
        hidden = tl.load(decoded_ptr + at + column, mask=is_token & (column < W), other=0.0)
        d_at = d_decoded_ptr + T.to(tl.int64) * W + at + units[None, :]
        d_hidden = tl.load(d_at, mask=is_token & (units < W)[None, :], other=0.0)
        weight += _dot(tl.trans(d_hidden), hidden, PRECISION, INTERPRETED)
        bias += tl.sum(d_hidden.to(tl.float32), 0)
    out = out_ptr + (tl.program_id(1).to(tl.int64) * (DEPTH - 1) + layer) * (W * (W + 1))
    tl.store(out + units[:, None] * W + column, weight, mask=(units < W)[:, None] & (column < W))
    tl.store(out + W * W + units, bias, mask=units < W)


# -------------------------------------------------------------------------------------------------- backward, features


@triton.jit(do_not_specialize=["T", "chunk"])
def backward_features_kernel(
    x_ptr, out_weight_ptr, out_bias_ptr, scale_ptr, last_ptr, d_encoded_ptr, d_loss_ptr, out_ptr, T, D, c_nll, chunk,
    H2: tl.constexpr, HB2: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of the parameters that have values for each feature, over `chunk` tokens: for each chunk a row
    (D * (W + 2 + 2 H)) with output weight (D, W), its bias (D), scale (D) and the trunks' weights (2, H, D)."""
    ELEMENT: tl.constexpr = x_ptr.dtype.element_ty
    features = tl.program_id(0) * BD + tl.arange(0, BD)
    is_feature = features < D
    units = tl.arange(0, WB)
    hidden_units = tl.arange(0, HB2)
    # Everything with a feature in each row.
    weight, bias, scale = _output(out_weight_ptr, out_bias_ptr, scale_ptr, features, is_feature, units, W)
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
        standardised = (x.to(tl.float32) - bias - _dot(weight, tl.trans(last), PRECISION, INTERPRETED)) * inverse
        d_xhat = -d_nll * standardised * inverse
        d_weight += _dot(_cast(d_xhat, ELEMENT, INTERPRETED), last, PRECISION, INTERPRETED)
        d_bias += tl.sum(d_xhat, 1)
        d_scale += tl.sum(d_nll * inverse * (1.0 - standardised * standardised), 1)
        d_trunks += _dot(x, d_encoded, PRECISION, INTERPRETED)
    out = out_ptr + tl.program_id(1).to(tl.int64) * D * (W + 2 + H2)
    is_weight = is_feature[:, None] & (units < W)[None, :]
    tl.store(out + features[:, None] * W + units[None, :], d_weight, mask=is_weight)
    out += D * W
    tl.store(out + features, d_bias, mask=is_feature)
    raw_scale = tl.load(scale_ptr + features, mask=is_feature, other=1.0)
    sign = tl.where(raw_scale > 0, 1.0, tl.where(raw_scale < 0, -1.0, 0.0))
    tl.store(out + D + features, d_scale * sign, mask=is_feature)
    at = hidden_units[None, :] * D + features[:, None]
    tl.store(out + 2 * D + at, d_trunks, mask=(hidden_units < H2)[None, :] & is_feature[:, None])


INTERPRETED = isinstance(latents_kernel, InterpretedFunction)
