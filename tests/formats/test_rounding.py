"""Rounding to integers and to tables of levels, against exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats.minifloat import minifloat
from lowbit.formats.rounding import ROUNDINGS, round_to_integers, round_to_table, sorted_levels
from lowbit.formats.tables import NF4

DETERMINISTIC = [r for r in ROUNDINGS if r != "stochastic"]


def exact_integer(x: float, rounding: str) -> int:
    number = Fraction(x)
    if rounding == "up":
        return math.ceil(number)
    if rounding == "down":
        return math.floor(number)
    if rounding == "toward_zero":
        return math.trunc(number)
    if rounding == "nearest_even":
        return round(number)
    return int(math.copysign(math.floor(abs(number) + Fraction(1, 2)), x))


@given(st.floats(-(2.0**54), 2.0**54), st.sampled_from(DETERMINISTIC))
def test_any_float_rounds_exactly(x, rounding):
    assert round_to_integers(np.array(x), rounding) == exact_integer(x, rounding)


@pytest.mark.parametrize("rounding", DETERMINISTIC)
def test_ties_and_their_neighbours(rounding):
    ties = np.arange(-6, 6) + 0.5
    x = np.concatenate(
        [ties, np.nextafter(ties, 9), np.nextafter(ties, -9), [2.0**52 + 1, -(2.0**53), 0.1, -0.1]]
    )
    assert round_to_integers(x, rounding).tolist() == [exact_integer(v, rounding) for v in x]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_signed_zero_infinity_and_nan_pass(rounding):
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan])
    result = round_to_integers(x, rounding, np.random.default_rng(0))
    assert np.array_equal(result, x, equal_nan=True)
    assert np.signbit(result[:4]).tolist() == [False, True, False, True]
    assert round_to_integers(np.array(-3.0), rounding) == -3


def test_the_modes_differ():
    x = np.array([0.5, 1.5, -0.5, -1.5, 0.3, -0.3])
    results = {rounding: tuple(round_to_integers(x, rounding)) for rounding in DETERMINISTIC}
    assert len(set(results.values())) == len(DETERMINISTIC)


def test_stochastic_rounding_is_unbiased():
    n = 200_000
    rng = np.random.default_rng(7)
    for x in (0.25, 2.9, -1.125, -0.01):
        result = round_to_integers(np.full(n, x), "stochastic", rng)
        assert set(np.unique(result)) <= {math.floor(x), math.ceil(x)}
        p = x - math.floor(x)
        sigma = math.sqrt(p * (1 - p) / n)
        assert abs(result.mean() - x) < 5 * sigma
    # the test of the test: rounding to nearest is biased by far more than the bound
    assert abs(round_to_integers(np.full(n, 0.25), "nearest_even").mean() - 0.25) > 50 * sigma


@pytest.mark.parametrize(
    "element", [minifloat(2, 1), minifloat(4, 3, specials="fn"), minifloat(3, 0)], ids=lambda e: e.name
)
def test_stochastic_rounding_to_a_minifloat_is_unbiased(element):
    n = 100_000
    rng = np.random.default_rng(11)
    subnormal = element.smallest_subnormal
    for x in (1.2, -1.7, 0.3 * subnormal, 0.9 * element.max):
        result = element.round(np.full(n, x), "stochastic", rng)
        low, high = element.round(np.array(x), "down"), element.round(np.array(x), "up")
        assert set(np.unique(result)) == {float(low), float(high)}
        p = float((x - low) / (high - low))
        assert abs(result.mean() - x) < 5 * (high - low) * math.sqrt(p * (1 - p) / n)


def test_seed_decides_stochastic_rounding():
    x = np.linspace(-3, 3, 1000)
    draw = [round_to_integers(x, "stochastic", np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (draw[0] == draw[1]).all() and (draw[0] != draw[2]).any()
    assert np.isin(round_to_integers(x, "stochastic") - np.floor(x), (0, 1)).all()


def test_unknown_rounding():
    with pytest.raises(FormatError, match="nearest_even"):
        round_to_integers(np.zeros(1), "nearest")
    with pytest.raises(FormatError, match="stochastic"):
        round_to_table(np.zeros(1), NF4, "odd")


def exact_code(x: float, table: tuple[float, ...], rounding: str) -> int:
    """The definition in one number at a time: order the levels by distance, then by the rule for ties."""
    levels = sorted(set(table))
    code = {v: table.index(v) for v in levels}
    x = min(max(x, levels[0]), levels[-1])
    below = max(v for v in levels if v <= x)
    above = min(v for v in levels if v >= x)
    if rounding == "up":
        return code[above]
    if rounding == "down":
        return code[below]
    if rounding == "toward_zero":
        return code[below] if x >= 0 else code[above]
    low, high = Fraction(x) - Fraction(below), Fraction(above) - Fraction(x)
    if low != high:
        return code[below] if low < high else code[above]
    larger, smaller = (above, below) if abs(above) > abs(below) else (below, above)
    if rounding == "nearest_away":
        return code[larger]
    if code[below] % 2 != code[above] % 2:
        return code[below] if code[below] % 2 == 0 else code[above]
    return code[smaller]


TABLES = [
    NF4,
    minifloat(2, 1).levels(),
    (0.0, 5.0, -1.0),
    (-1.0, 1.0),
    (3.0, 1.0, 2.0, 4.0, 1.0, -7.0),
    tuple(float(v) for v in range(-7, 8)),
]


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@pytest.mark.parametrize("table", TABLES, ids=len)
def test_tables_against_the_definition(table, rounding, rng):
    levels = np.array(sorted(set(table)))
    middle = (levels[1:] + levels[:-1]) / 2
    x = np.concatenate(
        [levels, middle, np.nextafter(middle, -99), np.nextafter(middle, 99), [-99, 99, 0.0, -0.0]]
    )
    x = np.concatenate([x, rng.uniform(levels[0], levels[-1], 50)])
    assert round_to_table(x, table, rounding).tolist() == [exact_code(float(v), table, rounding) for v in x]


@settings(max_examples=60)
@given(
    st.lists(st.integers(-64, 64), min_size=2, max_size=16).filter(lambda v: len(set(v)) > 1),
    st.lists(st.integers(-300, 300), min_size=1, max_size=8),
    st.sampled_from(DETERMINISTIC),
)
def test_tables_of_any_levels(levels, numbers, rounding):
    table = tuple(v / 8 for v in levels)
    x = np.array(numbers) / 32
    assert round_to_table(x, table, rounding).tolist() == [exact_code(float(v), table, rounding) for v in x]


def test_minifloat_tables_round_as_minifloats(rng):
    for element in (minifloat(2, 1), minifloat(3, 2), minifloat(4, 3, specials="fn"), minifloat(5, 2)):
        table = np.array(element.levels())
        x = rng.normal(size=4000) * np.exp2(rng.integers(-8, 8, 4000))
        levels = np.unique(table)
        middle = (levels[1:] + levels[:-1]) / 2
        x = np.concatenate([x, middle])
        for rounding in DETERMINISTIC:
            want = element.round(x, rounding, saturate=True)
            assert (table[round_to_table(x, element.levels(), rounding)] == want).all()


def test_stochastic_tables_are_unbiased():
    n = 100_000
    rng = np.random.default_rng(3)
    table = np.array(NF4)
    for x in (0.1, -0.6, 0.99):
        result = table[round_to_table(np.full(n, x), NF4, "stochastic", rng)]
        assert len(np.unique(result)) == 2
        gap = np.ptp(result)
        assert abs(result.mean() - x) < 5 * gap / 2 / math.sqrt(n)


def test_equal_levels_use_the_lowest_code_and_specials_never_occur():
    table = minifloat(5, 2).levels()
    levels, codes = sorted_levels(table)
    assert len(levels) == len(set(table)) and (np.diff(levels) > 0).all()
    used = round_to_table(np.linspace(-60000, 60000, 9999), table)
    specials = np.flatnonzero(~np.isfinite(minifloat(5, 2).values()))
    assert not np.isin(used, specials).any() and not (used == 128).any()
    assert not np.isin(codes, specials).any()


def test_table_refuses_nan_and_takes_infinity():
    with pytest.raises(FormatError, match="NaN"):
        round_to_table(np.array([np.nan]), NF4)
    assert round_to_table(np.array([np.inf, -np.inf]), NF4).tolist() == [15, 0]
