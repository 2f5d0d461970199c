"""What the kernels share: noise, small linears, a tile of the reconstruction's error."""

# mypy: ignore-errors

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(-7046029254386353131)  # 0x9E3779B97F4A7C15 as int64
_MIX1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX2 = tl.constexpr(0x94D049BB133111EB)
_TO_UNIFORM = tl.constexpr(2.0**-24)
_TWO_PI = tl.constexpr(6.283185307179586)
LOG_2PI = tl.constexpr(1.8378770664093453)
LIMIT = tl.constexpr(20.0)
EPSILON = tl.constexpr(1e-5)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """a @ b in fp32; the interpreter cannot multiply bf16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def cast(values, ELEMENT: tl.constexpr, INTERPRETED: tl.constexpr):
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
def normals(keys, salt, N: tl.constexpr):
    """Two standard normals for each token and latent dimension, (BT, N) each."""
    words = _words(keys, salt, tl.arange(0, N)[None, :].to(tl.int64))
    uniform1 = ((words >> 40).to(tl.float32) + 0.5) * _TO_UNIFORM
    uniform2 = (((words & 0xFFFFFFFF) >> 8).to(tl.float32) + 0.5) * _TO_UNIFORM
    radius = tl.sqrt(-2.0 * tl.log(uniform1))
    return radius * tl.cos(uniform2 * _TWO_PI), radius * tl.sin(uniform2 * _TWO_PI)


@triton.jit
def activate(
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
def weight_of(
    small, OUT: tl.constexpr, OUT_B: tl.constexpr, IN: tl.constexpr, IN_B: tl.constexpr, STRIDE: tl.constexpr
):
    """A weight (OUT, IN) whose rows are STRIDE apart, padded with zeros to (OUT_B, IN_B)."""
    row, column = tl.arange(0, OUT_B)[:, None], tl.arange(0, IN_B)[None, :]
    return tl.load(small + row * STRIDE + column, mask=(row < OUT) & (column < IN), other=0.0)


@triton.jit
def bias_of(small, OUT: tl.constexpr, OUT_B: tl.constexpr):
    index = tl.arange(0, OUT_B)
    return tl.load(small + index, mask=index < OUT, other=0.0)[None, :]


@triton.jit
def heads(
    hidden, small, R: tl.constexpr, RB: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Mean and log-variance before its clamp, (BT, RB) each."""
    mean = dot(hidden, tl.trans(weight_of(small, R, RB, H, HB, H)), PRECISION, INTERPRETED)
    logvar_weight = tl.trans(weight_of(small + R * H + R, R, RB, H, HB, H))
    logvar = dot(hidden, logvar_weight, PRECISION, INTERPRETED) + bias_of(small + 2 * R * H + R, R, RB)
    return mean + bias_of(small + R * H, R, RB), logvar


@triton.jit
def fuse(
    z1, z2, small, R: tl.constexpr, RB: tl.constexpr, W: tl.constexpr, WB: tl.constexpr, CONCAT: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """First linear of the decoder, (BT, RB) twice -> (BT, WB)."""
    if CONCAT:
        out = dot(z1, tl.trans(weight_of(small, W, WB, R, RB, 2 * R)), PRECISION, INTERPRETED)
        out += dot(z2, tl.trans(weight_of(small + R, W, WB, R, RB, 2 * R)), PRECISION, INTERPRETED)
        return out + bias_of(small + 2 * R * W, W, WB)
    out = dot((z1 + z2) * 0.5, tl.trans(weight_of(small, W, WB, R, RB, R)), PRECISION, INTERPRETED)
    return out + bias_of(small + R * W, W, WB)


@triton.jit
def inner(hidden, small, W: tl.constexpr, WB: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """A hidden layer's linear, (BT, WB) -> (BT, WB)."""
    out = dot(hidden, tl.trans(weight_of(small, W, WB, W, WB, W)), PRECISION, INTERPRETED)
    return out + bias_of(small + W * W, W, WB)


@triton.jit
def clamp(logvar):
    return tl.minimum(tl.maximum(logvar, -LIMIT), LIMIT)


@triton.jit
def output(weight_ptr, bias_ptr, scale_ptr, features, is_feature, units, W: tl.constexpr):
    """Of some features the output weight (BD, WB), bias (BD) and scale (BD); beyond D: 0, 0 and 1."""
    is_weight = is_feature[:, None] & (units < W)[None, :]
    weight = tl.load(weight_ptr + features[:, None] * W + units[None, :], mask=is_weight, other=0.0)
    bias = tl.load(bias_ptr + features, mask=is_feature, other=0.0)
    scale = tl.load(scale_ptr + features, mask=is_feature, other=1.0)
    return weight, bias, tl.where(is_feature, tl.abs(scale) + EPSILON, 1.0)


@triton.jit
def narrow_of(packed_ptr, D, H2: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr):
    """The output weights (G, D, W) stand behind the trunks (G, PARTS, 2H, D)."""
    return packed_ptr + G * PARTS * H2 * D


@triton.jit
def decoder_of(
    of, parameters_ptr, packed_ptr, units_ptr, T, D, stride, R: tl.constexpr, H2: tl.constexpr, W: tl.constexpr,
    DEPTH: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of an adapter: output weight in x's dtype (D, W), bias and scale (D), the decoder's last hidden units (T, W)."""
    bias = parameters_ptr + of * stride
    last = units_ptr + (G * R + (of * DEPTH + DEPTH - 1) * W) * T.to(tl.int64)
    return narrow_of(packed_ptr, D, H2, G, PARTS) + of * (D * W), bias, bias + D, last


@triton.jit
def latents_of(of, latents_ptr, T, R: tl.constexpr, H: tl.constexpr, G: tl.constexpr):
    """Of an adapter z1, z2 (T, R), encoded (T, 2H), posterior (T, 4, R): for all adapters they stand in this order."""
    T = T.to(tl.int64)
    z1 = latents_ptr + of * T * R
    z2 = z1 + G * T * R
    encoded = latents_ptr + (2 * G * R + of * 2 * H) * T
    posterior = latents_ptr + (2 * G * (R + H) + of * 4 * R) * T
    return z1, z2, encoded, posterior


@triton.jit
def residual(
    x, last, weight_ptr, bias_ptr, scale_ptr, features, is_feature, D, W: tl.constexpr, WB: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x - xhat of some tokens and features (BT, BD), the output weight (BD, WB) and the scale (BD); beyond D the error
    is 0 and the scale 1, where x is 0."""
    weight, bias, scale = output(weight_ptr, bias_ptr, scale_ptr, features, is_feature, tl.arange(0, WB), W)
    return x.to(tl.float32) - bias[None, :] - dot(last, tl.trans(weight), PRECISION, INTERPRETED), weight, scale
