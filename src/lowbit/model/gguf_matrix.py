"""GGUF blocks to a PackedMatrix, exactly: the same codes, scales, factors and offsets in another order.

The functions named `*_reference` define the result in NumPy; the native module gives the same many times
faster, which decides how soon a model speaks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lowbit.model.arena import Arena
from lowbit.model.float_weights import STORED, float_matrix
from lowbit.model.gguf_grids import grid
from lowbit.model.gguf_small import fits_trits
from lowbit.model.gguf_types import TensorType, check_readable, split
from lowbit.packed import (
    BLOCK_ROWS,
    CodeTerm,
    PackedMatrix,
    base3_shape,
    codes_shape,
    pack_base3,
    pack_codes,
    pack_groups,
)
from lowbit.packed.terms import SCALE_DTYPES

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
    "Q1_0": "int1-g128",
    "TQ1_0": "ternary-g256",
    "TQ2_0": "ternary-g256",
    "MXFP4": "mxfp4",
    "NVFP4": "nvfp4",
}


class Arrays(NamedTuple):
    """As in CodeTerm: codes in planes or base 3, scales and offsets of each group [blocks, groups, 32], or of
    each block of weights where there are factors of the groups."""

    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None
    factors: np.ndarray | None = None
    offset_factors: np.ndarray | None = None


def matrix_from_gguf(
    raw: np.ndarray,
    kind: TensorType,
    rows: int,
    columns: int,
    order: np.ndarray | None = None,
    arena: Arena | None = None,
    tensor_scale: float = 1.0,
) -> PackedMatrix:
    """The matrix that the bytes of a tensor hold.

    raw: uint8, `rows` x `columns` weights of type `kind`. order: int64 [rows], row r of the result is row
    order[r] of the file; None keeps the order. arena: where the arrays are made. tensor_scale: times all
    weights of a quantized type. Raises UnsupportedError for a type without a decoder.
    """
    check_readable(kind, "load")
    if kind.float_type is not None:
        values = raw.view(STORED[kind.float_type]).reshape(rows, columns)
        return float_matrix(values, kind.float_type, order, arena)
    kind = as_stored(raw, kind)
    if _repack is None:
        arrays = code_arrays_reference(raw, kind, rows, columns, order)
    else:
        arrays = code_arrays(raw, kind, rows, columns, order, arena)
    term = CodeTerm(
        bits=kind.bits,
        levels=np.array([kind.levels], np.float32),
        scale_type=kind.scale_type,
        group_size=kind.group,
        tensor_scale=kind.unit * tensor_scale,
        packing=kind.packing,
        super_size=kind.block if kind.scale_type == "m8" else 0,
        **arrays._asdict(),
    )
    return PackedMatrix(rows, columns, (term,), _FORMATS.get(kind.name, kind.name.lower()))


def as_stored(raw: np.ndarray, kind: TensorType) -> TensorType:
    """`kind`, or what holds all codes of these blocks: TQ2_0 has a code for the level 2, base 3 has not.

    It occurs in damaged files only, since quantizers write -1, 0 and 1."""
    if kind.name != "TQ2_0" or fits_trits(raw):
        return kind
    return replace(kind, name="tq2_0 with 2", levels=(-1, 0, 1, 2), packing="planes")


def code_arrays_reference(
    raw: np.ndarray, kind: TensorType, rows: int, columns: int, order: np.ndarray | None = None
) -> Arrays:
    """The arrays of a quantized tensor, a slab of rows at a time."""
    stored = raw.reshape(rows, -1)
    slab = max(1, _SLAB_WEIGHTS // (columns * BLOCK_ROWS)) * BLOCK_ROWS
    slabs: list[tuple[np.ndarray | None, ...]] = []
    for first in range(0, rows, slab):
        part = stored[first : first + slab] if order is None else stored[order[first : first + slab]]
        pieces = split(part, kind)
        codes = pieces.codes.reshape(len(part), columns)
        packed = pack_base3(codes) if kind.packing == "base3" else pack_codes(codes, kind.bits)
        numbers = (pieces.scales, pieces.offsets, pieces.factors, pieces.offset_factors)
        slabs.append(
            (packed, *(None if n is None else pack_groups(n.reshape(len(part), -1)) for n in numbers))
        )
    joined: list[Any] = [None if each[0] is None else np.concatenate(each) for each in zip(*slabs)]
    return Arrays(*joined)


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
    base3 = kind.packing == "base3"
    codes = arena.empty(
        base3_shape(rows, columns) if base3 else codes_shape(rows, columns, kind.bits), np.uint8
    )
    groups = (codes.shape[0], columns // kind.group, BLOCK_ROWS)
    with_factors = kind.scale_type == "m8"
    numbers = (codes.shape[0], columns // kind.block, BLOCK_ROWS) if with_factors else groups
    arrays = Arrays(
        codes,
        arena.empty(numbers, SCALE_DTYPES[kind.scale_type]),
        arena.empty(numbers, np.float16) if kind.has_offsets else None,
        arena.empty(groups, np.int8) if with_factors else None,
        arena.empty(groups, np.int8) if with_factors and kind.has_offsets else None,
    )
    members = None if kind.grid is None else grid(kind.grid)
    _repack(kind.number, raw, rows, columns, *arrays, order=order, grid=members, base3=base3)
    return arrays
