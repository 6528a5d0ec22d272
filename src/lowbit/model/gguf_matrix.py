"""GGUF blocks to a PackedMatrix, exactly: the same codes, scales and offsets in another order.

Quantized types are taken apart and packed, plain floats reordered. The native module does the common types
several times faster; what it must produce is what the NumPy functions here give.
"""

from __future__ import annotations

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.model.gguf_types import TENSOR_TYPES, TensorType, split
from lowbit.packed import CodeTerm, FloatTerm, PackedMatrix, codes_shape, pack_codes, pack_groups, pack_values

_SLAB_WEIGHTS = 1 << 20  # taken apart at a time: bounds the temporary memory and stays near the cache
_BLOCK_ROWS = 32
_STORED = {"fp32": "<f4", "fp16": "<f2", "bf16": "<u2"}
_FORMATS = {  # where the catalogue has the very same format
    "Q4_0": "int4-g32",
    "Q5_0": "int5-g32",
    "Q8_0": "int8-g32",
    "Q3_K": "int3-g16-fp32",
    "Q6_K": "int6-g16-fp32",
}


def matrix_from_gguf(
    raw: np.ndarray, kind: TensorType, rows: int, columns: int, order: np.ndarray | None = None
) -> PackedMatrix:
    """The matrix that the bytes of a tensor hold.

    raw: uint8, `rows` x `columns` weights of type `kind`. order: row r of the result is row order[r] of the
    file; None keeps the order.
    Raises UnsupportedError for a type without a decoder.
    """
    stored = raw.reshape(rows, -1)
    if kind.float_type is not None:
        values = stored.view(_STORED[kind.float_type])
        floats = FloatTerm(kind.float_type, pack_values(values if order is None else values[order]))
        return PackedMatrix(rows, columns, (floats,), kind.float_type)
    if kind.split is None:
        known = ", ".join(kind.name for kind in TENSOR_TYPES.values() if kind.readable)
        raise UnsupportedError(
            f"load: type {kind.name} is not readable; lowbit reads {known}: convert the file"
        )
    codes, scales, offsets = _code_arrays(stored, kind, columns, order)
    levels = np.arange(kind.base, kind.base + (1 << kind.bits), dtype=np.float32)[None]
    term = CodeTerm(kind.bits, levels, codes, scales, kind.scale_type, kind.group, offsets=offsets)
    return PackedMatrix(rows, columns, (term,), _FORMATS.get(kind.name, kind.name.lower()))


def _code_arrays(
    stored: np.ndarray, kind: TensorType, columns: int, order: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Packed codes, scales and offsets of a quantized tensor, a slab of rows at a time.

    stored: uint8 [rows, bytes of a row]."""
    rows = stored.shape[0]
    codes = np.empty(codes_shape(rows, columns, kind.bits), np.uint8)
    slab = max(1, _SLAB_WEIGHTS // (columns * _BLOCK_ROWS)) * _BLOCK_ROWS
    groups = columns // kind.group
    scales, offsets = [], []
    for first in range(0, rows, slab):
        part = stored[first : first + slab] if order is None else stored[order[first : first + slab]]
        pieces = split(part, kind)
        packed = pack_codes(pieces.codes.reshape(len(part), columns), kind.bits)
        codes[first // _BLOCK_ROWS : first // _BLOCK_ROWS + len(packed)] = packed
        scales.append(pack_groups(pieces.scales.reshape(len(part), groups)))
        if pieces.offsets is not None:
            offsets.append(pack_groups(pieces.offsets.reshape(len(part), groups)))
    return codes, np.concatenate(scales), np.concatenate(offsets) if offsets else None
