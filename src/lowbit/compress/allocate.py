"""Which format each layer takes: least damage under a budget, a multiple-choice knapsack.

Of every layer exactly one format is chosen; the sum of sensitivities is least among all choices whose sizes
(and seconds, where they are limited) add up to no more than the budget. Solved as an integer program by
SciPy's HiGHS. With sizes as the only limit and Tr(H) ||dW||^2 for sensitivities this is HAWQ-V3
(arXiv:2011.10680, section 3.4); with measured seconds it is OHQ's choice (arXiv:2309.01945).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from lowbit.errors import FormatError
from lowbit.quiet import without_output

_SCALE = 1e6  # of the objective: HiGHS stops at an absolute gap of 1e-6
_GAP = 1e-7  # to the optimum, relative to the largest possible gain: far below what is known of sensitivities
_NODES = 200_000  # of the search; a limit on time would make the result a matter of the machine


@dataclass(frozen=True)
class Allocation:
    """chosen: number of the format for each layer; the sums of what was chosen; whether it is the optimum."""

    chosen: tuple[int, ...]
    sensitivity: float
    size: int
    seconds: float
    optimal: bool


def allocate(
    sensitivities: np.ndarray,
    sizes: np.ndarray,
    budget: int,
    seconds: np.ndarray | None = None,
    most_seconds: float | None = None,
) -> Allocation:
    """The formats of least summed sensitivity whose sizes sum to at most `budget`.

    sensitivities: float [layers, formats]; infinite where a format does not fit a layer
    sizes: integers >= 0 [layers, formats], in bytes (or bits: any unit, that of `budget`)
    seconds: float >= 0 [layers, formats], measured; limited together by `most_seconds`

    A choice that is nowhere better than another of its layer is never taken; of equals the first one is.
    Of layers with equal rows the earlier ones take the larger formats, so that ties are broken alike always.
    Raises FormatError if shapes or values do not fit, or if no choice meets the limits; it names the nearest
    budget that can be met.
    """
    cost, size, time = _checked(sensitivities, sizes, seconds, most_seconds)
    usable = np.isfinite(cost)
    _check_budget(size, time, usable, budget, most_seconds)
    usable &= ~_dominated(cost, size, time, usable)
    chosen, optimal = _solve(cost, size, time, usable, budget, most_seconds)
    chosen = _settle_ties(chosen, cost, size, time)
    rows = np.arange(len(cost))
    return Allocation(
        tuple(int(c) for c in chosen),
        float(cost[rows, chosen].sum()),
        int(size[rows, chosen].sum()),
        float(time[rows, chosen].sum()),
        optimal,
    )


def _checked(
    sensitivities: np.ndarray, sizes: np.ndarray, seconds: np.ndarray | None, most_seconds: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cost, size = np.asarray(sensitivities, np.float64), np.asarray(sizes)
    if cost.ndim != 2 or 0 in cost.shape or size.shape != cost.shape or size.dtype.kind not in "iu":
        raise FormatError(
            f"allocate: sensitivities are {list(cost.shape)}, sizes {size.dtype} {list(size.shape)}; both "
            "must be [layers, formats], sizes integers"
        )
    if (seconds is None) != (most_seconds is None):
        raise FormatError("allocate: seconds and most_seconds belong together; give both or none")
    time = np.zeros(cost.shape) if seconds is None else np.asarray(seconds, np.float64)
    if time.shape != cost.shape or not np.isfinite(time).all() or (time < 0).any() or (size < 0).any():
        raise FormatError(f"allocate: sizes and seconds must be finite, not negative, {list(cost.shape)}")
    if np.isnan(cost).any() or (cost == -np.inf).any():
        raise FormatError("allocate: a sensitivity is NaN or -inf; measure again")
    for layer in np.flatnonzero(~np.isfinite(cost).any(axis=1)):
        raise FormatError(f"allocate: no format fits layer {layer}; add one to the choices")
    return cost, size.astype(np.int64), time


def _check_budget(
    size: np.ndarray, time: np.ndarray, usable: np.ndarray, budget: int, most_seconds: float | None
) -> None:
    least = int(np.where(usable, size, np.iinfo(np.int64).max).min(axis=1).sum())
    if least > budget:
        raise FormatError(
            f"allocate: the budget is {budget}, and the smallest of all choices sum to {least}; raise the "
            "budget to that, or add smaller formats"
        )
    fastest = float(np.where(usable, time, np.inf).min(axis=1).sum())
    if most_seconds is not None and fastest > most_seconds:
        raise FormatError(
            f"allocate: the limit is {most_seconds:.3g} seconds, and the fastest of all choices take "
            f"{fastest:.3g}; raise the limit to that, or add faster formats"
        )


def _dominated(cost: np.ndarray, size: np.ndarray, time: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """bool [layers, formats]: another format of the layer is as good in everything; of equals, the first."""
    beaten = np.zeros(cost.shape, bool)
    for j in range(cost.shape[1]):
        for i in range(cost.shape[1]):
            if i == j:
                continue
            as_good = np.ones(len(cost), bool)
            better = np.zeros(len(cost), bool)
            for values in (cost, size, time):
                as_good &= values[:, i] <= values[:, j]
                better |= values[:, i] < values[:, j]
            beaten[:, j] |= usable[:, i] & as_good & (better | (i < j))
    return beaten


def _solve(
    cost: np.ndarray,
    size: np.ndarray,
    time: np.ndarray,
    usable: np.ndarray,
    budget: int,
    most_seconds: float | None,
) -> tuple[np.ndarray, bool]:
    """(number of the format of each layer, is it the optimum) over the `usable` choices."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    layers, formats = np.nonzero(usable)
    count = len(layers)
    gain = cost[layers, formats] - np.where(usable, cost, np.inf).min(axis=1)[layers]
    largest = float(gain.max()) or 1.0
    unit = int(np.gcd.reduce(size[layers, formats])) or 1
    weight = (size[layers, formats] // unit).astype(np.float64)
    limit = budget // unit
    one_each = csr_array((np.ones(count), (layers, np.arange(count))), shape=(len(cost), count))
    while True:
        limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None], -np.inf, limit)]
        if most_seconds is not None:
            share = time[layers, formats] / (most_seconds or 1.0)
            limits.append(LinearConstraint(share[None], -np.inf, 1.0 if most_seconds else 0.0))
        with without_output():
            result = milp(
                gain / largest * _SCALE,
                integrality=np.ones(count),
                bounds=Bounds(0, 1),
                constraints=limits,
                options={"mip_rel_gap": _GAP, "node_limit": _NODES},
            )
        if result.x is None:
            if most_seconds is None:
                raise FormatError(f"allocate: no choice found within {budget}; raise the budget")
            _refuse_together(cost, size, time, usable, budget, most_seconds)
        chosen = formats[
            [np.flatnonzero(layers == i)[result.x[layers == i].argmax()] for i in range(len(cost))]
        ]
        over = int(size[np.arange(len(cost)), chosen].sum()) - budget
        if over <= 0:
            return chosen, result.status == 0
        limit -= -(-over // unit)  # the solver's tolerance let it pass: ask for that much less


def _refuse_together(
    cost: np.ndarray, size: np.ndarray, time: np.ndarray, usable: np.ndarray, budget: int, most_seconds: float
) -> NoReturn:
    """Each limit can be met alone: say what the fastest choice of that size takes."""
    fastest, _ = _solve(time, size, time, usable, budget, None)
    seconds = float(time[np.arange(len(cost)), fastest].sum())
    raise FormatError(
        f"allocate: no choice meets both {budget} and {most_seconds:.3g} seconds; within that size the "
        f"fastest takes {seconds:.3g}; raise one of the limits"
    )


def _settle_ties(chosen: np.ndarray, cost: np.ndarray, size: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Give the larger formats to the earlier of layers that are alike in everything."""
    alike: dict[bytes, list[int]] = {}
    for layer in range(len(cost)):
        key = cost[layer].tobytes() + size[layer].tobytes() + time[layer].tobytes()
        alike.setdefault(key, []).append(layer)
    settled = chosen.copy()
    for layers in alike.values():
        ordered = sorted(chosen[layers], key=lambda c: (-size[layers[0], c], c))
        settled[layers] = ordered
    return settled
