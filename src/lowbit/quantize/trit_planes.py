"""Trit planes: w as a sum of ternary terms, each with its own scale per group.

Starts from the largest level reached and a third of it per plane (balanced ternary digits) as well as from a
greedy fit, alternates from both (stacked.py), and keeps the better.
Source: PTQTP, arXiv:2509.16989 (ridge least squares and 9-way assignment).
"""

import numpy as np

from lowbit.quantize.grid import F32
from lowbit.quantize.search import importance, total
from lowbit.quantize.stacked import alternate, assign

ALTERNATIONS = 10
LEVELS = (-1.0, 0.0, 1.0)


def fit_trits(
    w: np.ndarray, planes: int, scale_type: str, counts: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit `planes` ternary terms to each group.

    w: float32 [group_size, N]. counts: as in search.search_scales.
    Returns (codes uint8 [planes, group_size, N], 0, 1, 2 for -1, 0, +1; scales float32 [planes, N]).
    """
    best_scales = np.zeros((planes, w.shape[1]), F32)
    counts = importance(w) * (F32(1) if counts is None else counts)
    best_values, best_errors = assign(w, counts, best_scales, LEVELS)
    largest = np.abs(w).max(axis=0)
    for start in (digits(planes)[:, None] * largest, _greedy(w, planes)):
        values, scales, errors = alternate(w, counts, start, LEVELS, scale_type, ALTERNATIONS)
        better = errors < best_errors
        best_scales = np.where(better, scales, best_scales)
        best_values = np.where(better, values, best_values)
        best_errors = np.where(better, errors, best_errors)
    return (best_values + 1).astype(np.uint8), best_scales


def digits(planes: int) -> np.ndarray:
    """Scales in the ratio 1, 1/3, 1/9 .. with a largest sum of 0.8: float32 [planes]."""
    powers = 3.0 ** -np.arange(planes)
    return (0.8 * powers / powers.sum()).astype(F32)


def _greedy(w: np.ndarray, planes: int) -> np.ndarray:
    """Each plane in turn fits what remains: threshold 0.7 of the mean magnitude, then its mean above it.

    Source of the threshold: ternary weight networks, arXiv:1605.04711, eq. 6.
    """
    rest = w.copy()
    scales = np.zeros((planes, w.shape[1]), F32)
    for plane in range(planes):
        magnitude = np.abs(rest)
        threshold = F32(0.7) * (total(magnitude) * F32(1 / len(w)))
        large = magnitude > threshold
        count = np.maximum(large.sum(axis=0), 1).astype(F32)
        scales[plane] = total(np.where(large, magnitude, F32(0))) / count
        signed = np.where(rest > 0, scales[plane], -scales[plane])
        rest -= np.where(large, signed, F32(0))
    return scales
