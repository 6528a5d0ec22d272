"""Weights as a network has them, and blocks that are hard; for tests only."""

from __future__ import annotations

import numpy as np

from lowbit.formats import parse_format
from lowbit.packed import PackedMatrix
from lowbit.quantize.round_to_nearest import quantize_with_error


def weights(rows: int = 70, columns: int = 512, seed: int = 0) -> np.ndarray:
    """float32 [rows, columns] with heavy tails; a row of zeros, one of equal numbers, one with an outlier."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_t(5, (rows, columns)) * 0.02).astype(np.float32)
    values[1] = 0
    values[2] = 0.25
    values[3, 7] = 30.0
    values[4] = np.abs(values[4])
    values[5] *= np.float32(2.0**-9)
    return values


def quantized(name: str, values: np.ndarray | None = None) -> PackedMatrix:
    return quantize_with_error(weights() if values is None else values, parse_format(name))[0]
