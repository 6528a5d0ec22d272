"""GGUF blocks to a PackedMatrix, exactly: the same codes, scales and offsets in another order.

The functions named `*_reference` define the result in NumPy; the native module gives the same many times
faster, which decides how soon a model speaks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lowbit.model.arena import Arena
from lowbit.model.float_weights import STORED, float_matrix
from lowbit.model.gguf_types import TensorType, check_readable, split
from lowbit.packed import (
    BLOCK_ROWS,
    CodeTerm,
    PackedMatrix,
    codes_shape,
    pack_codes,
    pack_groups,
)

try:
    from lowbit import _native
except ImportError:
    _native = None  # type: ignore[assignment]
_repack: Any = getattr(_native, "repack", None)

_SLAB_WEIGHTS = 1 << 20  # taken apart at a time: bounds the temporary memory and stays near the cache
_FORMATS = {  # where the catalogue has the very same format
    "Q4_0": "int4-g32",
    "Q5_0": "int5-g32",
    "Q8_0": "int8-g32",
    "Q3_K": "int3-g16-fp32",
    "Q6_K": "int6-g16-fp32",
}


class Arrays(NamedTuple):
    """codes: uint8 [blocks, chunks, 2, 64 * bits]; scales and, where the type has them, offsets:
    [blocks, groups, 32]."""

    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None


def matrix_from_gguf(
    raw: np.ndarray,
    kind: TensorType,
    rows: int,
    columns: int,
    order: np.ndarray | None = None,
    arena: Arena | None = None,
) -> PackedMatrix:
    """The matrix that the bytes of a tensor hold.

    raw: uint8, `rows` x `columns` weights of type `kind`. order: int64 [rows], row r of the result is row
    order[r] of the file; None keeps the order. arena: where the arrays are made.
    Raises UnsupportedError for a type without a decoder.
    """
    check_readable(kind, "load")
    if kind.float_type is not None:
        values = raw.view(STORED[kind.float_type]).reshape(rows, columns)
        return float_matrix(values, kind.float_type, order, arena)
    if _repack is None:
        codes, scales, offsets = code_arrays_reference(raw, kind, rows, columns, order)
    else:
        codes, scales, offsets = code_arrays(raw, kind, rows, columns, order, arena)
    levels = np.arange(kind.base, kind.base + (1 << kind.bits), dtype=np.float32)[None]
    term = CodeTerm(kind.bits, levels, codes, scales, kind.scale_type, kind.group, offsets=offsets)
    return PackedMatrix(rows, columns, (term,), _FORMATS.get(kind.name, kind.name.lower()))


def code_arrays_reference(
    raw: np.ndarray, kind: TensorType, rows: int, columns: int, order: np.ndarray | None = None
) -> Arrays:
    """Packed codes, scales and offsets of a quantized tensor, a slab of rows at a time."""
    stored = raw.reshape(rows, -1)
    codes = np.empty(codes_shape(rows, columns, kind.bits), np.uint8)
    slab = max(1, _SLAB_WEIGHTS // (columns * BLOCK_ROWS)) * BLOCK_ROWS
    groups = columns // kind.group
    scales, offsets = [], []
    for first in range(0, rows, slab):
        part = stored[first : first + slab] if order is None else stored[order[first : first + slab]]
        pieces = split(part, kind)
        packed = pack_codes(pieces.codes.reshape(len(part), columns), kind.bits)
        codes[first // BLOCK_ROWS : first // BLOCK_ROWS + len(packed)] = packed
        scales.append(pack_groups(pieces.scales.reshape(len(part), groups)))
        if pieces.offsets is not None:
            offsets.append(pack_groups(pieces.offsets.reshape(len(part), groups)))
    return Arrays(codes, np.concatenate(scales), np.concatenate(offsets) if offsets else None)


def code_arrays(
    raw: np.ndarray,
    kind: TensorType,
    rows: int,
    columns: int,
    order: np.ndarray | None = None,
    arena: Arena | None = None,
) -> Arrays:
    """The same, by the native module."""
    arena = arena or Arena()
    codes = arena.empty(codes_shape(rows, columns, kind.bits), np.uint8)
    shape = (codes.shape[0], columns // kind.group, BLOCK_ROWS)
    dtype = np.float32 if kind.scale_type == "fp32" else np.float16
    scales = arena.empty(shape, dtype)
    offsets = arena.empty(shape, dtype) if kind.has_offsets else None
    _repack(kind.number, raw, rows, columns, codes, scales, offsets, order)
    return Arrays(codes, scales, offsets)
