"""The scale of each group: min-max or least squares. This NumPy version defines the result.

All arithmetic is float32 with sums in index order, so that the native version (native/isa/rtn.cc), which has
a row in each vector lane, gives the same bits.

Least squares, for a group w and a table of levels. Candidate scales lie on a geometric grid between a lower
bound (a fraction of what is best for normally distributed weights, or of the covering scale) and somewhat
above the smallest scale that covers the group. For each, with q the nearest levels, the best scale for these
q is  s = <w, q> / <q, q>  and lowers the squared error by  <w, q>^2 / <q, q>.  The candidate with the largest
gain is refined: round s to its storage type, choose the levels again, measure the error, refit. The min-max
scale competes too, so the result is never worse. Levels that are not symmetric around zero (-8 .. 7)
are tried with scales of both signs. Coarse scale types (e8m0, e4m3) take each candidate rounded, as it is.
"""

from dataclasses import dataclass

import numpy as np

from lowbit.quantize.grid import F32, Grid
from lowbit.quantize.scale import FINE, round_scale

REFINEMENTS = 3
UPPER = F32(1.25)
SMALLEST = F32(2.0**-120)
# Fraction of the covering scale below which no scale is tried, by bits of a linear table: many levels are
# best used by covering almost all weights, few levels by the bulk alone.
LOWER = {1: 0.0, 2: 0.0, 3: 0.3, 4: 0.5, 5: 0.6, 6: 0.75, 7: 0.85, 8: 0.9}
NORMAL_FRACTION = 0.55  # of the best scale for a normal distribution: the other lower bound


@dataclass
class Fit:
    """Scales found for N groups: float32 [N] each, as stored but in float32; errors of each group."""

    scales: np.ndarray
    zero_points: np.ndarray  # uint8-valued float32; 0 where the format has none
    errors: np.ndarray


def total(values: np.ndarray) -> np.ndarray:
    """Sum over axis 0 in float32, strictly in index order."""
    return np.add.accumulate(values, axis=0, dtype=F32)[-1]


def inverse(scales: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 where that would overflow."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(np.abs(scales) > SMALLEST, F32(1) / scales, F32(0)).astype(F32)


def divide(numerator: np.ndarray, denominator: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """numerator / denominator where the latter is positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator > 0, numerator / denominator, otherwise).astype(F32)


def extremes(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(largest, or 0; smallest, or 0) of each group."""
    return np.maximum(w.max(axis=0), F32(0)), np.minimum(w.min(axis=0), F32(0))


def covering_scale(high: np.ndarray, low: np.ndarray, grid: Grid) -> np.ndarray:
    """The smallest scale at which the levels reach both extremes."""
    return np.maximum(high * grid.top_inverse, low * grid.bottom_inverse)


def both_signs(grid: Grid, scale_type: str) -> bool:
    """Whether negative scales reach anything that positive ones do not."""
    return not grid.symmetric and scale_type != "e8m0"


def starts_at_mean(grid: Grid) -> bool:
    """Whether the min-max scale of this table is the mean magnitude: two or three symmetric levels."""
    return len(grid.levels) <= 3 and grid.symmetric


def starting_scale(w: np.ndarray, grid: Grid, scale_type: str) -> np.ndarray:
    """The min-max scale, rounded to its type.

    Two or three levels: the mean magnitude (BitNet b1.58, arXiv:2402.17764). e8m0: the power of two that
    brings the exponent of the largest weight to that of the largest level (OCP Microscaling v1.0, 6.3).
    """
    high, low = extremes(w)
    if starts_at_mean(grid):
        mean = total(np.abs(w)) * F32(1 / len(w))
        return round_scale(mean * grid.top_inverse, scale_type)
    if scale_type == "e8m0":
        magnitude = np.maximum(high, -low)
        exponent = np.frexp(magnitude)[1] - int(np.frexp(grid.levels[-1])[1])
        return round_scale(np.ldexp(F32(1), np.maximum(exponent, -126)).astype(F32), scale_type)
    return round_scale(covering_scale(high, low, grid), scale_type)


def candidate_bounds(
    cover: np.ndarray, rms: np.ndarray, grid: Grid, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """(lowest candidate scale, ratio between neighbours)."""
    lower_cover = F32(LOWER[bits] if grid.linear else 0.0)
    lower_normal = F32(NORMAL_FRACTION) * grid.normal_scale
    upper = cover * UPPER
    lower = np.minimum(np.maximum(rms * lower_normal, cover * lower_cover), upper * F32(0.8))
    ratio = divide(upper, lower, np.zeros_like(upper))
    for _ in range(grid.roots):
        ratio = np.sqrt(ratio)
    return lower, ratio


def evaluate(w: np.ndarray, scales: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(squared error, <w, q>, <q, q>) of the nearest levels q at `scales`; q in units of the grid's step."""
    unit = scales * grid.step
    q = grid.value(grid.nearest(w * inverse(unit)))
    return total(np.square(w - unit * q)), total(w * q), total(q * q)


def search_scales(w: np.ndarray, grid: Grid, bits: int, scale_type: str, search: str) -> Fit:
    """Find the scale of each group.

    w: float32 [group_size, N], already divided by the scale of the tensor
    search: "minmax" or "mse"
    """
    best = starting_scale(w, grid, scale_type)
    errors, wq, qq = evaluate(w, best, grid)
    if search == "minmax":
        return Fit(best, np.zeros_like(best), errors)
    high, low = extremes(w)
    rms = np.sqrt(total(w * w) * F32(1 / len(w)))
    both = both_signs(grid, scale_type)
    gain = np.zeros_like(best)
    refit = best
    for sign in (F32(1), F32(-1)) if both else (F32(1),):
        cover = covering_scale(high, low, grid) if sign > 0 else covering_scale(-low, -high, grid)
        scale, ratio = candidate_bounds(cover, rms, grid, bits)
        for _ in range(2**grid.roots + 1):
            if scale_type in FINE:
                q = grid.value(grid.nearest(w * inverse(sign * scale * grid.step)))
                wq, qq = total(w * q), total(q * q)
                fitted = divide(wq, qq, np.zeros_like(wq))
                better = fitted * wq > gain
                if not both:
                    better &= fitted > 0
                gain = np.where(better, fitted * wq, gain)
                refit = np.where(better, fitted * F32(1 / grid.step), refit)
            else:
                best, errors, _ = _keep_better(w, grid, scale_type, sign * scale, best, errors)
            scale = scale * ratio
    if scale_type in FINE:
        for _ in range(REFINEMENTS):
            best, errors, refit = _keep_better(w, grid, scale_type, refit, best, errors)
    return Fit(best, np.zeros_like(best), errors)


def _keep_better(
    w: np.ndarray, grid: Grid, scale_type: str, candidate: np.ndarray, best: np.ndarray, errors: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Try `candidate`, rounded to its type: (best scale, its error, the candidate refitted)."""
    stored = round_scale(candidate, scale_type)
    new_errors, wq, qq = evaluate(w, stored, grid)
    better = new_errors < errors
    refit = divide(wq, qq, np.zeros_like(wq)) * F32(1 / grid.step)
    return np.where(better, stored, best), np.where(better, new_errors, errors), refit
