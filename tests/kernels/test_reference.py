"""The NumPy reference of the product, held against plain arithmetic, and the power of its tolerance."""

from dataclasses import replace

import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats import FORMATS, emulate, parse_format
from lowbit.kernels.reference import (
    LARGEST,
    integer_levels,
    integer_products,
    integer_weights,
    matmul_reference,
    matmul_tolerance,
    quantize_activations,
    segments,
    split_limbs,
)
from lowbit.packed import CodeTerm, PackedMatrix, pack_codes, pack_groups
from lowbit.quantize import round_to_nearest


@pytest.mark.parametrize("bits", [8, 16])
def test_activations_round_to_nearest_per_group_of_64(bits, rng):
    x = rng.standard_normal((3, 150)).astype(np.float32)
    x[1, 64:128] = 0
    x[2, 3] = 1e-38
    integers, scales = quantize_activations(x, bits)
    assert scales.shape == (3, 3) and integers.shape == (3, 150)
    assert np.abs(integers).max() == LARGEST[bits]
    restored = integers * np.repeat(scales, 64, axis=1)[:, :150]
    assert (np.abs(restored - x) <= np.repeat(scales, 64, axis=1)[:, :150] * (0.5 + 1e-4 * bits)).all()
    assert not integers[1, 64:128].any() and scales[1, 1] == 0


def test_limbs_cover_every_integer():
    integers = np.arange(-LARGEST[16], LARGEST[16] + 1)
    high, low = split_limbs(integers)
    np.testing.assert_array_equal(128 * high.astype(int) + low, integers)
    assert low.min() == -64 and low.max() == 63 and np.abs(high.astype(int)).max() == 127


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.tables])
def test_integer_levels_are_the_levels(name):
    levels = np.array(FORMATS[name].tables, np.float32)
    integers, unit = integer_levels(levels)
    assert np.abs(integers).max() <= LARGEST[16]
    assert np.abs(integers * unit - levels).max() <= np.abs(levels).max() / 32512 * 1.001
    if name.startswith(("int", "tern", "e2m1", "mxfp4", "bitmod", "bfp")):
        np.testing.assert_array_equal(integers * unit, levels)


@pytest.mark.parametrize(
    "in_features, group, expected",
    [
        (128, 32, [(0, 32), (32, 64), (64, 96), (96, 128)]),
        (192, 96, [(0, 64), (64, 96), (96, 128), (128, 192)]),
        (100, 0, [(0, 64), (64, 100)]),
        (128, 128, [(0, 64), (64, 128)]),
    ],
)
def test_segments_are_intersections(in_features, group, expected):
    assert segments(in_features, group) == expected


@pytest.mark.parametrize("name", [*FORMATS, "int4-row", "int3a-g96"])
def test_without_quantized_activations_it_is_the_plain_product(name, rng):
    w, x = rng.standard_normal((20, 384)).astype(np.float32), rng.standard_normal((3, 384)).astype(np.float32)
    w = emulate(w, parse_format("bf16"))
    matrix = round_to_nearest(w, parse_format(name))
    plain = x.astype(np.float64) @ matrix.dequantize().astype(np.float64).T
    np.testing.assert_allclose(matmul_reference(x, matrix, None), plain, rtol=1e-12, atol=1e-5)
    peak = np.abs(x).max() * np.abs(matrix.dequantize()).sum(axis=1)
    assert (np.abs(matmul_reference(x, matrix, 16) - plain) <= peak / 16256 + 1e-3 * np.abs(w).max()).all()
    assert (np.abs(matmul_reference(x, matrix, 8) - plain) <= peak / 127).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_integers_as_activations_give_integer_sums(bits, rng):
    """With scales of 1 on both sides everything is exact: a plain integer product."""
    top = LARGEST[bits]
    a = rng.integers(-top, top + 1, (2, 192))
    a[:, ::64] = top
    codes = rng.integers(0, 16, (17, 192), dtype=np.uint8)
    zeros = rng.integers(0, 16, (17, 4), dtype=np.uint8)
    term = CodeTerm(
        bits=4,
        levels=np.arange(16, dtype=np.float32)[None],
        codes=pack_codes(codes, 4),
        scales=pack_groups(np.ones((17, 4), np.float16)),
        scale_type="fp16",
        group_size=48,
        zero_points=pack_groups(zeros),
    )
    matrix = PackedMatrix(17, 192, (term,))
    weights = codes.astype(np.int64) - np.repeat(zeros, 48, axis=1)
    found, unit = integer_weights(term, 17, 192)
    np.testing.assert_array_equal(found, weights)
    assert unit == 1.0
    integers, scales = quantize_activations(a.astype(np.float32), bits)
    np.testing.assert_array_equal(integers, a)
    assert (scales == 1).all()
    np.testing.assert_array_equal(integer_products(integers, found, 48).sum(axis=0), a @ weights.T)
    np.testing.assert_array_equal(matmul_reference(a.astype(np.float32), matrix, bits), a @ weights.T)


@pytest.mark.parametrize("name", ["int4-g32", "int3a-g64", "ternary", "nf4-g64", "bcq2-g128"])
@pytest.mark.parametrize("bits", [8, 16])
def test_the_tolerance_sees_zeros_a_flipped_code_and_swapped_nibbles(name, bits, rng):
    w, x = rng.standard_normal((20, 256)).astype(np.float32), rng.standard_normal((3, 256)).astype(np.float32)
    matrix = round_to_nearest(w, parse_format(name))
    right, tolerance = matmul_reference(x, matrix, bits), matmul_tolerance(x, matrix, bits)
    assert tolerance.max() < 1e-3 * np.abs(right).max()
    assert (np.abs(right) > tolerance).any(axis=None)

    def wrong(change):
        codes = matrix.terms[0].codes.copy()
        change(codes)
        terms = (replace(matrix.terms[0], codes=codes), *matrix.terms[1:])
        return np.abs(matmul_reference(x, PackedMatrix(*matrix.shape, terms), bits) - right) > tolerance

    def flip(codes):
        if name == "ternary":  # the last of five codes, 0 to 2, takes another value
            byte = int(codes[0, 0, 0, 0])
            codes[0, 0, 0, 0] = byte + 1 - 3 * (byte % 3 == 2) if byte >= 192 else (byte + 64) % 192
        else:
            codes[0, 0, 0, 0] ^= 1

    def swap(codes):
        codes[:] = 242 - codes if name == "ternary" else (codes >> 4) | (codes << 4)

    assert wrong(flip)[:, 0].any() and not wrong(flip)[:, 1:].any()
    assert wrong(swap).mean() > 0.5


def test_shapes_are_checked(rng):
    matrix = round_to_nearest(rng.standard_normal((20, 64)).astype(np.float32), parse_format("int4-g32"))
    with pytest.raises(FormatError, match=r"required \[tokens, 64\]"):
        matmul_reference(np.zeros((2, 65), np.float32), matrix)
    with pytest.raises(FormatError, match="activation_bits=4; use 8 or 16"):
        matmul_reference(np.zeros((2, 64), np.float32), matrix, 4)
