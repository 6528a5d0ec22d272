"""Sums of scaled planes of few levels, fitted by turns: levels given the scales, scales given the levels.

w = sum over p of scales[p] * values[p], each value one of `levels`. Given the scales, every weight takes the
best of all combinations; given the values, the scales solve a weighted least squares problem of each group.
Errors count by `search.importance`. Used by binary_coded.py and trit_planes.py.

All arithmetic is float32 in the order written here, sums over a group in index order; native/isa/rtn_fit.h
gives the same bits.
Source: arXiv:1802.00150 (alternating multi-bit quantization); PTQTP, arXiv:2509.16989 (ridge, joint search).
"""

from itertools import product

import numpy as np

from lowbit.quantize.grid import F32
from lowbit.quantize.scale import round_scale
from lowbit.quantize.search import total

RIDGE = 1e-4  # of the group size; pulls towards the present scales where planes coincide


def assign(
    w: np.ndarray, counts: np.ndarray, scales: np.ndarray, levels: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The combination of levels whose scaled sum is nearest to each weight.

    counts: how much the error of each weight counts
    scales: float32 [planes, N]; every plane takes its values from `levels`
    Returns (values float32 [planes, group_size, N], error float32 [N]). Ties: the first combination.
    """
    best = np.full(w.shape, np.inf, F32)
    chosen = np.zeros(w.shape, np.int32)
    combinations = np.array(list(product(levels, repeat=len(scales))), F32)
    for number, combination in enumerate(combinations):
        distance = np.abs(w - weighted_sum(combination, scales))
        nearer = distance < best
        best[nearer] = distance[nearer]
        chosen[nearer] = number
    return np.moveaxis(combinations[chosen], -1, 0), total(counts * np.square(best))


def weighted_sum(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Sum of values[p] * scales[p] over the planes, in their order. values: float32 [planes, ..]."""
    result = values[0] * scales[0]
    for value, scale in zip(values[1:], scales[1:], strict=True):
        result = result + value * scale
    return result


def least_squares(
    w: np.ndarray, counts: np.ndarray, values: np.ndarray, scales: np.ndarray, ridge: float = RIDGE
) -> np.ndarray:
    """Best scales [planes, N] given the values [planes, group_size, N] of each plane.

    Gaussian elimination without pivots: the ridge keeps the normal equations positive definite.
    """
    planes = len(scales)
    weight = F32(ridge) * F32(len(w))
    matrix: list[list[np.ndarray]] = [[] for _ in range(planes)]  # row i holds columns i, i + 1, ..
    right = []
    for i in range(planes):
        counted = counts * values[i]
        matrix[i] = [total(counted * values[j]) for j in range(i, planes)]
        matrix[i][0] = matrix[i][0] + weight
        right.append(total(counted * w) + weight * scales[i])
    for k in range(planes):
        inverse = F32(1) / matrix[k][0]
        for i in range(k + 1, planes):
            factor = matrix[k][i - k] * inverse
            for j in range(i, planes):
                matrix[i][j - i] = matrix[i][j - i] - factor * matrix[k][j - k]
            right[i] = right[i] - factor * right[k]
    solution = np.empty_like(scales)
    for k in reversed(range(planes)):
        rest = right[k]
        for j in range(k + 1, planes):
            rest = rest - matrix[k][j - k] * solution[j]
        solution[k] = rest / matrix[k][0]
    return solution


def alternate(
    w: np.ndarray,
    counts: np.ndarray,
    start: np.ndarray,
    levels: tuple[float, ...],
    scale_type: str,
    rounds: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values [planes, group_size, N], scales [planes, N], errors [N]) from the scales `start`."""
    scales = round_scale(start, scale_type)
    values, errors = assign(w, counts, scales, levels)
    for _ in range(rounds):
        candidate = round_scale(least_squares(w, counts, values, scales), scale_type)
        new_values, new_errors = assign(w, counts, candidate, levels)
        better = new_errors < errors
        if not better.any():
            break
        scales = np.where(better, candidate, scales)
        values = np.where(better, new_values, values)
        errors = np.where(better, new_errors, errors)
    return values, scales, errors
