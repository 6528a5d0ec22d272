"""The Triton kernels: products of floats, products of integers or FP8 by segments, lookups of rows, entries.

Y^T = W X^T: 64 rows of weights fill the wide operand of a tensor core, 16 to 64 tokens the narrow one. Inputs
are walked 64 at a time, in order, and cut into a number of splits that depends on the shape of the matrix
alone. Few tokens: a program for each split, whose partial sums `reduce` adds in order. Many tokens: one
program walks all splits and adds their sums in the same order. So a row's result is the same bits in both,
however many rows come with it.
"""

import triton
import triton.language as tl

from lowbit.kernels.triton.tile import levels_tile, offsets_units, scales_units, weights_tile


@triton.jit
def activations_tile(x, tokens, n_tokens, k, n_inputs):
    """x^T [64, tokens], zero outside."""
    inside = (k < n_inputs)[:, None] & (tokens < n_tokens)[None, :]
    return tl.load(x + tokens[None, :].to(tl.int64) * n_inputs + k[:, None], mask=inside, other=0)


@triton.jit
def float_dot(w, a, sums, WIDE: tl.constexpr):
    """sums + w @ a.

    WIDE, for the interpreter: products in float32, added in order. Its own `dot` multiplies the bits of
    bfloat16, and the BLAS behind it adds in an order that depends on a token's place in the tile.
    """
    if WIDE:
        sums += tl.sum(w.to(tl.float32)[:, :, None] * a.to(tl.float32)[None, :, :], axis=1)
    else:
        sums = tl.dot(w, a, sums, input_precision="ieee")
    return sums


@triton.jit
def store_tile(y, sums, tokens, n_tokens, rows, n_rows):
    """sums [rows, tokens] into y [tokens, rows]."""
    inside = (rows < n_rows)[:, None] & (tokens < n_tokens)[None, :]
    tl.store(y + tokens[None, :].to(tl.int64) * n_rows + rows[:, None], sums, mask=inside)


@triton.jit
def codes_product(
    x, y, p0, p1, p2, levels, scales, zeros, selectors, multipliers, factors, offsets, offset_factors,
    n_tokens, n_rows, n_inputs, stride, group, supers, last, last_super, blocks_per_split, n_splits,
    first, step, tensor_scale, tensor_divisor,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BASE3: tl.constexpr, SIZE: tl.constexpr,
    LINEAR: tl.constexpr, ZEROS: tl.constexpr, SELECTED: tl.constexpr, SCALES: tl.constexpr,
    DIVIDED: tl.constexpr, OFFSETS: tl.constexpr, TOKENS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Float activations times decoded weights, rounded to the type of x; y float32 [splits, tokens, rows].

    A program with grid z = split when that axis has more than one program, else it adds all splits up.
    """
    rows = tl.program_id(0) * 64 + tl.arange(0, 64)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    n_blocks = tl.cdiv(n_inputs, 64)
    begin = tl.program_id(2)
    end = begin + 1
    if tl.num_programs(2) == 1:
        end = n_splits
    total = tl.zeros((64, TOKENS), tl.float32)
    for split in range(begin, end):
        sums = tl.zeros((64, TOKENS), tl.float32)
        for block in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, n_blocks)):
            k0 = block * 64
            w = weights_tile(
                p0, p1, p2, levels, scales, zeros, selectors, multipliers, factors, offsets, offset_factors,
                first, step, tensor_scale, tensor_divisor, rows, stride, k0, group, supers, last, last_super,
                W0, W1, W2, BASE3, SIZE, LINEAR, ZEROS, SELECTED, SCALES, DIVIDED, OFFSETS,
            )  # fmt: skip
            a = activations_tile(x, tokens, n_tokens, k0 + tl.arange(0, 64), n_inputs)
            sums = float_dot(w.to(a.dtype), a, sums, WIDE)
        total += sums
    store_tile(y + begin.to(tl.int64) * n_tokens * n_rows, total, tokens, n_tokens, rows, n_rows)


@triton.jit
def floats_product(
    x, y, weights, n_tokens, n_rows, n_inputs, stride, blocks_per_split, n_splits, TOKENS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The same for weights of plain floats [inputs, stride]."""
    rows = tl.program_id(0) * 64 + tl.arange(0, 64)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    n_blocks = tl.cdiv(n_inputs, 64)
    begin = tl.program_id(2)
    end = begin + 1
    if tl.num_programs(2) == 1:
        end = n_splits
    total = tl.zeros((64, TOKENS), tl.float32)
    for split in range(begin, end):
        sums = tl.zeros((64, TOKENS), tl.float32)
        for block in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, n_blocks)):
            k = block * 64 + tl.arange(0, 64)
            inside = (k < n_inputs)[None, :]
            w = tl.load(weights + k[None, :].to(tl.int64) * stride + rows[:, None], mask=inside, other=0)
            a = activations_tile(x, tokens, n_tokens, k, n_inputs)
            sums = float_dot(w.to(a.dtype), a, sums, WIDE)
        total += sums
    store_tile(y + begin.to(tl.int64) * n_tokens * n_rows, total, tokens, n_tokens, rows, n_rows)


@triton.jit
def segments_product(
    x, x_scales, y, p0, p1, p2, levels, scales, zeros, selectors, multipliers, factors, offsets,
    offset_factors, n_tokens, n_rows, n_inputs, stride, group, supers, last, last_super, blocks_per_split,
    n_splits, first, step, tensor_scale, tensor_divisor, unit,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BASE3: tl.constexpr, SIZE: tl.constexpr,
    LINEAR: tl.constexpr, ZEROS: tl.constexpr, SELECTED: tl.constexpr, SCALES: tl.constexpr,
    DIVIDED: tl.constexpr, OFFSETS: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr,
    LIMBS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Activations of 8 bits, with a scale for 64 inputs, times levels of 8 bits; scales after each segment.

    x int8 with int32 levels (two int8 limbs where LIMBS is 2), summed exactly in int32; or x the
    bits of e4m3 (LIMBS 0) with float32 levels that e4m3 holds.
    PARTS: segments of a tile, which share weight scales.
    """
    rows = tl.program_id(0) * 64 + tl.arange(0, 64)
    tokens = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    n_blocks = tl.cdiv(n_inputs, 64)
    unit_of = tl.arange(0, 4)[None, :]
    part_of = tl.arange(0, 64) // (64 // PARTS)
    begin = tl.program_id(2)
    end = begin + 1
    if tl.num_programs(2) == 1:
        end = n_splits
    total = tl.zeros((64, TOKENS), tl.float32)
    for split in range(begin, end):
        sums = tl.zeros((64, TOKENS), tl.float32)
        for block in range(split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, n_blocks)):
            k0 = block * 64
            w = levels_tile(
                p0, p1, p2, levels, zeros, selectors, multipliers, first, step, rows, stride, k0, group, last,
                W0, W1, W2, BASE3, SIZE, LINEAR, ZEROS, SELECTED, SCALES == "m4",
            )  # fmt: skip
            scale = scales_units(
                scales, factors, rows, stride, k0, group, supers, last, last_super, tensor_scale,
                tensor_divisor, SCALES, DIVIDED,
            )  # fmt: skip
            a = activations_tile(x, tokens, n_tokens, k0 + tl.arange(0, 64), n_inputs)
            if LIMBS == 0:
                a = a.to(tl.float8e4nv, bitcast=True)
            at = tokens.to(tl.int64) * n_blocks + block
            a_scale = tl.load(x_scales + at, mask=tokens < n_tokens, other=0)
            for part in tl.static_range(PARTS):
                mine = w
                if PARTS > 1:
                    mine = tl.where(part_of[None, :] == part, w, 0)
                if LIMBS == 0:  # float8
                    products = float_dot(mine.to(tl.float8e4nv), a, tl.zeros((64, TOKENS), tl.float32), WIDE)
                elif LIMBS == 1:
                    products = tl.dot(mine.to(tl.int8), a).to(tl.float32)
                else:
                    high = (mine + 64) >> 7
                    low = mine - (high << 7)
                    wide = (tl.dot(high.to(tl.int8), a) << 7) + tl.dot(low.to(tl.int8), a)
                    products = wide.to(tl.float32)
                of_part = unit_of == part * (4 // PARTS)
                w_scale = tl.sum(tl.where(of_part, scale, 0.0), axis=1) * unit
                result = products * w_scale[:, None]
                if OFFSETS:
                    offset = offsets_units(
                        offsets, offset_factors, rows, stride, k0, group, supers, last, last_super, SCALES
                    )
                    seen = a.to(tl.float32)
                    if PARTS > 1:
                        seen = tl.where(part_of[:, None] == part, seen, 0.0)
                    of_rows = tl.sum(tl.where(of_part, offset, 0.0), axis=1)
                    result += of_rows[:, None] * tl.sum(seen, axis=0)[None, :]
                sums += result * a_scale[None, :]
        total += sums
    store_tile(y + begin.to(tl.int64) * n_tokens * n_rows, total, tokens, n_tokens, rows, n_rows)


@triton.jit
def reduce(partial, y, size, n_splits, BLOCK: tl.constexpr):
    """y[i] = partial[0, i] + partial[1, i] + .., in this order; y float32 [size]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(n_splits):
        total += tl.load(partial + split * size + at, mask=at < size, other=0)
    tl.store(y + at, total, mask=at < size)


@triton.jit
def entries_product(x, y, starts, columns, values, n_rows, n_inputs, longest, BLOCK: tl.constexpr):
    """y[t, r] = sum of the entries of row r times x[t], BLOCK at a time, in order; y float32."""
    row = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, longest, BLOCK):
        at = begin + first + tl.arange(0, BLOCK)
        column = tl.load(columns + at, mask=at < end, other=0)
        value = tl.load(values + at, mask=at < end, other=0).to(tl.float32)
        total += value * tl.load(x + token * n_inputs + column).to(tl.float32)
    tl.store(y + token * n_rows + row, tl.sum(total, axis=0))


@triton.jit
def codes_rows(
    chosen, y, p0, p1, p2, levels, scales, zeros, selectors, multipliers, factors, offsets, offset_factors,
    n_chosen, n_inputs, stride, group, supers, last, last_super, first, step, tensor_scale, tensor_divisor,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BASE3: tl.constexpr, SIZE: tl.constexpr,
    LINEAR: tl.constexpr, ZEROS: tl.constexpr, SELECTED: tl.constexpr, SCALES: tl.constexpr,
    DIVIDED: tl.constexpr, OFFSETS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Decoded rows: y float32 [chosen, inputs]; chosen int64."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.load(chosen + at, mask=at < n_chosen, other=0)
    k0 = tl.program_id(1) * 64
    w = weights_tile(
        p0, p1, p2, levels, scales, zeros, selectors, multipliers, factors, offsets, offset_factors,
        first, step, tensor_scale, tensor_divisor, rows, stride, k0, group, supers, last, last_super,
        W0, W1, W2, BASE3, SIZE, LINEAR, ZEROS, SELECTED, SCALES, DIVIDED, OFFSETS,
    )  # fmt: skip
    k = k0 + tl.arange(0, 64)
    inside = (at < n_chosen)[:, None] & (k < n_inputs)[None, :]
    tl.store(y + at[:, None].to(tl.int64) * n_inputs + k[None, :], w, mask=inside)
