"""Flexible dual binarization: w as a sum of two scaled planes of 0 and 1.

Starts as DB-LLM does from 2-bit integers -2 .. 1 times t: the scales -2t and t give just these levels, as
sums of one, the other, both or neither. Then alternating fits (stacked.py) set both scales free.
Source: DB-LLM, arXiv:2402.11960, section 3.2.
"""

import numpy as np

from lowbit.formats import Format
from lowbit.packed import CodeTerm
from lowbit.quantize.grid import F32, make_grid
from lowbit.quantize.native import largest_magnitude, quantize_native
from lowbit.quantize.search import importance, search_scales
from lowbit.quantize.stacked import alternate

ALTERNATIONS = 6
LEVELS = (0.0, 1.0)


def fit_dual(
    w: np.ndarray, planes: int, scale_type: str, counts: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit two planes to each group.

    w: float32 [group_size, N]. planes: 2. counts: as in search.search_scales.
    Returns (codes uint8 [2, group_size, N], scales float32 [2, N], mostly of opposite signs).
    """
    step = _integer_scales(w, scale_type)
    start = np.stack([F32(-2) * step, step])
    counts = importance(w) * (F32(1) if counts is None else counts)
    values, scales, _ = alternate(w, counts, start, LEVELS, scale_type, ALTERNATIONS)
    return values.astype(np.uint8), scales


def _integer_scales(w: np.ndarray, scale_type: str) -> np.ndarray:
    """The scales that round-to-nearest finds for 2-bit integers, [N]."""
    integers = Format.integer(2, 0, scale_type=scale_type)
    rows = np.ascontiguousarray(w.T)
    found = quantize_native(rows, integers, "mse", largest_magnitude(rows))
    if found is None:
        return search_scales(w, make_grid(integers.tables[0]), 2, scale_type, "mse").scales
    (term,) = found[0].terms
    assert isinstance(term, CodeTerm)
    return term.effective_scales(len(rows))[:, 0]
