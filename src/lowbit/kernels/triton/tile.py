"""Device functions that decode a tile of 64 rows and 64 inputs: one of them serves every term of codes.

A tile is [64 rows, 64 inputs] in registers. The words of a plane are loaded once, [64 rows, words], and each
is spread over its 32 / w inputs; what a group of inputs shares is loaded once for 16 inputs, which every
group size is a multiple of. `rows` may be any rows: consecutive ones in products, chosen ones in lookups.

The parameters of a term, as launch.py gives them:

    planes p0, p1, p2     int32 [words, stride]; W0, W1, W2 their widths, 0: none; BASE3: ternary words
    levels                float32 [tables * SIZE]; LINEAR: a level is first + step * code instead, exactly
    scales                SCALES names their type; float16 | float32 | uint8 [groups, stride]
    zeros, selectors      uint8 [groups, stride];   multipliers: int32 words;   factors: int8 [groups, stride]
    offsets               [groups or super-groups, stride], offset_factors int8 [groups, stride]
    group, supers         inputs of a group and of a super-group, in units of 16
"""

import triton
import triton.language as tl

TILE = 64
UNITS = 4  # of 16 inputs, in a tile


@triton.jit
def plane(words, rows, stride, k0, WIDTH: tl.constexpr):
    """Codes of one plane: int32 [rows, 64]."""
    PER: tl.constexpr = 32 // WIDTH
    at = k0 // PER + tl.arange(0, 64 // PER)
    word = tl.load(words + at[None, :].to(tl.int64) * stride + rows[:, None])
    shifts = tl.arange(0, PER) * WIDTH
    codes = (word[:, :, None] >> shifts[None, None, :]) & ((1 << WIDTH) - 1)
    return tl.reshape(codes, (rows.shape[0], 64))


@triton.jit
def trits(words, rows, stride, k0):
    """Ternary codes, int32 [rows, 64]: digit j of a byte is ((byte * 3**j) % 256) * 3 // 256."""
    k = k0 + tl.arange(0, 64)
    word = tl.load(words + (k // 20)[None, :].to(tl.int64) * stride + rows[:, None])
    place = k % 20
    j = place % 5
    power = tl.where(j == 0, 1, tl.where(j == 1, 3, tl.where(j == 2, 9, tl.where(j == 3, 27, 81))))
    byte = (word >> (place // 5 * 8)[None, :]) & 255
    return (byte * power[None, :] & 255) * 3 >> 8


@triton.jit
def codes_tile(
    p0, p1, p2, rows, stride, k0, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BASE3: tl.constexpr
):
    if BASE3:
        codes = trits(p0, rows, stride, k0)
    else:
        codes = plane(p0, rows, stride, k0, W0)
        if W1 > 0:
            codes |= plane(p1, rows, stride, k0, W1) << W0
        if W2 > 0:
            codes |= plane(p2, rows, stride, k0, W2) << (W0 + W1)
    return codes


@triton.jit
def units(k0, size, last):
    """The group of each of the four units of 16 inputs; groups that padding would have are the last one."""
    return tl.minimum((k0 // 16 + tl.arange(0, 4)) // size, last)


@triton.jit
def spread(values):
    """[rows, 4] -> [rows, 64]: a value of 16 inputs for each of them."""
    wide = tl.broadcast_to(values[:, :, None], (values.shape[0], 4, 16))
    return tl.reshape(wide, (values.shape[0], 64))


@triton.jit
def per_unit(values, rows, stride, group):
    return tl.load(values + group[None, :].to(tl.int64) * stride + rows[:, None])


@triton.jit
def e8m0(code):
    """2 ** (code - 127); 255 is NaN and refused when files are read."""
    bits = tl.where(code == 0, 0x00400000, code.to(tl.int32) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e4m3(code):
    wide = code.to(tl.int32)
    exponent = (wide >> 3) & 15
    mantissa = wide & 7
    normal = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    magnitude = tl.where(exponent == 0, mantissa.to(tl.float32) * 0.001953125, normal)
    return tl.where(wide >= 128, -magnitude, magnitude)


@triton.jit
def scales_units(
    scales, factors, rows, stride, k0, group, supers, last, last_super, tensor_scale, tensor_divisor,
    SCALES: tl.constexpr, DIVIDED: tl.constexpr,
):  # fmt: skip
    """Scales of the four units of a tile, float32 [rows, 4]: rounded as CodeTerm.effective_scales does."""
    if SCALES == "m4" or SCALES == "m8":
        stored = per_unit(scales, rows, stride, units(k0, supers, last_super))
    else:
        stored = per_unit(scales, rows, stride, units(k0, group, last))
    if SCALES == "e8m0":
        value = e8m0(stored)
    elif SCALES == "e4m3":
        value = e4m3(stored)
    else:
        value = stored.to(tl.float32)
    if SCALES == "m8":
        value = value * per_unit(factors, rows, stride, units(k0, group, last)).to(tl.float32)
    value = value * tensor_scale
    if DIVIDED:
        value = tl.div_rn(value, tensor_divisor)
    return value


@triton.jit
def offsets_units(
    offsets, offset_factors, rows, stride, k0, group, supers, last, last_super, SCALES: tl.constexpr
):
    if SCALES == "m8":
        value = per_unit(offsets, rows, stride, units(k0, supers, last_super)).to(tl.float32)
        value = value * per_unit(offset_factors, rows, stride, units(k0, group, last)).to(tl.float32)
    else:
        value = per_unit(offsets, rows, stride, units(k0, group, last)).to(tl.float32)
    return value


@triton.jit
def levels_tile(
    p0, p1, p2, levels, zeros, selectors, multipliers, first, step, rows, stride, k0, group, last,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BASE3: tl.constexpr, SIZE: tl.constexpr,
    LINEAR: tl.constexpr, ZEROS: tl.constexpr, SELECTED: tl.constexpr, MULTIPLIED: tl.constexpr,
):  # fmt: skip
    """(level - zero-point) * multiplier, [rows, 64], in the type of `levels`: float32 or int32."""
    codes = codes_tile(p0, p1, p2, rows, stride, k0, W0, W1, W2, BASE3)
    if LINEAR:
        values = first + step * codes.to(levels.dtype.element_ty)
    else:
        if SELECTED:
            table = per_unit(selectors, rows, stride, units(k0, group, last)).to(tl.int32)
            codes += spread(table) * SIZE
        values = tl.load(levels + codes)
    if ZEROS:
        values -= spread(per_unit(zeros, rows, stride, units(k0, group, last)).to(levels.dtype.element_ty))
    if MULTIPLIED:
        at = units(k0, group, last)
        word = per_unit(multipliers, rows, stride, at // 8)
        values *= spread((word >> (at % 8 * 4)[None, :] & 15).to(levels.dtype.element_ty))
    return values


@triton.jit
def weights_tile(
    p0, p1, p2, levels, scales, zeros, selectors, multipliers, factors, offsets, offset_factors,
    first, step, tensor_scale, tensor_divisor, rows, stride, k0, group, supers, last, last_super,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BASE3: tl.constexpr, SIZE: tl.constexpr,
    LINEAR: tl.constexpr, ZEROS: tl.constexpr, SELECTED: tl.constexpr, SCALES: tl.constexpr,
    DIVIDED: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """Weights float32 [rows, 64] as CodeTerm.dequantize rounds them; SCALES "m4" means multipliers."""
    values = levels_tile(
        p0, p1, p2, levels, zeros, selectors, multipliers, first, step, rows, stride, k0, group, last,
        W0, W1, W2, BASE3, SIZE, LINEAR, ZEROS, SELECTED, SCALES == "m4",
    )  # fmt: skip
    scale = scales_units(
        scales, factors, rows, stride, k0, group, supers, last, last_super, tensor_scale, tensor_divisor,
        SCALES, DIVIDED,
    )  # fmt: skip
    values = values * spread(scale)
    if OFFSETS:
        values += spread(
            offsets_units(offsets, offset_factors, rows, stride, k0, group, supers, last, last_super, SCALES)
        )
    return values
