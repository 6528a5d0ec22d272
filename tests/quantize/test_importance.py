"""Scales searched for the inputs seen: never worse by that, and the same where all inputs are alike."""

import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats import FORMATS, Format, parse_format
from lowbit.quantize.importance import round_by_importance
from lowbit.quantize.round_to_nearest import round_to_nearest

rng = np.random.default_rng(3)
WEIGHT = rng.standard_normal((40, 128)).astype(np.float32)
IMPORTANCE = np.exp(2 * rng.standard_normal(128))
NAMES = [name for name, fmt in FORMATS.items() if fmt.float_type is None]


def weighted(matrix):
    return float((np.square(matrix.dequantize() - WEIGHT) * IMPORTANCE).sum())


@pytest.mark.parametrize("name", NAMES)
def test_every_format_loses_less_by_importance(name):
    """Groups of many fine levels have little to gain; coarse scale types may stay as they are."""
    format = parse_format(name)
    found = round_by_importance(WEIGHT, format, IMPORTANCE)
    plain = round_to_nearest(WEIGHT, format)
    assert found.format_name == format.name and found.nbytes == plain.nbytes
    assert weighted(found) <= weighted(plain) * (1.001 if format.bits >= 6 else 1)
    if format.bits <= 4 and format.scale_type == "fp16" and name != "ternary":
        assert weighted(found) < 0.95 * weighted(plain)


@pytest.mark.parametrize(
    "name", ["int3-g64", "int4a-g32", "nf4-g64", "bitmod4-g64", "bcq2-g64", "int4-g16-m4"]
)
def test_equal_importance_is_the_usual_search(name):
    format = parse_format(name)
    found = round_by_importance(WEIGHT, format, np.full(128, 7.0), "mse")
    np.testing.assert_array_equal(found.dequantize(), round_to_nearest(WEIGHT, format).dequantize())


def test_scale_and_silence():
    """A factor on all does not matter, and inputs that are never used do not disturb."""
    format = parse_format("int3-g64")
    found = round_by_importance(WEIGHT, format, IMPORTANCE).dequantize()
    np.testing.assert_array_equal(
        round_by_importance(WEIGHT, format, IMPORTANCE * 2.0**90).dequantize(), found
    )
    silent = round_by_importance(WEIGHT, format, np.zeros(128)).dequantize()
    np.testing.assert_array_equal(silent, round_by_importance(WEIGHT, format, np.ones(128)).dequantize())


def test_tables_are_chosen_by_importance():
    """Of two tables, the one whose levels fit the weights that count."""
    format = Format("two", 1, ((-1.0, 1.0), (-1.0, 3.0)), 16, "fp16")
    weight = np.tile(np.array([-1.0, 1.0, 1.0, 3.0], np.float32), (1, 4))
    counts = np.tile([100.0, 0.01, 0.01, 100.0], 4)
    selectors = [
        round_by_importance(weight, format, c).terms[0].selectors[0, 0, 0] for c in (counts, 1 / counts)
    ]
    assert selectors == [1, 0]


@pytest.mark.parametrize(
    "format, importance, message",
    [
        ("bf16", np.ones(128), "floats"),
        ("int4-g64", np.ones(64), "needs \\[128\\]"),
        ("int4-g64", -np.ones(128), ">= 0"),
        ("int4-g96", np.ones(128), "96"),
    ],
)
def test_bad_input(format, importance, message):
    with pytest.raises(FormatError, match=message):
        round_by_importance(WEIGHT, parse_format(format), importance)
