"""Error intervals of predictions by split-conformal calibration on log(measured / predicted).

Calibration points were not used for fitting. Of n of them, the k-th smallest error with k = ceil((n + 1) c)
bounds the error of one more such prediction with probability c, whatever the distribution (Vovk; Lei et al.,
arXiv:1604.04173). Where n is too small for c there is no interval: none is invented.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

COVERAGE = 0.9


def bounds(residuals: Sequence[float], coverage: float = COVERAGE) -> tuple[float, float] | None:
    """Factors (low, high) on a prediction, or None if there are too few residuals for `coverage`.

    residuals: log(measured / predicted). With enough of them each tail has its own bound, else both have one.
    """
    n, tail = len(residuals), (1 - coverage) / 2
    ordered = sorted(residuals)
    k = math.floor((n + 1) * tail + 1e-9)
    if k >= 1:
        return math.exp(ordered[k - 1]), math.exp(ordered[n - k])
    sizes = sorted(abs(r) for r in residuals)
    k = math.ceil((n + 1) * coverage - 1e-9)
    if k > n:
        return None
    return math.exp(-sizes[k - 1]), math.exp(sizes[k - 1])


def around(value: float | None, factors: tuple[float, float] | None) -> list[float] | None:
    """[low, high] of a prediction."""
    return None if value is None or factors is None else [value * factors[0], value * factors[1]]


def join(*factors: tuple[float, float] | None) -> tuple[float, float] | None:
    """The wider of several factors on either side; None if one of them is unknown."""
    known = [f for f in factors if f is not None]
    if len(known) < len(factors) or not known:
        return None
    return min(f[0] for f in known), max(f[1] for f in known)
