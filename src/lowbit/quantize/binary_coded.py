"""Binary-coded quantization: w as a sum of signs, each plane with its own scale per group.

Greedy start (the sign of what remains, its mean magnitude), then alternating: least squares for the scales of
a group given its signs, exact search over all 2**planes sums for the signs given the scales. Errors count by
`search.importance`.
Source: arXiv:1802.00150 (alternating multi-bit quantization), used by ShiftAddLLM, arXiv:2406.05981.
"""

import numpy as np

from lowbit.quantize.grid import F32
from lowbit.quantize.scale import round_scale
from lowbit.quantize.search import importance

ALTERNATIONS = 6


def fit_planes(w: np.ndarray, planes: int, scale_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Fit `planes` sign terms to each group.

    w: float32 [group_size, N].
    Returns (codes uint8 [planes, group_size, N], 0 for -1 and 1 for +1; scales float32 [planes, N]).
    """
    rest = w.copy()
    scales = np.empty((planes, w.shape[1]), F32)
    for plane in range(planes):
        scales[plane] = np.abs(rest).mean(axis=0)
        rest -= np.where(rest >= 0, scales[plane], -scales[plane])
    scales = round_scale(scales, scale_type)
    counts = importance(w)
    signs, errors = assign(w, counts, scales, (-1.0, 1.0))
    for _ in range(ALTERNATIONS):
        candidate = round_scale(least_squares(w, counts, signs, scales), scale_type)
        new_signs, new_errors = assign(w, counts, candidate, (-1.0, 1.0))
        better = new_errors < errors
        if not better.any():
            break
        scales = np.where(better, candidate, scales)
        signs = np.where(better, new_signs, signs)
        errors = np.where(better, new_errors, errors)
    return (signs > 0).astype(np.uint8), scales


def assign(
    w: np.ndarray, counts: np.ndarray, scales: np.ndarray, levels: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The combination of levels whose scaled sum is nearest to each weight.

    counts: how much the error of each weight counts
    scales: float32 [planes, N]; every plane takes its values from `levels`
    Returns (values float32 [planes, group_size, N], error float32 [N]). Ties: the first combination.
    """
    planes = len(scales)
    best = np.full(w.shape, np.inf, F32)
    chosen = np.zeros(w.shape, np.int32)
    combinations = (
        np.stack(np.meshgrid(*[levels] * planes, indexing="ij"), -1).reshape(-1, planes).astype(F32)
    )
    for number, combination in enumerate(combinations):
        distance = np.abs(w - combination @ scales)
        nearer = distance < best
        best[nearer] = distance[nearer]
        chosen[nearer] = number
    return np.moveaxis(combinations[chosen], -1, 0), (counts * np.square(best)).sum(axis=0)


def least_squares(
    w: np.ndarray, counts: np.ndarray, values: np.ndarray, scales: np.ndarray, ridge: float = 1e-4
) -> np.ndarray:
    """Best scales [planes, N] given the values [planes, group_size, N] of each plane.

    The ridge, relative to the group size, pulls towards the present scales where planes coincide.
    """
    v = values.transpose(2, 0, 1).astype(np.float64)
    counted = v * counts.T[:, None, :]
    weight = ridge * w.shape[0]
    normal = counted @ v.transpose(0, 2, 1) + weight * np.eye(len(scales))
    right = np.einsum("npg,gn->np", counted, w.astype(np.float64)) + weight * scales.T.astype(np.float64)
    return np.linalg.solve(normal, right[:, :, None])[:, :, 0].T.astype(F32)
