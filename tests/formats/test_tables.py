"""Level tables: golden values with their provenance, and the rules that the tables follow."""

from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest

from lowbit.formats import tables

# QLoRA, arXiv:2305.14314, appendix E "NF4 data type"; the digits are those of float32.
PUBLISHED_NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def test_nf4_is_the_published_table():
    assert list(tables.NF4) == PUBLISHED_NF4


def test_nf4_follows_from_its_construction():
    """Evenly spaced quantiles, 8 negative and 9 positive with one zero, divided by the largest.

    The outermost probability is the mean of 1 - 1/30 and 1 - 1/32.
    """
    end = (1 - 1 / 30 + 1 - 1 / 32) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(0.5, end, 9)]
    negative = [-quantile(p) for p in np.linspace(0.5, end, 8)]
    levels = np.array(sorted(set([*positive, *negative, 0.0]))) / max(positive)
    assert np.abs(levels - np.array(tables.NF4)).max() < 3e-7


def test_bitmod_tables():
    # arXiv:2411.11745: FP3 with +-3 (resolution) or +-6 (range), FP4 with +-5 or +-8, here doubled.
    three = tables.bitmod_tables(3)
    four = tables.bitmod_tables(4)
    base3 = {0, 1, 2, 4, -1, -2, -4}
    base4 = set((ml_dtypes_values(ml_dtypes.float4_e2m1fn, 4) * 2).tolist())
    assert [set(t) - base3 for t in three] == [{-6}, {-3}, {3}, {6}]
    assert [set(t) - base4 for t in four] == [{-16}, {-10}, {10}, {16}]
    for table in (*three, *four):
        assert list(table) == sorted(table) and len(set(table)) == len(table) in (8, 16)


def ml_dtypes_values(dtype, bits: int) -> np.ndarray:
    return np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float64)


@pytest.mark.parametrize(
    ("bits", "dtype"), [(2, ml_dtypes.int2), (4, ml_dtypes.int4), (8, np.dtype(np.int8))]
)
def test_integer_tables_are_the_types_of_the_same_width(bits, dtype):
    assert list(tables.symmetric_integers(bits)) == list(
        range(int(ml_dtypes.iinfo(dtype).min), int(ml_dtypes.iinfo(dtype).max) + 1)
    )


@pytest.mark.parametrize(("bits", "dtype"), [(2, ml_dtypes.uint2), (4, ml_dtypes.uint4)])
def test_unsigned_tables_are_the_types_of_the_same_width(bits, dtype):
    assert list(tables.unsigned_integers(bits)) == list(range(int(ml_dtypes.iinfo(dtype).max) + 1))


@pytest.mark.parametrize("bits", range(1, 9))
def test_integer_tables(bits):
    assert len(tables.symmetric_integers(bits)) == 2**bits == len(tables.unsigned_integers(bits))
    bipolar = tables.bipolar_integers(bits)
    assert len(bipolar) == 2**bits and sum(bipolar) == 0 and all(v % 2 == 1 for v in bipolar)
    assert tables.symmetric_integers(1) == bipolar == (-1.0, 1.0) or bits > 1
    if bits > 1:
        mantissas = tables.sign_magnitude_integers(bits)
        assert mantissas[0] == -mantissas[-1] and len(mantissas) == 2**bits - 1


@pytest.mark.parametrize("bits", range(2, 6))
def test_shift_levels_are_signed_powers_of_two(bits):
    levels = tables.shift_levels(bits)
    half = 2 ** (bits - 1)
    for code, level in enumerate(levels):
        assert level == (-1 if code >= half else 1) * 2 ** (code % half)


def test_mx_integers():
    levels = tables.mx_integers()
    assert levels[0] == -2 and levels[-1] == 127 / 64 and len(levels) == 256 and levels[128] == 0


def test_linear_step():
    assert tables.linear_step(tables.symmetric_integers(4)) == 1
    assert tables.linear_step(tables.mx_integers()) == 1 / 64
    assert tables.linear_step(tables.TERNARY) == 1
    assert tables.linear_step(tables.sign_magnitude_integers(4)) == 1
    for table in (
        tables.NF4,
        tables.BINARY,
        tables.bipolar_integers(3),
        (1.0, 0.0, -1.0),
        (0.0, 0.0, 1.0),
        (0.0, 1.0, 3.0),
    ):
        assert tables.linear_step(table) is None
