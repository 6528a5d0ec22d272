"""Matrices from GGUF blocks: exact, in any row order, and the native repacking equal to NumPy's."""

import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats import parse_format
from lowbit.model import float_weights, gguf_matrix
from lowbit.model.gguf_matrix import as_stored, code_arrays_reference, matrix_from_gguf
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
    blocks = raw.reshape(-1, kind.nbytes)
    blocks[bad] = 0
    if kind.name in ("MXFP4", "NVFP4"):  # 255 is decoded, but is no number of the format
        scales = blocks[:, : 1 if kind.name == "MXFP4" else 4]
        scales[scales == 255] = 0
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
            stored = as_stored(raw, kind)
            want = code_arrays_reference(raw, stored, *shape, order)
            got = gguf_matrix.code_arrays(raw, stored, *shape, order)
        for name, wanted in want._asdict().items():
            found = getattr(got, name)
            assert (found is None) == (wanted is None), name
            if wanted is not None:
                assert found.dtype == wanted.dtype
                np.testing.assert_array_equal(found.view(np.uint8), wanted.view(np.uint8), err_msg=name)


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
        (8, raw, 32, 64, codes, scales, None, codes),
        (8, raw, 32, 64, codes, scales, None, None, codes),
        (8, raw, 32, 64, codes, scales, None, None, None, np.arange(31)),
        (8, raw, 32, 64, codes, scales, None, None, None, np.full(32, 32)),
        (8, raw, 32, 64, codes, scales, None, None, None, np.full(32, -1)),
        (8, raw, 32, 64, codes, scales, None, None, None, None, np.zeros((256, 8), np.uint8)),
        (8, raw, 32, 64, codes, scales, None, None, None, None, None, True),
    ):
        with pytest.raises((ValueError, TypeError)):
            _native.repack(*arguments)


@pytest.mark.skipif(gguf_matrix._repack is None, reason="the native module is not built")
def test_native_grids_are_checked():
    from lowbit import _native

    codes, factors = np.zeros((1, 8, 2, 192), np.uint8), np.zeros((1, 8, 32), np.int8)
    scales, raw = np.zeros((1, 1, 32), np.float16), np.zeros(32 * 66, np.uint8)
    good = np.zeros((256, 8), np.uint8)
    _native.repack(16, raw, 32, 256, codes, scales, None, factors, None, None, good)
    for grid in (None, good[1:], good[:, :7]):
        with pytest.raises((ValueError, TypeError)):
            _native.repack(16, raw, 32, 256, codes, scales, None, factors, None, None, grid)


def test_a_code_of_tq2_0_that_no_quantizer_writes(rng):
    """The level 2 does not fit base 3; such a tensor takes two bits and is still exact."""
    kind, raw = TENSOR_TYPES[35], np.zeros((32, 66), np.uint8)
    raw[:, 64:] = np.float16([0.5]).view(np.uint8)
    assert matrix_from_gguf(raw.reshape(-1), kind, 32, 256).terms[0].packing == "base3"
    raw[7, 9] = 0b11_10_01_00
    matrix = matrix_from_gguf(raw.reshape(-1), kind, 32, 256)
    assert matrix.terms[0].packing == "planes"
    assert matrix.dequantize()[7, 9:128:32].tolist() == [-0.5, 0, 0.5, 1]


@pytest.mark.parametrize("number", [39, 40])
def test_scales_that_are_no_numbers(number):
    """A scale byte of 255 is decoded as ggml does it; a matrix of it is found damaged."""
    kind = TENSOR_TYPES[number]
    raw = np.full(kind.nbytes * 8, 255, np.uint8)
    assert decode(raw, kind)[0] != 0
    matrix = matrix_from_gguf(raw, kind, 1, 8 * kind.block)
    assert (matrix.terms[0].scales[0, :, 0] == 255).all()
    with pytest.raises(FormatError, match="NaN"):
        matrix.dequantize()


def test_a_scale_of_the_tensor(rng):
    kind = TENSOR_TYPES[40]
    raw = finite_blocks(rng, kind, 32, 256)
    scaled = matrix_from_gguf(raw, kind, 32, 256, tensor_scale=0.25)
    plain = matrix_from_gguf(raw, kind, 32, 256)
    np.testing.assert_array_equal(scaled.dequantize(), plain.dequantize() * np.float32(0.25))


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
        raw = finite_blocks(rng, kind, 32, 256)
        if kind.name == "TQ2_0":
            raw.reshape(-1, 66)[:, :64] &= 0x55  # the codes that quantizers write
        matrix = matrix_from_gguf(raw, kind, 32, 256)
        if kind.name in gguf_matrix._FORMATS:
            format = parse_format(matrix.format_name)
            term = matrix.terms[0]
            assert tuple(term.levels[0].tolist()) == format.tables[0]
            assert (term.bits, term.group_size, term.scale_type) == (
                format.bits,
                format.group_size,
                format.scale_type,
            )
