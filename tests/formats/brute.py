"""Slow and plain definitions to hold the formats against: exact arithmetic over the list of values."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction

import numpy as np


def round_over_grid(x: float, grid: list[float], rounding: str) -> float:
    """Round finite x to an ascending grid that reaches beyond x on both sides.

    Neighbouring places of the grid are even and odd in turn, zero is even.
    """
    exact = Fraction(x)
    zero = bisect.bisect_left(grid, 0.0)
    below = bisect.bisect_right(grid, x) - 1  # float comparison is exact
    if grid[below] == x:
        return grid[below]
    low, high = below, below + 1
    to_low, to_high = exact - Fraction(grid[low]), Fraction(grid[high]) - exact
    if rounding == "up":
        return grid[high]
    if rounding == "down":
        return grid[low]
    if rounding == "toward_zero":
        return grid[low] if x > 0 else grid[high]
    if to_low != to_high:
        return grid[low] if to_low < to_high else grid[high]
    if rounding == "nearest_away":
        return grid[high] if x > 0 else grid[low]
    return grid[low] if (low - zero) % 2 == 0 else grid[high]


def unbounded_grid(exponent_bits: int, mantissa_bits: int, bias: int, top: int) -> list[float]:
    """Ascending values of a minifloat whose exponents go on up to `top`, without special codes."""
    m = mantissa_bits
    values = [math.ldexp(k, 1 - bias - m) for k in range(2**m)]
    for exponent in range(1 - bias, top):
        values += [math.ldexp(2**m + k, exponent - m) for k in range(2**m)]
    return [-v for v in reversed(values[1:])] + values


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """True if two float arrays are equal bit for bit, all NaN counting as one."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    nan = np.isnan(a)
    if a.shape != b.shape or (nan != np.isnan(b)).any():
        return False
    return bool((a[~nan].view(np.uint64) == b[~nan].view(np.uint64)).all())
