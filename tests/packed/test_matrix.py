"""PackedMatrix: what it means, what it weighs, and how it goes to a file and back."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lowbit.errors import CheckpointError, FormatError
from lowbit.formats import FORMATS, emulate
from lowbit.kernels import matmul
from lowbit.packed import (
    CodeTerm,
    FloatTerm,
    PackedMatrix,
    pack_codes,
    pack_groups,
    pack_values,
    planned_arrays,
)
from lowbit.quantize import round_to_nearest


def make_term(rng, out_features=33, in_features=96, bits=4, group_size=32, **changes):
    groups = in_features // group_size if group_size else 1
    term = CodeTerm(
        bits=bits,
        levels=rng.standard_normal((1, 1 << bits)).astype(np.float32),
        codes=pack_codes(rng.integers(0, 1 << bits, (out_features, in_features), dtype=np.uint8), bits),
        scales=pack_groups(rng.standard_normal((out_features, groups)).astype(np.float16)),
        scale_type="fp16",
        group_size=group_size,
    )
    return replace(term, **changes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantize_is_the_formula(bits, rng):
    codes = rng.integers(0, 1 << bits, (33, 96), dtype=np.uint8)
    levels = rng.standard_normal((1, 1 << bits)).astype(np.float32)
    scales, zeros = (
        rng.standard_normal((33, 3)).astype(np.float16),
        rng.integers(0, 9, (33, 3), dtype=np.uint8),
    )
    offsets = rng.standard_normal((33, 3)).astype(np.float32)
    term = CodeTerm(
        bits,
        levels,
        pack_codes(codes, bits),
        pack_groups(scales),
        "fp16",
        32,
        zero_points=pack_groups(zeros),
        offsets=pack_groups(offsets),
        tensor_scale=0.5,
    )
    expected = np.empty((33, 96), np.float32)
    for o, i in np.ndindex(33, 96):
        scale = np.float32(scales[o, i // 32]) * np.float32(0.5)
        level = levels[0, codes[o, i]] - np.float32(zeros[o, i // 32])
        expected[o, i] = level * scale + offsets[o, i // 32]
    np.testing.assert_array_equal(PackedMatrix(33, 96, (term,)).dequantize(), expected)


def test_terms_add_up(rng):
    first, second = make_term(rng), make_term(rng, bits=2)
    values = FloatTerm("fp32", pack_values(rng.standard_normal((33, 96)).astype(np.float32)))
    both = PackedMatrix(33, 96, (first, second, values))
    parts = [PackedMatrix(33, 96, (term,)).dequantize() for term in both.terms]
    np.testing.assert_array_equal(both.dequantize(), parts[0] + parts[1] + parts[2])


def test_floats_are_exact(rng):
    weight = rng.standard_normal((5, 7)).astype(np.float32)
    bits = (weight.view(np.uint32) >> 16).astype(np.uint16)
    matrix = PackedMatrix(5, 7, (FloatTerm("bf16", pack_values(bits)),))
    np.testing.assert_array_equal(matrix.dequantize(), (bits.astype(np.uint32) << 16).view(np.float32))
    half = PackedMatrix(5, 7, (FloatTerm("fp16", pack_values(weight.astype(np.float16))),))
    np.testing.assert_array_equal(half.dequantize(), weight.astype(np.float16).astype(np.float32))


def test_a_flipped_code_changes_one_weight(rng):
    term = make_term(rng)
    codes = term.codes.copy()
    codes[0, 1, 1, 9] ^= 0x10
    changed = PackedMatrix(33, 96, (replace(term, codes=codes),)).dequantize()
    assert (changed != PackedMatrix(33, 96, (term,)).dequantize()).sum() == 1


def test_true_bits_count_scales_tables_and_padding(rng):
    matrix = PackedMatrix(64, 96, (make_term(rng, out_features=64),))
    table_bits = 16 * 32
    assert matrix.bits_per_weight == pytest.approx(4 + 16 / 32 + table_bits / (64 * 96))
    padded = PackedMatrix(33, 96, (make_term(rng),))
    assert padded.nbytes == matrix.nbytes
    assert padded.bits_per_weight == pytest.approx(matrix.bits_per_weight * 64 / 33)


@pytest.mark.parametrize("name", FORMATS)
def test_state_round_trips_without_copies(name, rng):
    weight = emulate(rng.standard_normal((40, 128)).astype(np.float32), FORMATS["bf16"])
    matrix = round_to_nearest(weight, FORMATS[name])
    meta, arrays = matrix.state()
    again = PackedMatrix.from_state(json.loads(json.dumps(meta)), arrays)
    assert again.format_name == name and again.shape == matrix.shape
    np.testing.assert_array_equal(again.dequantize(), matrix.dequantize())
    for term, other in zip(matrix.terms, again.terms, strict=True):
        for (_, mine), (_, theirs) in zip(term.arrays(), other.arrays(), strict=True):
            assert np.shares_memory(mine, theirs)
    if FORMATS[name].coded:
        with pytest.raises(FormatError, match="known when they are coded"):
            planned_arrays(FORMATS[name], 40, 128)
        return
    planned = planned_arrays(FORMATS[name], 40, 128)
    assert {n: (np.dtype(d), s) for n, (d, s) in planned.items()} == {
        n: (a.dtype, a.shape) for n, a in arrays.items()
    }


@pytest.mark.parametrize("name", ["int4-g32", "int3a-g64", "bitmod4-g128", "bcq2-g128", "fp16"])
def test_permuted_rows_are_exact(name, rng):
    matrix = round_to_nearest(rng.standard_normal((45, 128)).astype(np.float32), FORMATS.get(name) or name)
    index = rng.permutation(45)
    np.testing.assert_array_equal(matrix.permute_rows(index).dequantize(), matrix.dequantize()[index])
    with pytest.raises(FormatError, match="not a permutation of 45 rows"):
        matrix.permute_rows(np.arange(44))


@pytest.mark.parametrize("name", ["int4-g32", "int3a-g64", "bitmod4-g128", "bcq2-g128", "fp16"])
def test_some_rows_of_a_matrix_are_exact(name, rng):
    matrix = round_to_nearest(rng.standard_normal((70, 128)).astype(np.float32), FORMATS.get(name) or name)
    whole = matrix.dequantize()
    index = rng.permutation(70)[:37]
    np.testing.assert_array_equal(matrix.take_rows(index).dequantize(), whole[index])
    part = matrix.take_rows(slice(33, 70))
    np.testing.assert_array_equal(part.dequantize(), whole[33:])
    x = rng.standard_normal((3, 128)).astype(np.float32)
    np.testing.assert_array_equal(matmul(x, part), matmul(x, matrix)[:, 33:])
    for bad in ([], [70], [-1], [3, 3], [0.5], [[1, 2]]):
        with pytest.raises(FormatError, match="take_rows: index"):
            matrix.take_rows(np.array(bad))


def broken_states(rng):
    meta, arrays = PackedMatrix(33, 96, (make_term(rng),), "x").state()

    def entry(**changes):
        return meta | {"terms": [meta["terms"][0] | changes]}

    without = {name: a for name, a in arrays.items() if name != "0.scales"}
    selectors = np.full_like(arrays["0.scales"], 4, np.uint8)
    tables = arrays | {"0.levels": np.zeros((4, 16), np.float32), "0.selectors": selectors}
    infinite = arrays | {"0.levels": np.full((1, 16), np.inf, np.float32)}
    return [
        (meta | {"shape": [33]}, arrays),
        (meta | {"shape": [33, -96]}, arrays),
        (meta | {"shape": [33, 1 << 40]}, arrays),
        (meta | {"shape": [33.0, 96]}, arrays),
        (meta | {"shape": [65, 96]}, arrays),
        (meta | {"format": 7}, arrays),
        (meta | {"terms": []}, {}),
        (meta | {"terms": 3}, arrays),
        (meta, arrays | {"1.codes": arrays["0.codes"]}),
        (meta, without),
        (meta, arrays | {"0.scales": arrays["0.scales"].astype(np.float32)}),
        (meta, tables),
        (meta, infinite),
        (entry(bits=9), arrays),
        (entry(bits=True), arrays),
        (entry(bits=5), arrays),
        (entry(scale_type="fp64"), arrays),
        (entry(scale_type=[]), arrays),
        (entry(group_size=0), arrays),
        (entry(group_size=24), arrays),
        (entry(tensor_scale=float("nan")), arrays),
        (entry(tensor_scale="1"), {**arrays, "0.levels": arrays["0.codes"]}),
        (entry(kind="words"), arrays),
        ({}, arrays),
        ({"shape": [33, 96], "terms": [None]}, arrays),
    ]


def test_damaged_states_are_refused(rng):
    for meta, arrays in broken_states(rng):
        with pytest.raises(CheckpointError, match="from_state"):
            PackedMatrix.from_state(meta, arrays)


def test_codes_beyond_the_table_are_refused():
    term = CodeTerm(
        2,
        np.array([[-1, 0, 1]], np.float32),
        pack_codes(np.full((32, 32), 3, np.uint8), 2),
        np.ones((1, 1, 32), np.float16),
        "fp16",
        0,
    )
    with pytest.raises(FormatError, match="code 3, but the table has 3 levels"):
        PackedMatrix(32, 32, (term,)).dequantize()


def test_wrong_pieces_are_refused(rng):
    with pytest.raises(FormatError, match="no terms"):
        PackedMatrix(33, 96, ())
    with pytest.raises(FormatError, match="in_features=96 is not a multiple of group_size=64"):
        PackedMatrix(33, 96, (replace(make_term(rng), group_size=64),))
    with pytest.raises(FormatError, match="codes are uint8"):
        PackedMatrix(65, 96, (make_term(rng),))
    with pytest.raises(FormatError, match="type 'fp8'"):
        PackedMatrix(2, 2, (FloatTerm("fp8", np.zeros((1, 2, 32), np.uint8)),))


def test_repr_says_what_it_is(rng):
    assert repr(PackedMatrix(33, 96, (make_term(rng),), "int4-g32")).startswith(
        "PackedMatrix(33 x 96, int4-g32"
    )
