"""Memory for packed weights: aligned to cache lines, on huge pages where the system gives them.

A model has hundreds of arrays of a few hundred kilobytes. Allocated one by one each is 16 bytes off a cache
line and takes a page fault for every 4 kB; carved out of large pieces they are aligned, NumPy asks for huge
pages, and the kernels stream them with fewer misses of the address cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

CHUNK_BYTES = 1 << 24  # NumPy asks for huge pages from 4 MB on
ALIGNMENT = 64


class Arena:
    """Gives out uninitialised arrays. A piece is freed when the last array in it is."""

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array that begins at a multiple of 64 bytes."""
        kind = np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        if nbytes >= CHUNK_BYTES // 4:
            return _aligned(nbytes)[:nbytes].view(kind).reshape(shape)
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + nbytes > self._chunk.nbytes:
            self._chunk, start = _aligned(CHUNK_BYTES), 0
        self._used = start + nbytes
        return self._chunk[start : self._used].view(kind).reshape(shape)


def _aligned(nbytes: int) -> np.ndarray:
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]
