"""m4 scales: bytes of the multipliers, what a term of them means, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lowbit.errors import CheckpointError, FormatError
from lowbit.formats import parse_format
from lowbit.formats.multipliers import largest_integer_level, super_size
from lowbit.kernels import matmul
from lowbit.kernels.reference import integer_products, integer_weights, matmul_reference
from lowbit.packed import (
    CodeTerm,
    PackedMatrix,
    pack_base3,
    pack_codes,
    pack_groups,
    pack_multipliers,
    unpack_multipliers,
)
from lowbit.quantize import round_to_nearest


def make_m4(rng, out_features=33, in_features=192, bits=4, group_size=16, super_size=64, **changes):
    supers = in_features // super_size if super_size else 1
    multipliers = rng.integers(0, 16, (out_features, in_features // group_size), dtype=np.uint8)
    half = 1 << (bits - 1)
    term = CodeTerm(
        bits=bits,
        levels=np.arange(-half, half, dtype=np.float32)[None],
        codes=pack_codes(rng.integers(0, 1 << bits, (out_features, in_features), dtype=np.uint8), bits),
        scales=pack_groups(rng.standard_normal((out_features, supers)).astype(np.float16)),
        scale_type="m4",
        group_size=group_size,
        multipliers=pack_multipliers(multipliers),
        super_size=super_size,
    )
    return replace(term, **changes)


def make_base3(rng, out_features=33, in_features=192, group_size=64, **changes):
    groups = in_features // group_size if group_size else 1
    term = CodeTerm(
        bits=2,
        levels=np.array([[-1, 0, 1]], np.float32),
        codes=pack_base3(rng.integers(0, 3, (out_features, in_features), dtype=np.uint8)),
        scales=pack_groups(rng.standard_normal((out_features, groups)).astype(np.float16)),
        scale_type="fp16",
        group_size=group_size,
        packing="base3",
    )
    return replace(term, **changes)


@pytest.mark.parametrize("rows", [1, 16, 17, 32, 33, 50])
def test_multipliers_round_trip(rows, rng):
    values = rng.integers(0, 16, (rows, 5), dtype=np.uint8)
    packed = pack_multipliers(values)
    assert packed.shape == (-(-rows // 32), 5, 16)
    np.testing.assert_array_equal(unpack_multipliers(packed, rows), values)
    padded = unpack_multipliers(packed, 32 * len(packed))
    assert not padded[rows:].any()


def test_the_nibbles_of_multipliers():
    values = np.zeros((40, 3), np.uint8)
    values[5, 1], values[21, 1], values[35, 2] = 7, 9, 15
    packed = pack_multipliers(values)
    assert packed[0, 1, 5] == 7 | 9 << 4 and packed[1, 2, 3] == 15
    with pytest.raises(FormatError, match="up to 16; give uint8, 0 to 15"):
        pack_multipliers(np.full((1, 1), 16, np.uint8))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_product_of_a_multiplier_and_a_level(bits):
    """Row m has multiplier m everywhere; all products are exact and fit a signed byte."""
    codes = np.tile(np.arange(1 << bits, dtype=np.uint8), (16, 64 >> bits))
    multipliers = np.repeat(np.arange(16, dtype=np.uint8)[:, None], 4, axis=1)
    half = 1 << (bits - 1)
    levels = np.arange(-half, half, dtype=np.float32)[None] if bits > 1 else np.array([[-1, 1]], np.float32)
    term = CodeTerm(
        bits=bits,
        levels=levels,
        codes=pack_codes(codes, bits),
        scales=pack_groups(np.full((16, 1), 0.125, np.float16)),
        scale_type="m4",
        group_size=16,
        multipliers=pack_multipliers(multipliers),
        super_size=64,
    )
    weights, unit = integer_weights(term, 16, 64)
    expected = np.arange(16)[:, None] * levels[0].astype(int)[codes]
    np.testing.assert_array_equal(weights, expected)
    assert unit == 1.0 and np.abs(weights).max() <= 127
    np.testing.assert_array_equal(PackedMatrix(16, 64, (term,)).dequantize(), expected * 0.125)


@pytest.mark.parametrize("group_size, super_size", [(16, 64), (32, 192), (48, 192), (16, 0)])
def test_dequantize_is_the_formula(group_size, super_size, rng):
    term = make_m4(rng, group_size=group_size, super_size=super_size, tensor_scale=0.5)
    codes = term.unpack(33, 192)
    multipliers = unpack_multipliers(term.multipliers, 33)
    expected = np.empty((33, 192), np.float32)
    for o, i in np.ndindex(33, 192):
        scale = np.float32(term.scales[o // 32, i // (super_size or 192), o % 32]) * np.float32(0.5)
        expected[o, i] = scale * np.float32(int(multipliers[o, i // group_size]) * (int(codes[o, i]) - 8))
    np.testing.assert_array_equal(PackedMatrix(33, 192, (term,)).dequantize(), expected)


def test_integers_as_activations_give_integer_sums(rng):
    term = make_m4(rng, super_size=192, scales=pack_groups(np.ones((33, 1), np.float16)))
    a = rng.integers(-127, 128, (2, 192))
    a[:, ::64] = 127
    weights, _ = integer_weights(term, 33, 192)
    assert integer_products(a.astype(np.int32), weights, term.scale_size).shape[0] == 3
    product = matmul_reference(a.astype(np.float32), PackedMatrix(33, 192, (term,)), 8)
    np.testing.assert_array_equal(product, a @ weights.T)


@pytest.mark.parametrize("make", [make_m4, make_base3])
def test_state_round_trips_and_rows_permute(make, rng):
    matrix = PackedMatrix(33, 192, (make(rng), make(rng)))
    meta, arrays = matrix.state()
    again = PackedMatrix.from_state(json.loads(json.dumps(meta)), arrays)
    assert again.terms[0].meta() == matrix.terms[0].meta()
    np.testing.assert_array_equal(again.dequantize(), matrix.dequantize())
    index = rng.permutation(33)
    np.testing.assert_array_equal(matrix.permute_rows(index).dequantize(), matrix.dequantize()[index])
    np.testing.assert_array_equal(
        matrix_without_quantization(matrix, rng), matrix_without_quantization(again, rng)
    )


def matrix_without_quantization(matrix, rng):
    x = np.linspace(-1, 1, 2 * matrix.in_features, dtype=np.float32).reshape(2, -1)
    return matmul_reference(x, matrix, 8)


def test_bits_per_weight_count_nibbles_and_digits(rng):
    m4 = PackedMatrix(64, 192, (make_m4(rng, out_features=64),))
    table = 16 * 32 / (64 * 192)
    assert m4.bits_per_weight == pytest.approx(4 + 4 / 16 + 16 / 64 + table)
    ternary = PackedMatrix(64, 320, (make_base3(rng, 64, 320, 0),))
    assert ternary.bits_per_weight == pytest.approx(1.6 + 16 / 320 + 3 * 32 / (64 * 320))


def test_old_readers_see_keys_they_do_not_know(rng):
    """Plain terms are described as ever; only the new ones have new keys or a new scale type."""
    plain = make_m4(rng, scale_type="fp16", multipliers=None, super_size=0, group_size=64)
    assert set(plain.meta()) == {"bits", "scale_type", "group_size", "tensor_scale"}
    assert make_base3(rng).meta()["packing"] == "base3" and make_m4(rng).meta()["scale_type"] == "m4"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scale_type": "fp16"}, "'fp16' and multipliers present"),
        ({"multipliers": None, "super_size": 0}, "'m4' and multipliers absent"),
        ({"super_size": 32}, "super_size=32"),
        ({"super_size": 128}, "super_size=128"),
        ({"super_size": -64}, "super_size=-64"),
        ({"super_size": 192}, r"scales are float16 \[2, 3, 32\]"),
        ({"group_size": 0}, "m4 scales of whole rows"),
        ({"group_size": 32}, r"multipliers are uint8 \[2, 12, 16\]"),
        ({"zero_points": np.zeros((2, 3, 32), np.uint8)}, "m4 scales with zero_points"),
        ({"offsets": np.zeros((2, 3, 32), np.float16)}, "m4 scales with offsets"),
        ({"levels": np.arange(-9, 7, dtype=np.float32)[None]}, "integer level of 9; times 15"),
        ({"levels": np.array([[0.3, 1, 2]], np.float32)}, "integer level of"),
        ({"packing": "base4"}, "packing 'base4'"),
        ({"packing": "base3"}, "base3 packing with bits=4"),
    ],
)
def test_m4_terms_that_do_not_fit_are_refused(changes, message, rng):
    with pytest.raises(FormatError, match=message):
        PackedMatrix(33, 192, (replace(make_m4(rng), **changes),))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": 3}, "base3 packing with bits=3"),
        ({"levels": np.zeros((1, 4), np.float32)}, r"levels \[1, 4\]"),
        ({"group_size": 48}, "base3 packing with group_size=48"),
        ({"codes": np.zeros((2, 6, 2, 128), np.uint8)}, r"codes are uint8 \[2, 6, 2, 128\]"),
        ({"super_size": 64}, "super_size=64 with fp16 scales"),
        ({"zero_points": np.zeros((2, 3, 32), np.uint8)}, "base3 packing with zero_points"),
    ],
)
def test_base3_terms_that_do_not_fit_are_refused(changes, message, rng):
    with pytest.raises(FormatError, match=message):
        PackedMatrix(33, 192, (replace(make_base3(rng), **changes),))


def test_ternary_files_with_two_bit_codes_load_as_before(rng):
    """What was written before base 3: an entry without `packing`, codes in a plane of two bits."""
    matrix = round_to_nearest(rng.standard_normal((33, 192)).astype(np.float32), parse_format("ternary-g64"))
    term = matrix.terms[0]
    assert term.packing == "base3"
    meta, arrays = matrix.state()
    del meta["terms"][0]["packing"]
    arrays["0.codes"] = pack_codes(term.unpack(33, 192), 2)
    old = PackedMatrix.from_state(json.loads(json.dumps(meta)), arrays)
    assert old.terms[0].packing == "planes" and old.nbytes > matrix.nbytes
    np.testing.assert_array_equal(old.dequantize(), matrix.dequantize())
    x = rng.standard_normal((3, 192)).astype(np.float32)
    np.testing.assert_array_equal(matmul(x, old), matmul(x, matrix))


def test_damaged_base3_codes_do_not_decode(rng):
    term = make_base3(rng)
    codes = term.codes.copy()
    codes[0, 0, 0, 0] = 250
    with pytest.raises(FormatError, match="code 3, but the table has 3 levels"):
        PackedMatrix(33, 192, (replace(term, codes=codes),)).dequantize()


@pytest.mark.parametrize(
    "change", [{"super_size": "64"}, {"super_size": 1e99}, {"packing": 3}, {"packing": None}]
)
def test_hostile_descriptions_are_refused(change, rng):
    meta, arrays = PackedMatrix(33, 192, (make_m4(rng),)).state()
    meta["terms"][0] |= change
    with pytest.raises(CheckpointError):
        PackedMatrix.from_state(meta, arrays)


@pytest.mark.parametrize(
    "in_features, group_size, expected",
    [
        (576, 16, 192),
        (1536, 32, 256),
        (960, 16, 192),
        (2048, 16, 256),
        (96, 16, 0),
        (576, 48, 192),
        (64, 16, 64),
    ],
)
def test_super_groups_are_the_largest_that_fit(in_features, group_size, expected):
    assert super_size(in_features, group_size) == expected


def test_largest_integer_level():
    assert largest_integer_level([range(-8, 8)]) == 8
    assert largest_integer_level([[-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3]]) == 6
    assert largest_integer_level([[256, -512, 1024]]) == 4
    assert largest_integer_level([[0.1, 0.2]]) > 1e6
