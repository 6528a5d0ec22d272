"""Trit planes: w as a sum of ternary terms, each with its own scale per group.

Starts from the largest level reached and a third of it per plane (balanced ternary digits) as well as from a
greedy fit, keeps the better, then alternates least squares for the scales with an exact search over all
3**planes sums per weight. Errors count by `search.importance`.
Source: PTQTP, arXiv:2509.16989 (ridge least squares and 9-way assignment).
"""

import numpy as np

from lowbit.quantize.binary_coded import assign, least_squares
from lowbit.quantize.grid import F32
from lowbit.quantize.scale import round_scale
from lowbit.quantize.search import importance

ALTERNATIONS = 10
LEVELS = (-1.0, 0.0, 1.0)


def fit_trits(w: np.ndarray, planes: int, scale_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Fit `planes` ternary terms to each group.

    w: float32 [group_size, N].
    Returns (codes uint8 [planes, group_size, N], 0, 1, 2 for -1, 0, +1; scales float32 [planes, N]).
    """
    best_scales = np.zeros((planes, w.shape[1]), F32)
    counts = importance(w)
    best_values, best_errors = assign(w, counts, best_scales, LEVELS)
    for start in (_digits(w, planes), _greedy(w, planes)):
        scales = round_scale(start, scale_type)
        values, errors = assign(w, counts, scales, LEVELS)
        for _ in range(ALTERNATIONS):
            candidate = round_scale(least_squares(w, counts, values, scales), scale_type)
            new_values, new_errors = assign(w, counts, candidate, LEVELS)
            better = new_errors < errors
            if not better.any():
                break
            scales = np.where(better, candidate, scales)
            values = np.where(better, new_values, values)
            errors = np.where(better, new_errors, errors)
        better = errors < best_errors
        best_scales = np.where(better, scales, best_scales)
        best_values = np.where(better, values, best_values)
        best_errors = np.where(better, errors, best_errors)
    return (best_values + 1).astype(np.uint8), best_scales


def _digits(w: np.ndarray, planes: int) -> np.ndarray:
    """Scales 1, 1/3, 1/9 .. of a largest sum at 80% of the largest magnitude."""
    powers = F32(3.0) ** -np.arange(planes, dtype=F32)
    return (powers / powers.sum())[:, None] * (F32(0.8) * np.abs(w).max(axis=0))


def _greedy(w: np.ndarray, planes: int) -> np.ndarray:
    """Each plane in turn fits what remains: threshold 0.7 of the mean magnitude, then its mean above it.

    Source of the threshold: ternary weight networks, arXiv:1605.04711, eq. 6.
    """
    rest = w.copy()
    scales = np.zeros((planes, w.shape[1]), F32)
    for plane in range(planes):
        magnitude = np.abs(rest)
        large = magnitude > F32(0.7) * magnitude.mean(axis=0)
        count = np.maximum(large.sum(axis=0), 1)
        scales[plane] = (magnitude * large).sum(axis=0) / count
        rest -= np.sign(rest) * large * scales[plane]
    return scales
