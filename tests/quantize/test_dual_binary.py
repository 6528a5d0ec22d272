"""Two planes of 0 and 1: what they can express, and that free scales do better than 2-bit integers."""

import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats import Format, parse_format
from lowbit.quantize import round_to_nearest
from lowbit.quantize.dual_binary import fit_dual
from lowbit.quantize.search import importance


def test_planes_reproduce_what_they_can_express(rng):
    scales = rng.standard_normal((2, 20, 1)).astype(np.float16).astype(np.float32)
    scales = np.stack([np.abs(scales[0]), -np.abs(scales[0]) * np.float32(0.5)])
    w = (rng.integers(0, 2, (2, 20, 128)) * scales).sum(axis=0).astype(np.float32)
    np.testing.assert_array_equal(round_to_nearest(w, Format.dual_binary(0)).dequantize(), w)


@pytest.mark.parametrize("scale_type", ["fp16", "fp32", "e4m3"])
def test_never_worse_than_the_integers_it_starts_from(scale_type, rng):
    w = (rng.standard_normal((64, 300)) + 0.3).astype(np.float32)
    _, scales = fit_dual(w, 2, scale_type)
    assert scales.shape == (2, 300)
    weight = np.ascontiguousarray(w.T)
    counts = importance(w).T
    errors = {
        name: (counts * np.square(weight - round_to_nearest(weight, parse_format(name)).dequantize())).sum()
        for name in (f"dual-row-{scale_type}", f"int2-row-{scale_type}")
    }
    dual, integers = errors.values()
    assert dual < 0.97 * integers


def test_stored_as_two_one_bit_terms(rng):
    matrix = round_to_nearest(rng.standard_normal((32, 128)).astype(np.float32), parse_format("dual-g64"))
    assert [term.bits for term in matrix.terms] == [1, 1]
    assert all(term.levels.tolist() == [[0.0, 1.0]] for term in matrix.terms)
    zeros = round_to_nearest(np.zeros((3, 64), np.float32), parse_format("dual-g64"))
    assert not zeros.dequantize().any()


def test_scales_need_a_sign():
    with pytest.raises(FormatError, match="e8m0 scales have no sign"):
        parse_format("dual-g64-e8m0")
    with pytest.raises(FormatError, match="one term"):
        parse_format("dual-g16-m4")
