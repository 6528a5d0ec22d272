"""The scale of each group: min-max or least squares. This NumPy version defines the result.

All arithmetic is float32 with sums in index order, so that the native version (native/isa/rtn.cc), which has
a row in each vector lane, gives the same bits.

Least squares, for a group w and a table of levels. The squared error of a weight counts

    g = 3/4 + 1/4 w^2 / mean(w^2)

times: large weights matter more to what a layer computes than their number says. Measured as perplexity of a
15M-parameter Llama (4.529 in float32; g = 1 -> this g): int4-g32 4.989 -> 4.937, int4-g96 5.325 -> 5.173,
int3-g96 9.19 -> 7.49, int2-g32 66.0 -> 45.0, bcq3-g96 12.9 -> 8.1, trit2-g96 7.7 -> 6.8; w^2 alone is worse.

Candidate scales lie on a geometric grid between a lower bound (a fraction of what is best for normally
distributed weights, or of the covering scale) and somewhat above the smallest scale that covers the group.
For each, with q the nearest levels, the best scale for these q is s = <gw, q> / <gq, q> and lowers the error
by <gw, q>^2 / <gq, q>. The candidate with the largest gain is refined: round s to its storage type, choose
the levels again, measure the error, refit. The min-max scale competes too, so the result is never worse.
Levels that are not symmetric around zero (-8 .. 7) are tried with scales of both signs. Coarse scale types
(e8m0, e4m3) take each candidate rounded, as it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lowbit.quantize.grid import F32, Grid
from lowbit.quantize.scale import FINE, round_scale

REFINEMENTS = 3
FLAT = F32(0.75)  # share of an error that counts alike for all weights
UPPER = F32(1.25)
SMALLEST = F32(2.0**-120)
# Fraction of the covering scale below which no scale is tried, by bits of a linear table: many levels are
# best used by covering almost all weights, few levels by the bulk alone.
LOWER = {1: 0.0, 2: 0.0, 3: 0.3, 4: 0.5, 5: 0.6, 6: 0.75, 7: 0.85, 8: 0.9}
NORMAL_FRACTION = 0.55  # of the best scale for a normal distribution: the other lower bound


@dataclass
class Fit:
    """The best yet of N groups: float32 [N] each, scales as their type stores them."""

    scales: np.ndarray
    zero_points: np.ndarray  # in code units; 0 where the format has none
    errors: np.ndarray  # squared, each weight's times its importance

    def keep(self, scales: np.ndarray, zero_points: np.ndarray, errors: np.ndarray) -> None:
        """Take over the groups whose error is smaller."""
        better = errors < self.errors
        self.scales = np.where(better, scales, self.scales)
        self.zero_points = np.where(better, zero_points, self.zero_points)
        self.errors = np.where(better, errors, self.errors)


def importance(w: np.ndarray) -> np.ndarray:
    """How many times the squared error of each weight counts; float32 [group_size, N], as `w`."""
    squares = w * w
    mean_square = total(squares) * F32(1 / len(w))
    return squares * (inverse(mean_square) * (F32(1) - FLAT)) + FLAT


Levels = Callable[[np.ndarray], np.ndarray]  # numbers over the unit -> nearest levels over the unit


class Groups:
    """N groups of weights, float32 [group_size, N], and how much each weight's error counts: as `importance`
    says, times `counts`, float32 [group_size, N], where calibration knows better.
    """

    def __init__(self, w: np.ndarray, search: str, counts: np.ndarray | None = None):
        self.w = w
        self.high = np.maximum(w.max(axis=0), F32(0))
        self.low = np.minimum(w.min(axis=0), F32(0))
        self.rms = np.sqrt(total(w * w) * F32(1 / len(w)))
        self.importance = importance(w) if search == "mse" else np.ones_like(w)
        if counts is not None:
            self.importance *= counts
        self.weighted = self.importance * w

    def correlate(self, unit: np.ndarray, levels: Levels) -> tuple[np.ndarray, np.ndarray]:
        """(<gw, q>, <gq, q>) of the nearest levels q, both over `unit`."""
        q = levels(self.w * inverse(unit))
        return total(self.weighted * q), total((self.importance * q) * q)

    def evaluate(self, unit: np.ndarray, levels: Levels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(error, <gw, q>, <gq, q>)."""
        q = levels(self.w * inverse(unit))
        rest = self.w - unit * q
        error = total(self.importance * (rest * rest))
        return error, total(self.weighted * q), total((self.importance * q) * q)


def total(values: np.ndarray) -> np.ndarray:
    """Sum over axis 0 in float32, strictly in index order."""
    if values.shape[-1] == 1 or not values.flags.c_contiguous:  # NumPy would sum neighbours in pairs
        return np.add.accumulate(values, axis=0, dtype=F32)[-1]
    return np.add.reduce(values, axis=0, dtype=F32)


def inverse(scales: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 where that would overflow."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(np.abs(scales) > SMALLEST, F32(1) / scales, F32(0)).astype(F32)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator where the latter is positive, else 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, F32(0)).astype(F32)


def covering_scale(high: np.ndarray, low: np.ndarray, grid: Grid) -> np.ndarray:
    """The smallest scale at which the levels reach both extremes."""
    return np.maximum(high * grid.top_inverse, low * grid.bottom_inverse)


def both_signs(grid: Grid, scale_type: str) -> bool:
    """Whether negative scales reach anything that positive ones do not."""
    return not grid.symmetric and scale_type != "e8m0"


def starts_at_mean(grid: Grid) -> bool:
    """Whether the min-max scale of this table is the mean magnitude: two or three symmetric levels."""
    return len(grid.levels) <= 3 and grid.symmetric


def starting_scale(groups: Groups, grid: Grid, scale_type: str) -> np.ndarray:
    """The min-max scale, rounded to its type.

    Two or three levels: the mean magnitude (BitNet b1.58, arXiv:2402.17764). e8m0: the power of two that
    brings the exponent of the largest weight to that of the largest level (OCP Microscaling v1.0, 6.3).
    """
    if starts_at_mean(grid):
        mean = total(np.abs(groups.w)) * F32(1 / len(groups.w))
        return round_scale(mean * grid.top_inverse, scale_type)
    if scale_type == "e8m0":
        magnitude = np.maximum(groups.high, -groups.low)
        exponent = np.frexp(magnitude)[1] - int(np.frexp(grid.levels[-1])[1])
        return round_scale(np.ldexp(F32(1), np.maximum(exponent, -126)).astype(F32), scale_type)
    return round_scale(covering_scale(groups.high, groups.low, grid), scale_type)


def candidates(
    cover: np.ndarray, rms: np.ndarray, lower_cover: float, lower_normal: np.float32, roots: int
) -> Iterator[np.ndarray]:
    """2**roots + 1 positive scales for each group, from the lower bound to UPPER times the covering scale.

    lower_cover, lower_normal: the bound in units of the covering scale and of the root mean square.
    """
    upper = cover * UPPER
    lower = np.maximum(rms * (F32(NORMAL_FRACTION) * lower_normal), cover * F32(lower_cover))
    scale = np.minimum(lower, upper * F32(0.8))
    ratio = divide(upper, scale)
    for _ in range(roots):
        ratio = np.sqrt(ratio)
    for _ in range(2**roots + 1):
        yield scale
        scale = scale * ratio


def search_scales(
    w: np.ndarray, grid: Grid, bits: int, scale_type: str, search: str, counts: np.ndarray | None = None
) -> Fit:
    """Find the scale of each group.

    w: float32 [group_size, N], already divided by the scale of the tensor
    search: "minmax" or "mse"; "plain": mse in which all weights count alike
    counts: float32 [group_size, N], times which each weight's squared error counts; None: 1
    """
    groups = Groups(w, search, counts)
    start = starting_scale(groups, grid, scale_type)
    zero = np.zeros_like(start)
    best = Fit(start, zero, groups.evaluate(start * grid.step, grid.nearest_level)[0])
    if search == "minmax":
        return best
    both = both_signs(grid, scale_type)
    lower_cover = LOWER[bits] if grid.linear else 0.0
    gain, refit = zero, start
    for sign in (F32(1), F32(-1)) if both else (F32(1),):
        high, low = (groups.high, groups.low) if sign > 0 else (-groups.low, -groups.high)
        cover = covering_scale(high, low, grid)
        for scale in candidates(cover, groups.rms, lower_cover, grid.normal_scale, grid.roots):
            if scale_type not in FINE:
                try_scale(groups, grid.nearest_level, grid.step, scale_type, sign * scale, zero, best)
                continue
            wq, qq = groups.correlate(sign * scale * grid.step, grid.nearest_level)
            fitted = divide(wq, qq)
            better = (fitted * wq > gain) & (both | (fitted > 0))
            gain = np.where(better, fitted * wq, gain)
            refit = np.where(better, fitted * F32(1 / grid.step), refit)
    if scale_type in FINE:
        for _ in range(REFINEMENTS):
            refit = try_scale(groups, grid.nearest_level, grid.step, scale_type, refit, zero, best)
    return best


def try_scale(
    groups: Groups,
    levels: Levels,
    step: np.float32,
    scale_type: str,
    candidate: np.ndarray,
    zero_points: np.ndarray,
    best: Fit,
) -> np.ndarray:
    """Round `candidate` to its type, keep it where it is better; return it refitted."""
    stored = round_scale(candidate, scale_type)
    errors, wq, qq = groups.evaluate(stored * step, levels)
    best.keep(stored, zero_points, errors)
    return divide(wq, qq) * F32(1 / step)
