"""Scale and zero-point of each group of asymmetric integers: w = scale * (code - zero_point).

The same search as in search.py, with three zero-points around the one that centres the levels on the group.
Source of the min-max start: arXiv:1712.05877, eq. 1 to 3. NumPy defines, native/isa/rtn.cc follows.
"""

from functools import partial

import numpy as np

from lowbit.quantize.grid import F32, make_grid
from lowbit.quantize.scale import FINE, round_scale
from lowbit.quantize.search import (
    LOWER,
    REFINEMENTS,
    Fit,
    Groups,
    candidates,
    divide,
    inverse,
    try_scale,
)

ROOTS = 5  # 2**5 + 1 candidate scales, as for other integers


def normal_step(bits: int) -> np.float32:
    """Best distance between 2**bits even levels for a standard normal distribution."""
    top = 2**bits - 1
    grid = make_grid(tuple(float(v) for v in range(-top, top + 1, 2)))
    return F32(2) * grid.normal_scale


def affine_codes(w: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, bits: int) -> np.ndarray:
    """Nearest codes, float32 [group_size, N]."""
    return _codes(w * inverse(scales), zero_points, bits)


def search_affine(
    w: np.ndarray, bits: int, scale_type: str, search: str, counts: np.ndarray | None = None
) -> Fit:
    """Find scale and zero-point of each group. w: float32 [group_size, N], divided by the tensor's scale."""
    groups = Groups(w, search, counts)
    top, one = F32(2**bits - 1), F32(1)
    cover = (groups.high - groups.low) * F32(1 / top)
    start = round_scale(cover, scale_type)
    zero = np.clip(np.rint(-groups.low * inverse(start)), F32(0), top)
    best = Fit(start, zero, groups.evaluate(start, partial(_level, zero=zero, bits=bits))[0])
    if search == "minmax":
        return best
    middle = (groups.high + groups.low) * F32(0.5)
    gain, refit, refit_zero = np.zeros_like(start), start, zero
    for scale in candidates(cover, groups.rms, LOWER[bits], normal_step(bits), ROOTS):
        centre = np.rint(top * F32(0.5) - middle * inverse(scale))
        for shift in (-1, 0, 1):
            zero = np.clip(centre + F32(shift), F32(0), top)
            levels = partial(_level, zero=zero, bits=bits)
            if scale_type not in FINE:
                try_scale(groups, levels, one, scale_type, scale, zero, best)
                continue
            wq, qq = groups.correlate(scale, levels)
            fitted = divide(wq, qq)
            better = (fitted * wq > gain) & (fitted > 0)
            gain = np.where(better, fitted * wq, gain)
            refit, refit_zero = np.where(better, fitted, refit), np.where(better, zero, refit_zero)
    if scale_type in FINE:
        levels = partial(_level, zero=refit_zero, bits=bits)
        for _ in range(REFINEMENTS):
            refit = try_scale(groups, levels, one, scale_type, refit, refit_zero, best)
    return best


def _codes(x: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint(x) + zero, F32(0), F32(2**bits - 1))


def _level(x: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """Nearest code less the zero-point, of numbers over the scale."""
    return _codes(x, zero, bits) - zero
