"""Binary-coded quantization: w as a sum of signs, each plane with its own scale per group.

Greedy start (the sign of what remains, its mean magnitude), then alternating fits (stacked.py).
Source: arXiv:1802.00150 (alternating multi-bit quantization), used by ShiftAddLLM, arXiv:2406.05981.
"""

import numpy as np

from lowbit.quantize.grid import F32
from lowbit.quantize.search import importance, total
from lowbit.quantize.stacked import alternate

ALTERNATIONS = 6
LEVELS = (-1.0, 1.0)


def fit_planes(
    w: np.ndarray, planes: int, scale_type: str, counts: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit `planes` sign terms to each group.

    w: float32 [group_size, N]. counts: as in search.search_scales.
    Returns (codes uint8 [planes, group_size, N], 0 for -1 and 1 for +1; scales float32 [planes, N]).
    """
    rest = w.copy()
    scales = np.empty((planes, w.shape[1]), F32)
    for plane in range(planes):
        scales[plane] = total(np.abs(rest)) * F32(1 / len(w))
        rest -= np.where(rest >= 0, scales[plane], -scales[plane])
    counts = importance(w) * (F32(1) if counts is None else counts)
    signs, scales, _ = alternate(w, counts, scales, LEVELS, scale_type, ALTERNATIONS)
    return (signs > 0).astype(np.uint8), scales
