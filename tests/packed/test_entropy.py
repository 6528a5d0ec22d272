"""Lossless coding of bfloat16: every pattern survives, damaged arrays are refused."""

import numpy as np
import pytest

from lowbit.errors import CheckpointError, FormatError
from lowbit.packed import EntropyTerm, PackedMatrix
from lowbit.packed.entropy import TAIL, decode, decode_reference, encode, encode_reference

SHAPES = [(1, 1), (32, 4), (33, 7), (40, 130), (70, 64), (300, 5)]


def normal(rng, shape):
    """Bits of weights as a model has them."""
    return (rng.normal(size=shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def patterns(rng):
    for shape in SHAPES:
        yield normal(rng, shape)
        yield rng.integers(0, 1 << 16, shape, dtype=np.uint16)  # any bits: most exponents are rare
        yield np.full(shape, 0x8000, np.uint16)  # -0, and a table of one exponent
    yield np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)  # infinities, NaN with payload, subnormals
    mixed = normal(rng, (96, 128))
    mixed[32:64] = 0x7F80  # a block of escapes only
    mixed[64:, ::9] = rng.integers(0, 1 << 16, mixed[64:, ::9].shape)
    yield mixed


def test_every_pattern_survives(rng):
    for values in patterns(rng):
        np.testing.assert_array_equal(decode_reference(*encode_reference(values), *values.shape), values)
        np.testing.assert_array_equal(decode(encode(values), *values.shape), values)


def test_native_coding_equals_the_reference(rng):
    pytest.importorskip("lowbit._native")
    for values in patterns(rng):
        for found, expected in zip(encode(values), encode_reference(values), strict=True):
            np.testing.assert_array_equal(found, expected)
            assert found.dtype == expected.dtype


def test_dequantize_is_exact_and_small(rng):
    values = normal(rng, (256, 1024))
    matrix = PackedMatrix(256, 1024, (EntropyTerm.of(values),), "df11")
    np.testing.assert_array_equal(matrix.dequantize().view(np.uint32), values.astype(np.uint32) << 16)
    assert 11.0 < matrix.bits_per_weight <= 11.2


def test_state_and_permutation(rng):
    values = normal(rng, (70, 36))
    matrix = PackedMatrix(70, 36, (EntropyTerm.of(values),), "df11")
    meta, arrays = matrix.state()
    assert meta["terms"] == [{"kind": "entropy", "type": "bf16"}]
    again = PackedMatrix.from_state(meta, arrays)
    np.testing.assert_array_equal(again.dequantize(), matrix.dequantize())
    index = rng.permutation(70)
    np.testing.assert_array_equal(matrix.permute_rows(index).dequantize(), matrix.dequantize()[index])
    np.testing.assert_array_equal(matrix.take_rows(index[:9]).dequantize(), matrix.dequantize()[index[:9]])
    meta["terms"] = [{"kind": "entropy", "type": "fp16"}]
    with pytest.raises(CheckpointError, match="fp16"):
        PackedMatrix.from_state(meta, arrays)


def test_numbers_that_are_not_finite_are_shown(rng):
    values = normal(rng, (70, 36))
    assert not list(EntropyTerm.of(values).numbers())
    for change in (slice(None), slice(0, 1)):  # 255 is a frequent exponent, or a rare one
        values = rng.integers(0, 0x7F80, (70, 36), dtype=np.uint16)
        values[50, change] = 0xFF80
        ((_, kind, shown),) = EntropyTerm.of(values).numbers()
        assert kind == "bf16" and shown.shape[0] == 3
        assert np.flatnonzero(((shown & 0x7F80) == 0x7F80).any(axis=1))[0] == 1  # row 50 is in block 1


def test_wrong_shapes_are_refused(rng):
    codes, escapes, offsets, exponents = encode(normal(rng, (70, 36)))
    for damaged in (
        (codes[:, :-1], escapes, offsets, exponents),
        (codes, escapes[: TAIL - 1], offsets, exponents),
        (codes, escapes, offsets[:-1], exponents),
        (codes, escapes, offsets.astype(np.int64), exponents),
        (codes, escapes, offsets, exponents[:-1]),
    ):
        with pytest.raises(FormatError):
            PackedMatrix(70, 36, (EntropyTerm(*damaged),))


def damages(rng, arrays):
    """Copies of the arrays with one thing wrong in the codes, the offsets or the length of the escapes."""
    for _ in range(60):
        codes, escapes, offsets, exponents = (a.copy() for a in arrays)
        what = rng.integers(4)
        if what == 0:
            offsets[rng.integers(len(offsets))] ^= np.uint32(1) << np.uint32(rng.integers(32))
        elif what == 1:
            escapes = escapes[: -int(rng.integers(1, len(escapes)))]
        elif what == 2:
            escapes = np.concatenate([escapes, np.zeros(rng.integers(1, 9), np.uint8)])
        else:  # plane bytes of a few records become all escapes
            codes.reshape(-1, codes.shape[-1])[rng.integers(codes.shape[1]), :48] = 255
        yield codes, escapes, offsets, exponents


def test_damaged_streams_are_refused_before_use(rng):
    values = normal(rng, (70, 36))
    arrays = encode(values)
    for damaged in damages(rng, arrays):
        with pytest.raises((FormatError, ValueError)):
            decode(damaged, 70, 36)
        with pytest.raises(ValueError):
            decode_reference(*damaged, 70, 36)
        with pytest.raises(FormatError):
            PackedMatrix(70, 36, (EntropyTerm(*damaged),)).native()


def test_random_bytes_are_refused_or_decoded_alike(rng):
    """Whatever the streams hold, both decoders agree; nothing is read outside the arrays."""
    values = normal(rng, (33, 12))
    agreed = 0
    for _ in range(300):
        codes, escapes, offsets, exponents = (a.copy() for a in encode(values))
        for array in (codes, escapes[:-TAIL], exponents):
            if len(array) and rng.integers(2):
                flat = array.reshape(-1)
                flat[rng.integers(flat.size, size=2)] = rng.integers(0, 256, 2)
        damaged = codes, escapes, offsets, exponents
        try:
            expected = decode_reference(*damaged, *values.shape)
        except ValueError:
            with pytest.raises(FormatError):
                decode(damaged, *values.shape)
            continue
        agreed += 1
        np.testing.assert_array_equal(decode(damaged, *values.shape), expected)
    assert agreed > 30
