"""Rounding: to integers and to tables of levels, in six modes.

nearest_even   nearest, ties to the even integer (even code for a table)
nearest_away   nearest, ties away from zero
toward_zero    the neighbour nearer to zero
up, down       the neighbour nearer to plus, minus infinity
stochastic     the upper neighbour with a probability equal to the distance from the lower, so that the
               expectation is the input
"""

from __future__ import annotations

import numpy as np

from lowbit.errors import FormatError

ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic")


def check_rounding(rounding: str) -> None:
    if rounding not in ROUNDINGS:
        raise FormatError(f"rounding {rounding!r} is unknown; use one of {', '.join(ROUNDINGS)}")


def round_to_integers(x: np.ndarray, rounding: str, rng: np.random.Generator | None = None) -> np.ndarray:
    """Round float64 `x` to integers, kept in float64. Signed zero, infinities and NaN pass through.

    rng: needed for "stochastic" only, one float64 drawn per element; None draws from fresh entropy.
    """
    check_rounding(rounding)
    x = np.asarray(x, dtype=np.float64)
    if rounding == "nearest_even":
        return np.rint(x)
    if rounding == "toward_zero":
        return np.trunc(x)
    if rounding == "up":
        return np.ceil(x)
    if rounding == "down":
        return np.floor(x)
    if rounding == "nearest_away":
        # Adding one half and truncating is wrong just below a tie; the exact fraction decides instead.
        whole = np.trunc(x)
        with np.errstate(invalid="ignore"):
            away = np.abs(x - whole) >= 0.5
        return np.where(away, whole + np.copysign(1.0, x), whole)
    rng = np.random.default_rng() if rng is None else rng
    low = np.floor(x)
    with np.errstate(invalid="ignore"):
        up = rng.random(x.shape) < x - low
    return np.copysign(np.where(up, low + 1.0, low), x)


def sorted_levels(table: tuple[float, ...] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct levels of a table, ascending float64, and the lowest code of each, int64."""
    levels, codes = np.unique(np.asarray(table, dtype=np.float64), return_index=True)
    return levels, codes


def round_to_table(
    x: np.ndarray,
    table: tuple[float, ...] | np.ndarray,
    rounding: str = "nearest_even",
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Return the codes (uint8, shape of x) of the levels that `x` rounds to.

    table: up to 256 finite levels in code order; of equal levels the lowest code is used.
    Numbers beyond the table take its end. In "nearest_even" a tie goes to the even code, to the level nearer
    to zero if both codes are even or both odd. Raises FormatError for NaN.
    """
    check_rounding(rounding)
    x = np.asarray(x, dtype=np.float64)
    if np.isnan(x).any():
        raise FormatError("round_to_table: the input holds NaN, which no level stands for; remove it")
    levels, codes = sorted_levels(table)
    if len(levels) == 1:
        return np.full(x.shape, codes[0], dtype=np.uint8)
    x = np.clip(x, levels[0], levels[-1])
    below = np.clip(np.searchsorted(levels, x, side="right") - 1, 0, len(levels) - 2)
    low, high = levels[below], levels[below + 1]
    if rounding == "up":
        upper = x > low
    elif rounding == "down":
        upper = x >= high
    elif rounding == "toward_zero":
        upper = np.where(x >= 0, x >= high, x > low)
    elif rounding == "stochastic":
        rng = np.random.default_rng() if rng is None else rng
        upper = rng.random(x.shape) * (high - low) < x - low
    else:
        larger = np.abs(high) > np.abs(low)
        if rounding == "nearest_away":
            tie = larger
        else:
            even_low, even_high = codes[below] % 2 == 0, codes[below + 1] % 2 == 0
            tie = np.where(even_low == even_high, ~larger, even_high)
        # Distances would be rounded; the middle is exact for levels of at most 52 bits from first to last.
        middle = low / 2 + high / 2
        upper = np.where(x == middle, tie, x > middle)
    return codes[below + upper].astype(np.uint8)
