"""Matrices from GGUF blocks: exact, in any row order, and the native repacking equal to NumPy's."""

import numpy as np
import pytest

from lowbit.formats import parse_format
from lowbit.model import float_weights, gguf_matrix
from lowbit.model.gguf_matrix import code_arrays_reference, matrix_from_gguf
from lowbit.model.gguf_types import TENSOR_TYPES, decode

QUANTIZED = [kind for kind in TENSOR_TYPES.values() if kind.split is not None]
READABLE = [kind for kind in TENSOR_TYPES.values() if kind.readable]
SHAPES = ((1, 256), (37, 512), (64, 256), (70, 768))


def finite_blocks(rng, kind, rows, columns):
    """Random blocks whose fp16 scales are finite, so that values compare with ==."""
    if kind.float_type == "fp32":
        return rng.normal(size=rows * columns).astype("<f4").view(np.uint8)
    raw = rng.integers(0, 256, rows * columns // kind.block * kind.nbytes, dtype=np.uint8)
    if kind.float_type is not None:
        raw.view("<u2")[:] &= 0xBBFF if kind.float_type == "fp16" else 0xBFFF
        return raw
    with np.errstate(all="ignore"):
        bad = ~np.isfinite(decode(raw, kind)).reshape(-1, kind.block).all(axis=1)
    raw.reshape(-1, kind.nbytes)[bad] = 0
    return raw


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matrix_is_exact(kind, shape, rng):
    raw = finite_blocks(rng, kind, *shape)
    weights = decode(raw, kind).reshape(shape)
    np.testing.assert_array_equal(matrix_from_gguf(raw, kind, *shape).dequantize(), weights)
    order = rng.permutation(shape[0])
    matrix = matrix_from_gguf(raw, kind, *shape, order)
    np.testing.assert_array_equal(matrix.dequantize(), weights[order])
    moved = matrix_from_gguf(raw, kind, *shape).permute_rows(order)
    np.testing.assert_array_equal(moved.dequantize(), matrix.dequantize())


@pytest.mark.skipif(gguf_matrix._repack is None, reason="the native module is not built")
@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_repacking(kind, shape, rng):
    """Bytes of any kind, NaN and infinite scales included, end where NumPy puts them."""
    raw = rng.integers(0, 256, shape[0] * shape[1] // kind.block * kind.nbytes, dtype=np.uint8)
    for order in (None, rng.permutation(shape[0])):
        with np.errstate(all="ignore"):
            want = code_arrays_reference(raw, kind, *shape, order)
            got = gguf_matrix.code_arrays(raw, kind, *shape, order)
        np.testing.assert_array_equal(got.codes, want.codes)
        np.testing.assert_array_equal(got.scales, want.scales)
        assert (got.offsets is None) == (want.offsets is None)
        if want.offsets is not None:
            np.testing.assert_array_equal(got.offsets, want.offsets)


@pytest.mark.skipif(gguf_matrix._repack is None, reason="the native module is not built")
def test_native_arguments_are_checked(rng):
    from lowbit import _native

    kind, raw = TENSOR_TYPES[8], np.zeros(32 * 2 * 34, np.uint8)
    codes, scales = np.zeros((1, 2, 2, 512), np.uint8), np.zeros((1, 2, 32), np.float16)
    _native.repack(kind.number, raw, 32, 64, codes, scales)
    for arguments in (
        (77, raw, 32, 64, codes, scales),
        (8, raw[:-1], 32, 64, codes, scales),
        (8, raw, 32, 96, codes, scales),
        (8, raw, 32, 63, codes, scales),
        (8, raw, 0, 64, codes, scales),
        (8, raw, 2**60, 64, codes, scales),
        (8, raw, 32, 64, codes[:, :1], scales),
        (8, raw, 32, 64, codes, scales[:, :1]),
        (8, raw, 32, 64, codes, scales, scales),
        (8, raw, 32, 64, codes, scales, None, np.arange(31)),
        (8, raw, 32, 64, codes, scales, None, np.full(32, 32)),
        (8, raw, 32, 64, codes, scales, None, np.full(32, -1)),
    ):
        with pytest.raises((ValueError, TypeError)):
            _native.repack(*arguments)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_float_matrices(name, rng, monkeypatch):
    values = rng.integers(0, 2**14, (45, 70)).astype(float_weights.STORED[name])
    order = rng.permutation(45)
    fast = [float_weights.float_matrix(values, name, o).terms[0].values for o in (None, order)]
    monkeypatch.setattr(float_weights, "_transpose", None)
    slow = [float_weights.float_matrix(values, name, o).terms[0].values for o in (None, order)]
    for a, b in zip(fast, slow):
        np.testing.assert_array_equal(a, b)


def test_named_formats_are_the_catalogues(rng):
    """Where a matrix carries the name of a format, its levels are those of the format."""
    for kind in QUANTIZED:
        matrix = matrix_from_gguf(finite_blocks(rng, kind, 32, 256), kind, 32, 256)
        if not kind.has_offsets:
            format = parse_format(matrix.format_name)
            term = matrix.terms[0]
            assert tuple(term.levels[0].tolist()) == format.tables[0]
            assert (term.bits, term.group_size, term.scale_type) == (
                format.bits,
                format.group_size,
                format.scale_type,
            )
