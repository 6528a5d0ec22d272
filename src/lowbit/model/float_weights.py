"""Weights stored as plain floats: to kernel order, or widened to float32. Nothing is rounded."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.model.arena import Arena
from lowbit.packed import BLOCK_ROWS, FloatTerm, PackedMatrix, pack_values

try:  # The native module transposes many times faster; `pack_values` defines what it must produce.
    from lowbit import _native
except ImportError:
    _native = None  # type: ignore[assignment]
_transpose: Any = getattr(_native, "transpose_values", None)

# The stored bits of each type; bf16 has no NumPy type.
STORED: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "bf16": np.dtype("<u2")}


def float_matrix(
    values: np.ndarray, kind: str, order: np.ndarray | None = None, arena: Arena | None = None
) -> PackedMatrix:
    """A matrix of plain floats.

    values: [rows, columns] of type STORED[kind]. order: int64 [rows]; row r of the result is row order[r].
    arena: where the result is made.
    """
    rows, columns = values.shape
    return PackedMatrix(rows, columns, (FloatTerm(kind, _packed(values, order, arena or Arena())),), kind)


def widened(values: np.ndarray, kind: str) -> np.ndarray:
    """Values of type STORED[kind] as a fresh float32 array."""
    if kind == "bf16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _packed(values: np.ndarray, order: np.ndarray | None, arena: Arena) -> np.ndarray:
    """[rows, columns] to kernel order [blocks, columns, 32]."""
    if _transpose is None:
        return pack_values(values if order is None else values[order])
    rows, columns = values.shape
    shape = (-(-rows // BLOCK_ROWS), columns, BLOCK_ROWS)
    packed = arena.empty(shape, values.dtype.newbyteorder("="))
    _transpose(np.ascontiguousarray(values), packed, order)
    return packed
