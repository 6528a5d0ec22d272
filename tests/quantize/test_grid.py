"""Nearest levels: exhaustive over the formats' tables, ties, and the scale for normal weights."""

import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats import FORMATS, Format
from lowbit.quantize.grid import make_grid

TABLES = {
    f"{name}/{i}": table
    for name, format in FORMATS.items()
    for i, table in enumerate(format.tables)
    if format.float_type is None
}


@pytest.mark.parametrize("name", TABLES)
def test_nearest_is_nearest_and_ties_are_even(name):
    table = TABLES[name]
    grid = make_grid(table)
    unit = float(grid.step)
    levels = np.unique(np.array(table, np.float64))
    middles = (levels[1:] + levels[:-1]) / 2
    x = np.concatenate(
        [levels, middles, levels[[0, -1]] * 1.5, np.linspace(levels[0] - 1, levels[-1] + 1, 997)]
    )
    x = (x / unit).astype(np.float32)
    index = grid.nearest(x).astype(int)
    values = grid.value(grid.nearest(x)).astype(np.float64) * unit
    np.testing.assert_array_equal(values, grid.levels[index])
    wide = x.astype(np.float64) * unit
    distance = np.abs(wide[:, None] - levels)
    slack = 2.0**-22 * np.abs(levels).max()  # midpoints and x - first are rounded to float32
    assert (np.abs(wide - values) <= distance.min(axis=1) + slack).all()
    codes = grid.codes[index]
    np.testing.assert_array_equal(np.array(table, np.float32)[codes], grid.levels[index])
    exact = np.isin(wide, middles)
    if not grid.linear:  # in a linear table neighbours alternate, so this is rint's own rule
        lower = np.searchsorted(levels, wide[exact], side="right") - 1
        parity = grid.codes[np.stack([lower, lower + 1])] % 2
        expected = np.where(parity[0] > parity[1], lower + 1, lower)
        decided = parity[0] != parity[1]
        np.testing.assert_array_equal(index[exact][decided], expected[decided])


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_are_linear(bits):
    for mode in ("symmetric", "bipolar", "asymmetric"):
        grid = make_grid(Format.integer(bits, mode=mode).tables[0])
        assert grid.linear and len(grid.levels) == 2**bits
        assert grid.symmetric == (mode == "bipolar" or (bits == 1 and mode == "symmetric"))


@pytest.mark.parametrize("name", ["nf4-g64", "e2m1-g64", "shift4-g64", "e4m3fn-g64"])
def test_floats_and_codebooks_are_not_linear(name):
    assert not make_grid(FORMATS[name].tables[0]).linear


def test_uneven_tables_that_look_linear_are_tables():
    for table in ((0.0, 0.1, 0.2), (0.0, 3.0, 6.0), (1.0, 0.0, -1.0), (-0.25, 0.75), (0.0, 1.0, 3.0)):
        grid = make_grid(table)
        assert not grid.linear
        np.testing.assert_array_equal(np.array(table, np.float32)[grid.codes], grid.levels)


def test_the_normal_scale_is_the_known_one():
    """Steps of the best uniform quantizers of a normal distribution: J. Max 1960, table II."""
    for bits, step in ((1, 1.5958), (2, 0.9957), (3, 0.5860), (4, 0.3352), (5, 0.1881)):
        grid = make_grid(Format.integer(bits, mode="bipolar").tables[0])
        assert float(grid.normal_scale) * 2 == pytest.approx(step, rel=0.03)


def test_levels_whose_squares_overflow_are_refused():
    with pytest.raises(FormatError, match="divide all levels"):
        make_grid((0.0, 1e30))
