"""Several matrices at once, and single rows: what a torch module asks of the native code."""

import numpy as np
import pytest

from lowbit import _native
from lowbit.formats import FORMATS
from lowbit.quantize import quantize_array, sparse, split_columns

INPUTS = 256


@pytest.fixture
def matrices(rng):
    return [
        quantize_array(rng.normal(size=(rows, INPUTS)).astype(np.float32), FORMATS[name])
        for rows, name in ((40, "int4-g64"), (33, "nf4-g64"), (7, "ternary"), (64, "bf16"))
    ]


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("tokens", [1, 2, 5, 70])
def test_a_group_is_its_matrices_side_by_side(rng, matrices, tokens, bits):
    x = rng.normal(size=(tokens, INPUTS)).astype(np.float32)
    together = _native.matmul_group(x, [m.native() for m in matrices], bits)
    apart = [_native.matmul(x, m.native(), bits) for m in matrices]
    np.testing.assert_array_equal(together, np.concatenate(apart, axis=1))


def test_matrices_that_leave_out_other_inputs_go_together(rng):
    x = rng.normal(size=(3, INPUTS)).astype(np.float32)
    weight = rng.normal(size=(40, INPUTS)).astype(np.float32)
    group = [
        split_columns(weight, FORMATS["int4-g64"], columns=np.array([1, 77])),
        quantize_array(weight, FORMATS["int4-g64"]),
        split_columns(weight, FORMATS["int3-g64"], columns=np.array([200])),
    ]
    together = _native.matmul_group(x, [m.native() for m in group])
    apart = [_native.matmul(x, m.native()) for m in group]
    np.testing.assert_array_equal(together, np.concatenate(apart, axis=1))


def test_a_group_is_checked(rng, matrices):
    x = np.zeros((1, INPUTS), np.float32)
    other = quantize_array(rng.normal(size=(8, 64)).astype(np.float32), FORMATS["int4-g64"])
    with pytest.raises(ValueError, match="in_features=64"):
        _native.matmul_group(x, [matrices[0].native(), other.native()])
    with pytest.raises(ValueError, match="at least one"):
        _native.matmul_group(x, [])
    with pytest.raises(ValueError, match="must be 8 or 16"):
        _native.matmul_group(x, [matrices[0].native()], 4)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_rows_are_those_of_the_whole(rng, name):
    format = FORMATS[name]
    weight = rng.normal(size=(45, INPUTS)).astype(np.float32)
    weight = (weight.view(np.uint32) & 0xFFFF0000).view(np.float32)  # bfloat16, which df11 asks for
    m = quantize_array(weight, format)
    rows = np.array([44, 0, 7, 7, 32], np.int64)
    np.testing.assert_array_equal(
        _native.dequantize_rows(m.native(), rows), _native.dequantize(m.native())[rows]
    )
    # Levels that are no multiples of one step are integers of 15 bits natively.
    whole = m.dequantize()
    found = _native.dequantize_rows(m.native(), rows)
    np.testing.assert_allclose(found, whole[rows], rtol=1e-5, atol=np.abs(whole).max() * 2**-14)


def test_rows_of_other_terms(rng):
    weight = rng.normal(size=(45, INPUTS)).astype(np.float32)
    rows = np.array([3, 40], np.int64)
    for m in (
        split_columns(weight, FORMATS["int4-g64"], columns=np.array([5])),
        sparse(weight, FORMATS["int4-g64"], density=0.5),
    ):
        got = _native.dequantize_rows(m.native(), rows)
        np.testing.assert_allclose(got, m.dequantize()[rows], rtol=1e-5, atol=1e-6)


def test_rows_out_of_range_are_refused(matrices):
    for bad in (-1, 40):
        with pytest.raises(IndexError, match="of a matrix of 40"):
            _native.dequantize_rows(matrices[0].native(), np.array([0, bad], np.int64))
    assert _native.dequantize_rows(matrices[0].native(), np.zeros(0, np.int64)).shape == (0, INPUTS)
