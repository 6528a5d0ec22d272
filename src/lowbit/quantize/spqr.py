"""Single weights in 16 bit, the others in any format of codes: SpQR (arXiv:2306.03078).

The weights taken out are those whose rounding costs the most output error once all others make up for it,
(w - q)^2 / (H^-1)_ii with q the nearest level. Then by turns, each step lowering the output error
tr(R H R^T): codes and scales of the rest (descent.py), and the values of the entries, which given all codes
solve H_SS v = (R H)_S over the entries S of a row, R = W less the codes. Each entry takes 7 bytes.

Measured as in descent.py: int2-g96 .0422 in 2.17 bits; with 0.5% and 1% of the weights .0364 in 2.45, .0341
in 2.73; int2-g32 .0351 in 2.5.
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.packed import EntriesTerm, PackedMatrix
from lowbit.quantize.descent import DAMPING, ROUNDS, Curvature, descend
from lowbit.quantize.grid import F32
from lowbit.quantize.parameters import check_coded
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.side import with_term
from lowbit.quantize.statistics import Statistics

TURNS = 2


def spqr(
    weight: np.ndarray,
    format: Format,
    statistics: Statistics,
    *,
    fraction: float = 0.005,
    rounds: int = ROUNDS,
) -> PackedMatrix:
    """A `fraction` of the weights in 16 bit, the others in `format`. Takes 56 * fraction bits more."""
    what = f"spqr to {format.name}"
    check_coded(format, what)
    if not 0 < fraction <= 0.5:
        raise FormatError(f"{what}: fraction={fraction}; it must be above 0 and at most 0.5, such as 0.005")
    hessian = statistics.checked(weight.shape[1], what).hessian
    curvature = statistics.kept(("descent", DAMPING), lambda: Curvature.of(hessian, DAMPING, what))
    places = _sensitive(weight, format, curvature, max(1, round(fraction * weight.size)))
    entries = np.where(places, weight, F32(0))
    matrix = round_to_nearest(weight - entries, format)
    for turn in range(TURNS):
        rest = np.ascontiguousarray(weight - entries)
        fits = ROUNDS if turn == 0 else 0
        matrix = descend(rest, curvature, matrix, fits, rounds).matrix
        entries = _solved(weight - matrix.dequantize(), places, curvature.damped)
    rows, columns = np.nonzero(places)
    term = EntriesTerm.from_places(rows, columns, entries[rows, columns], len(weight))
    return with_term(matrix, term, f"{format.name}+{100 * fraction:g}%entries")


def _sensitive(weight: np.ndarray, format: Format, curvature: Curvature, count: int) -> np.ndarray:
    """bool [out_features, in_features]: the `count` weights that cost most."""
    order, upper = curvature.factor.order, curvature.factor.upper
    inverse = np.empty(len(order), F32)
    inverse[order] = np.square(upper).sum(axis=0)  # H^-1 = U^T U
    cost = np.square(weight - round_to_nearest(weight, format).dequantize()) / inverse
    chosen = np.argpartition(cost.reshape(-1), cost.size - count)[cost.size - count :]
    places = np.zeros(weight.size, bool)
    places[chosen] = True
    return places.reshape(weight.shape)


def _solved(missing: np.ndarray, places: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """The best values of the entries, 0 elsewhere. missing: what the codes lack of the weights."""
    pulls = missing @ hessian
    result = np.zeros_like(missing)
    for row in np.flatnonzero(places.any(axis=1)):
        own = np.flatnonzero(places[row])
        result[row, own] = np.linalg.solve(hessian[np.ix_(own, own)], pulls[row, own])
    return result
