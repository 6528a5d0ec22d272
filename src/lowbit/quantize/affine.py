"""Scale and zero-point of each group of asymmetric integers: w = scale * (code - zero_point).

The same search as in search.py, with three zero-points around the one that centres the levels on the group.
Source of the min-max start: arXiv:1712.05877, eq. 1 to 3. NumPy defines, native/isa/rtn.cc follows.
"""

import numpy as np

from lowbit.quantize.grid import F32, make_grid
from lowbit.quantize.scale import FINE, round_scale
from lowbit.quantize.search import (
    LOWER,
    NORMAL_FRACTION,
    REFINEMENTS,
    UPPER,
    Fit,
    divide,
    extremes,
    inverse,
    total,
)

ROOTS = 5  # 2**5 + 1 candidate scales, as for other integers


def normal_step(bits: int) -> np.float32:
    """Best distance between 2**bits even levels for a standard normal distribution."""
    top = 2**bits - 1
    grid = make_grid(tuple(float(v) for v in range(-top, top + 1, 2)))
    return F32(2) * grid.normal_scale


def affine_codes(w: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, bits: int) -> np.ndarray:
    """Nearest codes, float32 [group_size, N]."""
    return np.clip(np.rint(w * inverse(scales)) + zero_points, F32(0), F32(2**bits - 1))


def search_affine(w: np.ndarray, bits: int, scale_type: str, search: str) -> Fit:
    """Find scale and zero-point of each group. w: float32 [group_size, N], divided by the tensor's scale."""
    top = F32(2**bits - 1)
    high, low = extremes(w)
    cover = (high - low) * F32(1 / top)
    best = round_scale(cover, scale_type)
    zero_points = np.clip(np.rint(-low * inverse(best)), F32(0), top)
    errors, _, _ = _evaluate(w, best, zero_points, bits)
    if search == "minmax":
        return Fit(best, zero_points, errors)

    rms = np.sqrt(total(w * w) * F32(1 / len(w)))
    upper = cover * UPPER
    lower = np.maximum(rms * (F32(NORMAL_FRACTION) * normal_step(bits)), cover * F32(LOWER[bits]))
    scale = np.minimum(lower, upper * F32(0.8))
    ratio = divide(upper, scale, np.zeros_like(upper))
    for _ in range(ROOTS):
        ratio = np.sqrt(ratio)
    middle = (high + low) * F32(0.5)
    gain = np.zeros_like(best)
    refit, refit_zero = best, zero_points
    for _ in range(2**ROOTS + 1):
        centre = np.rint(top * F32(0.5) - middle * inverse(scale))
        for shift in (-1, 0, 1):
            zero = np.clip(centre + F32(shift), F32(0), top)
            if scale_type in FINE:
                q = affine_codes(w, scale, zero, bits) - zero
                wq, qq = total(w * q), total(q * q)
                fitted = divide(wq, qq, np.zeros_like(wq))
                better = (fitted * wq > gain) & (fitted > 0)
                gain = np.where(better, fitted * wq, gain)
                refit, refit_zero = np.where(better, fitted, refit), np.where(better, zero, refit_zero)
            else:
                best, zero_points, errors, _ = _keep_better(
                    w, bits, scale_type, scale, zero, best, zero_points, errors
                )
        scale = scale * ratio
    if scale_type in FINE:
        for _ in range(REFINEMENTS):
            best, zero_points, errors, refit = _keep_better(
                w, bits, scale_type, refit, refit_zero, best, zero_points, errors
            )
    return Fit(best, zero_points, errors)


def _evaluate(
    w: np.ndarray, scales: np.ndarray, zero_points: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(squared error, <w, q>, <q, q>) with q = code - zero_point."""
    q = affine_codes(w, scales, zero_points, bits) - zero_points
    return total(np.square(w - scales * q)), total(w * q), total(q * q)


def _keep_better(
    w: np.ndarray,
    bits: int,
    scale_type: str,
    candidate: np.ndarray,
    zero: np.ndarray,
    best: np.ndarray,
    zero_points: np.ndarray,
    errors: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Try `candidate` and `zero`: (best scale, its zero-point, its error, the candidate refitted)."""
    stored = round_scale(candidate, scale_type)
    new_errors, wq, qq = _evaluate(w, stored, zero, bits)
    better = new_errors < errors
    return (
        np.where(better, stored, best),
        np.where(better, zero, zero_points),
        np.where(better, new_errors, errors),
        divide(wq, qq, np.zeros_like(wq)),
    )
