"""m4 scales: the scale of each super-group and the 4-bit multiplier of each of its groups.

As in search.py, errors count by their importance, all arithmetic is float32 with sums in index order, and the
native version (native/isa/rtn_m4.h) gives the same bits.

Each group first finds the scale s that it would take alone. Candidate scales d of the super-group put the
largest s at multipliers from 15 / 0.8 (which clips) down to 15 / 1.4, for each sign that is worth trying. For
each, every group takes the multiplier m with the least error among the one nearest s / d and its neighbours;
m times the nearest levels q then stand for the super-group, whose best scale is <gw, mq> / <g mq, mq>, with
the gain <gw, mq>^2 / <g mq, mq>. The candidate with the largest gain is refined: round the scale to fp16, try
all multipliers for every group, measure, refit. The min-max choice competes too.

Measured on SmolLM2-135M: Kullback-Leibler divergence from the unquantized model over 12 windows of 256 tokens
of WikiText-2 (bits per weight of the layers):

    int4-g16-m4 (4.33) 0.273    int4-g32 (4.50) 0.337    int3-g16-m4 (3.33) 0.920    int2-g16-m4 (2.33) 5.53
    int4-g32-m4 (4.20) 0.337    int4-g64 (4.25) 0.390    int3-g32 (3.50) 0.949       int2-g32 (2.50) 5.13

Two bits gain least: one sign for a whole super-group costs them more. Bipolar integers need no sign, and
int2b-g16-m4 has less squared error than int2-g32, but a divergence of 8.5: it has no zero. Weighted squared
error of a slice of int4-g16-m4: 0.00334; 32 candidates from 0.8 to 2.0 with 5 multipliers each give 0.00332,
4 candidates 0.00350; super-groups of 64 inputs 0.00295 at 0.17 more bits.
"""

from dataclasses import dataclass

import numpy as np

from lowbit.formats.multipliers import MAX_MULTIPLIER
from lowbit.quantize.grid import F32, Grid
from lowbit.quantize.scale import round_scale
from lowbit.quantize.search import (
    LOWER,
    Groups,
    both_signs,
    candidates,
    covering_scale,
    divide,
    inverse,
    starts_at_mean,
    total,
)

ROOTS = 4  # 2**4 + 1 scales are tried for a group alone
CANDIDATES = 16  # scales of a super-group, from 0.8 to 1.4 times the one with multiplier 15
LOWEST = F32(0.8) / F32(MAX_MULTIPLIER)
RATIO = F32(1.038)
NEIGHBOURS = (-1, 0, 1)
REFINEMENTS = 3
TOP = F32(MAX_MULTIPLIER)


@dataclass
class M4Fit:
    """N groups in super-groups of `together`.

    scales: float32 [N / together], as fp16 holds them
    multipliers: float32 [N], whole numbers
    errors: float32 [N / together], less those of all zeros
    """

    scales: np.ndarray
    multipliers: np.ndarray
    errors: np.ndarray


def units(fit: M4Fit, grid: Grid) -> np.ndarray:
    """scale * multiplier * step of each group, float32 [N]; exact."""
    together = len(fit.multipliers) // len(fit.scales)
    return np.repeat(fit.scales, together) * fit.multipliers * grid.step


def search_multipliers(
    w: np.ndarray, grid: Grid, bits: int, together: int, search: str, counts: np.ndarray | None = None
) -> M4Fit:
    """Find scales and multipliers.

    w: float32 [group_size, N], already divided by the scale of the tensor
    together: neighbouring groups that make a super-group
    search: "minmax" or "mse"
    """
    groups = Groups(w, search, counts)
    best = _minmax(groups, grid, together)
    if search == "minmax":
        return best
    both = both_signs(grid, "m4")
    gain, refit = np.zeros_like(best.scales), best.scales
    for sign in (F32(1), F32(-1)) if both else (F32(1),):
        alone = _alone(groups, grid, bits, sign)
        scale = _join(alone, together).max(axis=0) * LOWEST
        for _ in range(CANDIDATES):
            wanted = alone * np.repeat(inverse(scale), together)
            nearest = np.rint(wanted)
            offered = [np.clip(nearest + F32(n), F32(0), TOP) for n in NEIGHBOURS]
            _, _, fitted, its_gain = _choose(groups, grid, sign * scale, offered, together)
            better = its_gain > gain
            gain = np.where(better, its_gain, gain)
            refit = np.where(better, fitted, refit)
            scale = scale * RATIO
    every = [np.full(w.shape[1], m, F32) for m in range(1, MAX_MULTIPLIER + 1)]
    for _ in range(REFINEMENTS):
        stored = round_scale(refit, "m4")
        multipliers, errors, refit, _ = _choose(groups, grid, stored, every, together)
        _keep(best, stored, multipliers, errors)
    return best


def _minmax(groups: Groups, grid: Grid, together: int) -> M4Fit:
    """The smallest scale with which every group is covered by a multiplier of at most 15."""
    if starts_at_mean(grid):
        wanted = total(np.abs(groups.w)) * F32(1 / len(groups.w)) * grid.top_inverse
    else:
        wanted = covering_scale(groups.high, groups.low, grid)
    scales = round_scale(_join(wanted, together).max(axis=0) * F32(1 / MAX_MULTIPLIER), "m4")
    multipliers = np.clip(np.ceil(wanted * np.repeat(inverse(scales), together)), F32(0), TOP)
    unit = np.repeat(scales, together) * multipliers * grid.step
    wq, qq = groups.correlate(unit, grid.nearest_level)
    return M4Fit(scales, multipliers, total(_join(_relative_error(unit, wq, qq), together)))


def _alone(groups: Groups, grid: Grid, bits: int, sign: np.float32) -> np.ndarray:
    """Magnitude of the scale with the largest gain for each group by itself, [N]; 0 for a group of zeros."""
    high, low = (groups.high, groups.low) if sign > 0 else (-groups.low, -groups.high)
    cover = covering_scale(high, low, grid)
    lower_cover = LOWER[bits] if grid.linear else 0.0
    gain, alone = np.zeros_like(cover), np.zeros_like(cover)
    for scale in candidates(cover, groups.rms, lower_cover, grid.normal_scale, ROOTS):
        wq, qq = groups.correlate(sign * scale * grid.step, grid.nearest_level)
        fitted = divide(wq, qq)
        better = fitted * wq > gain
        gain = np.where(better, fitted * wq, gain)
        alone = np.where(better, np.abs(fitted) * F32(1 / grid.step), alone)
    return alone


def _choose(
    groups: Groups, grid: Grid, scales: np.ndarray, offered: list[np.ndarray], together: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The best of the `offered` multipliers [N] for each group, 0 if none helps, under scales [N / together].

    Returns (multipliers [N]; of each super-group: error less that of all zeros, refitted scale, its gain).
    """
    scale = np.repeat(scales, together)
    error, chosen, wq_chosen, qq_chosen = (np.zeros_like(scale) for _ in range(4))
    for m in offered:
        unit = scale * m * grid.step
        wq, qq = groups.correlate(unit, grid.nearest_level)
        e = _relative_error(unit, wq, qq)
        better = e < error
        error = np.where(better, e, error)
        chosen = np.where(better, m, chosen)
        wq_chosen = np.where(better, m * wq, wq_chosen)
        qq_chosen = np.where(better, (m * m) * qq, qq_chosen)
    wq, qq = total(_join(wq_chosen, together)), total(_join(qq_chosen, together))
    fitted = divide(wq, qq)
    return chosen, total(_join(error, together)), fitted * F32(1 / grid.step), fitted * wq


def _relative_error(unit: np.ndarray, wq: np.ndarray, qq: np.ndarray) -> np.ndarray:
    """Squared error of unit * q less that of zero: unit^2 <gq, q> - 2 unit <gw, q>."""
    return unit * (unit * qq - F32(2) * wq)


def _join(values: np.ndarray, together: int) -> np.ndarray:
    """[N] as [together, N / together]: the groups of each super-group along axis 0."""
    return values.reshape(-1, together).T


def _keep(best: M4Fit, scales: np.ndarray, multipliers: np.ndarray, errors: np.ndarray) -> None:
    """Take over the super-groups whose error is smaller."""
    together = len(multipliers) // len(scales)
    better = errors < best.errors
    best.scales = np.where(better, scales, best.scales)
    best.multipliers = np.where(np.repeat(better, together), multipliers, best.multipliers)
    best.errors = np.where(better, errors, best.errors)
