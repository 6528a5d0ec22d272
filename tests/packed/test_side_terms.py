"""Sparse codes, outlier columns and entries, low rank: their meaning, their files, and damaged ones."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lowbit import _native
from lowbit.errors import CheckpointError, FormatError
from lowbit.packed import (
    NO_INPUT,
    CodeTerm,
    ColumnsTerm,
    EntriesTerm,
    GatheredTerm,
    LowRankTerm,
    PackedMatrix,
    RowsTerm,
    SparseTerm,
)
from lowbit.packed.layout import pack_codes, pack_groups

SHAPE = (45, 96)


def make_sparse(rng, bits=3, density=0.4, levels=None):
    levels = np.arange(1 << bits) - 2.0 if levels is None else levels
    levels = np.asarray(levels, np.float32).reshape(1, -1)
    codes = rng.integers(0, levels.size, SHAPE).astype(np.uint8)
    kept = rng.random(SHAPE) < density
    scales = rng.uniform(0.5, 2, (45, 3)).astype(np.float16)
    term = SparseTerm.from_codes(codes, kept, bits, levels, pack_groups(scales), "fp16", 32, 0.5)
    factors = np.repeat(scales.astype(np.float32) * np.float32(0.5), 32, axis=1)
    return term, np.where(kept, levels[0][codes] * factors, np.float32(0))


def make_columns(rng, exclude=False):
    values = rng.standard_normal((45, 3)).astype(np.float16)
    dense = np.zeros(SHAPE, np.float32)
    dense[:, [2, 50, 95]] = values
    return ColumnsTerm(np.array([2, 50, 95], np.uint32), pack_groups(values), exclude), dense


def make_entries(rng):
    places = rng.choice(45 * 96, 70, replace=False)
    values = rng.standard_normal(70).astype(np.float16)
    dense = np.zeros(SHAPE, np.float32)
    dense[places // 96, places % 96] = values
    return EntriesTerm.from_places(places // 96, places % 96, values, 45), dense


def make_low_rank(rng):
    u, v = (rng.integers(-8, 8, s).astype(np.float16) / 4 for s in ((45, 5), (5, 96)))
    return LowRankTerm(pack_groups(u), v), u.astype(np.float32) @ v.astype(np.float32)


def make_rows(rng):
    rows, dense = np.array([0, 7, 31, 32, 44], np.uint32), np.zeros(SHAPE, np.float32)
    codes = rng.integers(0, 16, (5, 96)).astype(np.uint8)
    scales = rng.uniform(0.5, 2, (5, 3)).astype(np.float16)
    levels = np.arange(16, dtype=np.float32) - 8
    dense[rows] = levels[codes] * np.repeat(scales.astype(np.float32), 32, axis=1)
    return RowsTerm(
        rows, CodeTerm(4, levels[None], pack_codes(codes, 4), pack_groups(scales), "fp16", 32)
    ), dense


def make_gathered(rng):
    inputs = np.full(128, NO_INPUT, np.uint32)
    inputs[rng.choice(128, 90, replace=False)] = rng.permutation(96)[:90]
    codes = rng.integers(0, 16, (45, 128), dtype=np.uint8)
    scales = rng.standard_normal((45, 4)).astype(np.float16)
    levels = np.arange(16, dtype=np.float32) - 8
    dense = np.zeros(SHAPE, np.float32)
    read = inputs != NO_INPUT
    dense[:, inputs[read]] = (levels[codes] * np.repeat(scales.astype(np.float32), 32, axis=1))[:, read]
    term = CodeTerm(4, levels[None], pack_codes(codes, 4), pack_groups(scales), "fp16", 32)
    return GatheredTerm(inputs, term), dense


MAKERS = {
    f.__name__: f for f in (make_sparse, make_columns, make_entries, make_low_rank, make_rows, make_gathered)
}


@pytest.mark.parametrize("maker", MAKERS)
def test_dequantize_state_and_permutation(maker, rng):
    term, expected = MAKERS[maker](rng)
    matrix = PackedMatrix(*SHAPE, (term,))
    np.testing.assert_array_equal(matrix.dequantize(), expected)
    meta, arrays = matrix.state()
    again = PackedMatrix.from_state(json.loads(json.dumps(meta)), arrays)
    np.testing.assert_array_equal(again.dequantize(), expected)
    assert again.nbytes == matrix.nbytes == sum(a.nbytes for a in arrays.values())
    index = rng.permutation(45)
    np.testing.assert_array_equal(matrix.permute_rows(index).dequantize(), expected[index])
    some = index[:20]
    np.testing.assert_array_equal(matrix.take_rows(some).dequantize(), expected[some])


@pytest.mark.parametrize("bits", range(1, 9))
def test_sparse_codes_of_every_width(bits, rng):
    levels = rng.standard_normal((1 << bits) - (bits == 8)).astype(np.float32)
    for density in (0.0, 0.3, 1.0):
        term, expected = make_sparse(rng, bits, density, levels)
        np.testing.assert_array_equal(term.dequantize(*SHAPE), expected)
        kept = round(8 * (term.codes.size - 64) / bits)
        assert abs(kept - (expected != 0).sum()) < 16


def test_excluding_columns_replace_the_codes_and_only_those(rng):
    sparse, dense = make_sparse(rng)
    low_rank, product = make_low_rank(rng)
    columns, values = make_columns(rng, exclude=True)
    matrix = PackedMatrix(*SHAPE, (sparse, low_rank, columns))
    dense[:, columns.columns] = 0
    np.testing.assert_array_equal(matrix.dequantize(), dense + product + values)
    with pytest.raises(FormatError, match="2 terms exclude"):
        PackedMatrix(*SHAPE, (sparse, columns, columns))


def damaged(rng):
    """(what, the changes of a term's arrays or description that must be refused)"""
    sparse, _ = make_sparse(rng)
    flipped = sparse.mask.copy()
    flipped.reshape(-1)[:9] ^= 1
    flipped.reshape(-1)[:9] |= 3
    yield "a mask with more bits than codes", sparse, {"mask": flipped}
    yield "codes cut off", sparse, {"codes": sparse.codes[:-1]}
    yield "codes without their tail", sparse, {"codes": sparse.codes[:-64]}
    yield "codes too long", sparse, {"codes": np.append(sparse.codes, sparse.codes)}
    yield "an empty mask", sparse, {"mask": np.zeros_like(sparse.mask)}
    yield "a mask of another shape", sparse, {"mask": sparse.mask[:1]}
    yield "two tables", sparse, {"levels": np.ones((2, 8), np.float32)}
    yield "too many levels", sparse, {"levels": np.ones((1, 9), np.float32)}
    yield "levels all zero", sparse, {"levels": np.zeros((1, 8), np.float32)}
    yield "an infinite level", sparse, {"levels": np.full((1, 8), np.inf, np.float32)}
    yield "scales of another shape", sparse, {"scales": sparse.scales[:, :1]}
    columns, _ = make_columns(rng)
    for what, bad in {
        "out of range": [2, 50, 96],
        "unsorted": [50, 2, 95],
        "twice": [2, 2, 95],
        "too few": [2, 50],
        "none": [],
        "huge": [2, 50, 2**32 - 1],
    }.items():
        yield f"columns {what}", columns, {"columns": np.array(bad, np.uint32)}
    yield "columns of another type", columns, {"columns": np.array([2, 50, 95], np.int64)}
    yield "columns in two dimensions", columns, {"columns": np.array([[2, 50, 95]], np.uint32)}
    yield "values of another type", columns, {"values": columns.values.astype(np.float32)}
    entries, _ = make_entries(rng)
    count = len(entries.rows)
    for what, bad in {
        "not from 0": [1, 40, count],
        "not to the end": [0, 40, count - 1],
        "falling": [0, count + 1, count],
        "too many": [0, 10, 40, count],
    }.items():
        yield f"starts {what}", entries, {"starts": np.array(bad, np.uint32)}
    out = entries.columns.copy()
    out[7] = 96
    yield "an entry's column out of range", entries, {"columns": out}
    yield "an entry's row out of its block", entries, {"rows": entries.rows + np.uint8(32)}
    yield "an entry in padding", entries, {"rows": np.full_like(entries.rows, 31)}
    yield "entries out of order", entries, {"columns": entries.columns[::-1].copy()}
    yield "rows too short", entries, {"rows": entries.rows[:-1]}
    low_rank, _ = make_low_rank(rng)
    yield "v of another width", low_rank, {"v": low_rank.v[:, :-1].copy()}
    yield "another rank", low_rank, {"v": low_rank.v[:-1]}
    yield "no rank", low_rank, {"v": low_rank.v[:0], "u": low_rank.u[:, :0]}
    rows, _ = make_rows(rng)
    for what, bad in {
        "out of range": [0, 7, 31, 32, 45],
        "unsorted": [0, 31, 7, 32, 44],
        "twice": [0, 7, 7, 32, 44],
        "none": [],
    }.items():
        yield f"rows {what}", rows, {"rows": np.array(bad, np.uint32)}
    yield "rows of another type", rows, {"rows": rows.rows.astype(np.int64)}
    gathered, _ = make_gathered(rng)
    beyond, twice = gathered.inputs.copy(), gathered.inputs.copy()
    beyond[np.flatnonzero(beyond == NO_INPUT)[0]] = 96
    twice[:2] = 5
    yield "inputs out of range", gathered, {"inputs": beyond}
    yield "an input twice", gathered, {"inputs": twice}
    yield "too few inputs", gathered, {"inputs": gathered.inputs[:-32].copy()}
    yield "inputs of another type", gathered, {"inputs": gathered.inputs.astype(np.int64)}
    yield "v flat", low_rank, {"v": low_rank.v.reshape(-1)}


def test_damaged_arrays_are_refused_before_any_product(rng):
    for what, term, changes in damaged(rng):
        with pytest.raises(FormatError):
            replace(term, **changes).check(*SHAPE)
        meta, arrays = PackedMatrix(*SHAPE, (term,)).state()
        arrays |= {f"0.{name}": array for name, array in changes.items()}
        with pytest.raises((CheckpointError, FormatError)):
            PackedMatrix.from_state(meta, arrays)
            pytest.fail(f"{what} was accepted")


def test_the_binding_refuses_by_itself_what_would_read_elsewhere(rng):
    memory_safe = ("order", "unsorted", "twice", "padding", "levels", "table", "type", "dimension", "flat")
    for what, term, changes in damaged(rng):
        if any(word in what for word in memory_safe):
            continue
        with pytest.raises((ValueError, TypeError)):
            replace(term, **changes).add_to(_native.Matrix(*SHAPE))
            pytest.fail(f"{what} was accepted")


def test_damaged_descriptions_are_refused(rng):
    for maker in MAKERS.values():
        meta, arrays = PackedMatrix(*SHAPE, (maker(rng)[0],)).state()
        for key, value in meta["terms"][0].items():
            for bad in (None, [], {}, "x", -1, 1e9):
                if value == bad:
                    continue
                entry = meta["terms"][0] | {key: bad}
                if key == "tensor_scale" and isinstance(bad, (int, float)):
                    continue
                with pytest.raises(CheckpointError):
                    PackedMatrix.from_state(meta | {"terms": [entry]}, arrays)
        for name in arrays:
            left = {n: a for n, a in arrays.items() if n != name}
            with pytest.raises(CheckpointError):
                PackedMatrix.from_state(meta, left)


def test_random_damage_is_refused_or_harmless(rng):
    """Whatever single bytes change, from_state raises our error or gives a matrix that multiplies."""
    x = rng.standard_normal((3, 96)).astype(np.float32)
    accepted = 0
    for maker in MAKERS.values():
        meta, arrays = PackedMatrix(*SHAPE, (maker(rng)[0],)).state()
        for _ in range(60):
            changed = {name: array.copy() for name, array in arrays.items()}
            array = changed[str(rng.choice(sorted(changed)))].reshape(-1).view(np.uint8)
            array[rng.integers(len(array))] ^= np.uint8(1 << rng.integers(8))
            try:
                matrix = PackedMatrix.from_state(meta, changed)
            except (CheckpointError, FormatError):
                continue
            accepted += 1
            for tokens in (1, 3):
                assert _native.matmul(x[:tokens], matrix.native()).shape == (tokens, 45)
    assert accepted


def test_gathered_codes_stand_without_other_codes(rng):
    gathered, _ = make_gathered(rng)
    for maker in (make_sparse, make_rows):
        with pytest.raises(FormatError, match="a gathered term has no other"):
            PackedMatrix(*SHAPE, (gathered, maker(rng)[0]))
    with pytest.raises(FormatError, match="nothing excludes"):
        PackedMatrix(*SHAPE, (gathered, make_columns(rng, exclude=True)[0]))
    native = _native.Matrix(*SHAPE)
    gathered.add_to(native)
    with pytest.raises(ValueError, match="without other codes"):
        gathered.add_to(native)


def test_a_divisor_divides_every_scale(rng):
    codes = rng.integers(0, 16, (45, 96), dtype=np.uint8)
    scales = rng.integers(1, 120, (45, 6), dtype=np.uint8)
    levels = np.arange(16, dtype=np.float32)[None]
    term = CodeTerm(4, levels, pack_codes(codes, 4), pack_groups(scales), "e4m3", 16, tensor_divisor=1234.5)
    matrix = PackedMatrix(*SHAPE, (term,))
    plain = replace(term, tensor_divisor=1.0).effective_scales(45)
    expected = levels[0][codes] * np.repeat(plain / np.float32(1234.5), 16, axis=1)
    np.testing.assert_array_equal(matrix.dequantize(), expected)
    again = PackedMatrix.from_state(
        *(json.loads(json.dumps(part)) if i == 0 else part for i, part in enumerate(matrix.state()))
    )
    np.testing.assert_array_equal(again.dequantize(), expected)
    np.testing.assert_allclose(_native.dequantize(matrix.native()), expected, rtol=3e-7)
    for bad in (0.0, np.inf, np.nan):
        with pytest.raises(FormatError, match="tensor_divisor"):
            PackedMatrix(*SHAPE, (replace(term, tensor_divisor=bad),))
