"""Sparse codes, outlier columns and entries, low rank, refined rows: native products against the reference,
on every instruction set, number of threads and batch size.
"""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from lowbit import _native
from lowbit.kernels import matmul
from lowbit.kernels.reference import matmul_reference, matmul_tolerance, quantize_activations
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

SHAPES = [
    (64, 128, 32),
    (33, 64, 64),
    (40, 96, 0),
    (100, 160, 16),
    (31, 192, 96),
    (1, 100, 0),
    (65, 528, 176),
]
BATCHES = [1, 2, 7, 33, 100]


def levels_of(bits, kind):
    count = 1 << bits
    if kind == "linear":
        levels = np.arange(count) - count // 2 if bits > 1 else np.array([-1, 1])
    elif kind == "positive":  # linear, without 0
        levels = 2.0 * np.arange(count - (bits == 8)) + 2
    elif kind == "bytes":
        levels = (np.arange(count - (bits == 8)) * 37 % 127 - 63) * 0.25
    else:  # reals that need two limbs
        levels = np.random.default_rng(bits).normal(size=count - (bits == 8))
    return np.asarray(levels, np.float32).reshape(1, -1)


def scales_of(rng, out_features, in_features, group_size):
    groups = in_features // group_size if group_size else 1
    return pack_groups(rng.uniform(0.5, 2, (out_features, groups)).astype(np.float16))


def codes_term(rng, bits, shape):
    out_features, in_features, group_size = shape
    codes = pack_codes(rng.integers(0, 1 << bits, (out_features, in_features), dtype=np.uint8), bits)
    return CodeTerm(bits, levels_of(bits, "linear"), codes, scales_of(rng, *shape), "fp16", group_size)


def sparse_term(rng, bits, shape, kind="linear", density=0.5):
    out_features, in_features, group_size = shape
    levels = levels_of(bits, kind)
    codes = rng.integers(0, levels.size, (out_features, in_features)).astype(np.uint8)
    if density == "2:4":
        kept = np.argsort(np.argsort(rng.random((out_features, in_features // 4, 4)))) < 2
        kept = kept.reshape(out_features, in_features)
    else:
        kept = rng.random((out_features, in_features)) < density
    scales = scales_of(rng, *shape)
    return SparseTerm.from_codes(codes, kept, bits, levels, scales, "fp16", group_size, 0.5)


def columns_term(rng, shape, count, exclude):
    columns = np.sort(rng.choice(shape[1], min(count, shape[1]), replace=False)).astype(np.uint32)
    values = pack_groups(rng.standard_normal((shape[0], len(columns))).astype(np.float16))
    return ColumnsTerm(columns, values, exclude)


def entries_term(rng, shape, count):
    places = rng.choice(shape[0] * shape[1], min(count, shape[0] * shape[1]), replace=False)
    values = rng.standard_normal(len(places)).astype(np.float16)
    return EntriesTerm.from_places(places // shape[1], places % shape[1], values, shape[0])


def low_rank_term(rng, shape, rank):
    u = pack_groups(rng.standard_normal((shape[0], rank)).astype(np.float16))
    return LowRankTerm(u, rng.standard_normal((rank, shape[1])).astype(np.float16))


def rows_term(rng, bits, shape, count):
    rows = np.sort(rng.choice(shape[0], min(count, shape[0]), replace=False)).astype(np.uint32)
    return RowsTerm(rows, codes_term(rng, bits, (len(rows), *shape[1:])))


def gathered_term(rng, bits, shape, holes=0):
    """All inputs in random order, in groups of 32 with `holes` places that read nothing."""
    count = -(-(shape[1] + holes) // 32) * 32
    inputs = np.full(count, NO_INPUT, np.uint32)
    inputs[rng.choice(count, shape[1], replace=False)] = rng.permutation(shape[1])
    return GatheredTerm(inputs, codes_term(rng, bits, (shape[0], count, 32)))


def cases():
    rng = np.random.default_rng(17)
    for shape in SHAPES:

        def matrix(*terms, shape=shape):
            return PackedMatrix(shape[0], shape[1], terms)

        for bits in range(1, 9):
            kind = ("linear", "positive", "bytes", "limbs")[(bits + shape[0]) % 4]
            yield f"sparse {bits} {kind} {shape}", matrix(sparse_term(rng, bits, shape, kind))
        for density in (0.0, 0.03, 0.97, 1.0, "2:4"):
            yield f"sparse {density} {shape}", matrix(sparse_term(rng, 4, shape, "linear", density))
        codes = codes_term(rng, 4, shape)
        yield f"excluded columns {shape}", matrix(codes, columns_term(rng, shape, 5, True))
        yield f"columns {shape}", matrix(codes, columns_term(rng, shape, 1, False))
        yield f"entries {shape}", matrix(codes, entries_term(rng, shape, 200))
        yield f"one entry {shape}", matrix(codes, entries_term(rng, shape, 1))
        yield f"low rank {shape}", matrix(codes, low_rank_term(rng, shape, 3))
        yield f"only low rank {shape}", matrix(low_rank_term(rng, shape, 18))
        yield f"rows {shape}", matrix(codes, rows_term(rng, 8, shape, 1))
        yield f"only rows {shape}", matrix(rows_term(rng, 1, shape, 35), rows_term(rng, 4, shape, 1 << 20))
        yield (
            f"rows, columns {shape}",
            matrix(codes, rows_term(rng, 4, shape, 9), columns_term(rng, shape, 4, True)),
        )
        for bits in (2, 3, 4, 8):
            yield f"gathered {bits} {shape}", matrix(gathered_term(rng, bits, shape, 40 * (bits == 3)))
        yield (
            f"gathered, columns, low rank {shape}",
            matrix(
                gathered_term(rng, 4, shape), columns_term(rng, shape, 4, False), low_rank_term(rng, shape, 2)
            ),
        )
        everything = (
            sparse_term(rng, 3, shape),
            codes,
            low_rank_term(rng, shape, 9),
            entries_term(rng, shape, 40),
            columns_term(rng, shape, 3, True),
            columns_term(rng, shape, 7, False),
            rows_term(rng, 5, shape, 12),
            low_rank_term(rng, shape, 1),
        )
        yield f"everything {shape}", matrix(*everything)


def inputs(matrix, tokens):
    rng = np.random.default_rng(tokens)
    x = rng.normal(size=(tokens, matrix.in_features)).astype(np.float32)
    x[:, :3] *= 50
    if matrix.excluded is not None:
        x[:, matrix.excluded] *= 100
    return x


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("tokens", BATCHES)
def test_equals_reference(tokens, activations):
    bits = 8 if activations == "int8" else 16
    for name, matrix in cases():
        x = inputs(matrix, tokens)
        difference = np.abs(matmul(x, matrix, activations) - matmul_reference(x, matrix, bits))
        assert (difference <= matmul_tolerance(x, matrix, bits) + 1e-30).all(), (name, difference.max())


def test_dequantize_equals_the_definition():
    for name, matrix in cases():
        expected = matrix.dequantize()
        found = _native.dequantize(matrix.native())
        slack = 1e-6 + 2e-4 * ("limbs" in name)  # two limbs are within peak / 32512
        np.testing.assert_allclose(found, expected, atol=slack * max(1, np.abs(expected).max()), err_msg=name)
        if "sparse" not in name or "limbs" in name:
            continue
        np.testing.assert_array_equal(found, expected, err_msg=name)


def digests():
    found = {}
    for name, matrix in cases():
        if matrix.in_features not in (64, 96, 528):
            continue
        digest = hashlib.sha256()
        for tokens in (1, 19):
            for activations in ("int8", "int16"):
                digest.update(matmul(inputs(matrix, tokens), matrix, activations).tobytes())
        found[name] = digest.hexdigest()
    return found


def test_a_token_does_not_see_its_neighbours():
    for name, matrix in cases():
        x = inputs(matrix, 33)
        whole = matmul(x, matrix)
        for count in (1, 18):
            np.testing.assert_array_equal(matmul(x[-count:], matrix), whole[-count:], err_msg=name)


def test_thread_count_does_not_matter():
    try:
        results = []
        for threads in (1, 2, 3):
            _native.set_threads(threads)
            results.append(digests())
        assert all(result == results[0] for result in results)
    finally:
        _native.set_threads(0)


def test_instruction_sets_agree_to_the_bit(same_on_every_isa):
    same_on_every_isa(__file__, digests())


def test_a_sparse_product_is_the_dense_one_to_the_bit(rng):
    """Integers are exact and the float steps are the same, so masks change nothing but the memory."""
    for shape in SHAPES:
        for bits, kind in ((4, "linear"), (3, "limbs"), (2, "bytes"), (1, "linear")):
            term = sparse_term(rng, bits, shape, kind)
            sparse = PackedMatrix(shape[0], shape[1], (term,))
            dense = PackedMatrix(shape[0], shape[1], (term.dense(shape[0], shape[1]),))
            for tokens in (1, 5):
                x = inputs(sparse, tokens)
                np.testing.assert_array_equal(matmul(x, sparse), matmul(x, dense))


def test_gathered_codes_multiply_what_ordered_codes_do_to_the_bit(rng):
    """Bringing inputs and columns into the same order changes nothing, for one matrix and for several at
    once."""
    shape = (65, 192, 32)
    term = gathered_term(rng, 4, shape)
    ordered = PackedMatrix(65, 192, (term.codes,))
    for tokens in (1, 5, 40):
        x = inputs(ordered, tokens)
        np.testing.assert_array_equal(
            matmul(x, PackedMatrix(65, 192, (term,))), matmul(term.gather(x), ordered)
        )
    others = [PackedMatrix(65, 192, (gathered_term(rng, 4, shape),)), PackedMatrix(65, 192, (term,)), ordered]
    group = (*others, others[1])
    together = _native.matmul_group(x, [m.native() for m in group])
    np.testing.assert_array_equal(together, np.concatenate([matmul(x, m) for m in group], axis=1))


def test_excluded_columns_do_not_widen_the_steps_of_others(rng):
    """LLM.int8(): with outliers a thousand times larger the other inputs keep all their 127 steps."""
    shape = (64, 128, 32)
    codes = codes_term(rng, 4, shape)
    outliers = columns_term(rng, shape, 2, True)
    x = rng.normal(size=(3, 128)).astype(np.float32)
    x[:, outliers.columns] *= 1000
    exact = PackedMatrix(64, 128, (codes, outliers))
    added = PackedMatrix(64, 128, (codes, replace(outliers, exclude=False)))
    kept = x.copy()
    kept[:, outliers.columns] = 0
    integers, scales = quantize_activations(kept, 8)
    rounded = (integers.reshape(3, 2, 64) * scales[:, :, None]).reshape(3, 128)
    expected = rounded.astype(np.float64) @ codes.dequantize(64, 128).T.astype(np.float64)
    expected += x.astype(np.float64) @ outliers.dequantize(64, 128).T
    assert np.abs(matmul(x, exact) - expected).max() < 1e-5 * np.abs(expected).max()
    error = np.abs(matmul(x, exact) - x @ exact.dequantize().T).max()
    worse = np.abs(matmul(x, added) - x @ added.dequantize().T).max()
    assert 30 * error < worse


def test_the_test_sees_changes(rng):
    shape = (64, 128, 32)
    terms = {
        "codes": sparse_term(rng, 4, shape),
        "mask": sparse_term(rng, 4, shape),
        "values": columns_term(rng, shape, 4, True),
        "columns": entries_term(rng, shape, 50),
        "u": low_rank_term(rng, shape, 4),
        "rows": rows_term(rng, 4, shape, 5),
        "inputs": gathered_term(rng, 4, shape),
    }
    for name, term in terms.items():
        matrix = PackedMatrix(64, 128, (term,))
        x = inputs(matrix, 3)
        expected, tolerance = matmul_reference(x, matrix, 8), matmul_tolerance(x, matrix, 8)
        assert (np.abs(expected) > tolerance).any(), name
        array = getattr(term, name).copy()
        flat = array.reshape(-1).view(np.uint8)
        if name == "mask":  # a bit moves to its neighbour: the number of codes stays
            place = next(i for i in range(len(flat)) if flat[i] & 3 == 1)
            flat[place] ^= 3
        elif name == "rows":
            array[-1] += 1 if array[-1] < 63 else 0
            array[0] -= 1 if array[0] > 0 and array[-1] == 63 else 0
        elif name == "columns":
            array[-1] = (array[-1] + 1) % 128
        elif name == "inputs":
            array[:2] = array[1::-1]
        else:
            flat[21] ^= 0x11
        changed = PackedMatrix(64, 128, (replace(term, **{name: array}),))
        assert (np.abs(matmul(x, changed) - expected) > tolerance).any(), name


if __name__ == "__main__":
    print(json.dumps({"isa": _native.isa(), **digests()}))
