"""Which widths of codes meet one token by table lookup: measured once per machine beside the crossovers.

Tables of sums of activations replace products where multiplying bytes is dear: at 1 bit on AVX2, for
example. Which way is faster depends on the machine and changes no result. LOWBIT_KERNEL=table or =direct
decides alone.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np

__all__ = ["BITS", "least_seconds", "measure"]

BITS = (1, 2, 3)  # widths that have tables, native/isa/table.cc
SHAPE, GROUP = (2048, 2048), 64
COPIES, REPEATS = 8, 5


def measure() -> int | None:
    """The faster way for each width and each of 8- and 16-bit activations, as `_native.set_tables` takes it.

    Takes 0.1 s. Leaves the setting as it found it. None where LOWBIT_KERNEL has decided: nothing to compare.
    """
    from lowbit import _native

    if os.environ.get("LOWBIT_KERNEL"):
        return None
    before, widths = _native.tables(), 0
    x = np.ones((1, SHAPE[1]), np.float32)
    try:
        for bits in BITS:
            matrices = [_matrix(bits) for _ in range(COPIES)]
            for activation_bits in (8, 16):
                bit = 1 << (activation_bits - 8 + bits)
                looked_up, direct = (least_seconds(w, x, matrices, activation_bits) for w in (bit, 0))
                if looked_up < direct:
                    widths |= bit
    finally:
        _native.set_tables(before)
    return widths


def least_seconds(widths: int, x: np.ndarray, matrices: list[Any], activation_bits: int) -> float:
    """The least time of several rounds through all matrices."""
    from lowbit import _native

    _native.set_tables(widths)
    least = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        for matrix in matrices:
            _native.matmul(x, matrix, activation_bits)
        least = min(least, time.perf_counter() - started)
    return least


def _matrix(bits: int) -> Any:
    """A native matrix of evenly spaced levels."""
    from lowbit import _native

    out_features, in_features = SHAPE
    codes = np.random.default_rng(0).integers(0, 256, out_features * in_features * bits // 8, np.uint8)
    scales = np.ones((out_features // 32, in_features // GROUP, 32), np.float16)
    matrix = _native.Matrix(out_features, in_features)
    matrix.add_code_term(bits, codes, "fp16", scales, GROUP, np.arange(2**bits, dtype=np.float32)[None])
    return matrix
