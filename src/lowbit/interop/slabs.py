"""A matrix some rows at a time, so that writing a large one needs little memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from lowbit.packed import BLOCK_ROWS, CodeTerm, FloatTerm, PackedMatrix

try:
    from lowbit import _native
except ImportError:
    _native = None  # type: ignore[assignment]
_float_rows: Any = getattr(_native, "float_rows", None)

SLAB_WEIGHTS = 1 << 22  # 16 MB as float32


def slabs(matrix: PackedMatrix, weights: int = SLAB_WEIGHTS) -> Iterator[tuple[int, PackedMatrix]]:
    """(first row, the matrix of the rows from there on), whole blocks of 32 rows, about `weights` each.

    Codes and floats are views. A matrix with other terms comes in one piece.
    """
    step = max(1, weights // (BLOCK_ROWS * matrix.in_features)) * BLOCK_ROWS
    if not all(isinstance(term, (CodeTerm, FloatTerm)) for term in matrix.terms):
        step = matrix.out_features
    for first in range(0, matrix.out_features, step):
        yield first, rows_of(matrix, first, min(step, matrix.out_features - first))


def rows_of(matrix: PackedMatrix, first: int, count: int) -> PackedMatrix:
    """Rows first .. first + count, `first` a multiple of 32. Not copied where terms are codes or floats."""
    if count == matrix.out_features:
        return matrix
    blocks = slice(first // BLOCK_ROWS, -(-(first + count) // BLOCK_ROWS))
    terms: list[Any] = []
    for term in matrix.terms:
        if isinstance(term, FloatTerm):
            terms.append(replace(term, values=term.values[blocks]))
        else:
            assert isinstance(term, CodeTerm)
            arrays: Any = {name: array[blocks] for name, array in term.arrays() if name != "levels"}
            terms.append(replace(term, **arrays))
    return PackedMatrix(count, matrix.in_features, tuple(terms), matrix.format_name)


def decoded(matrix: PackedMatrix) -> np.ndarray:
    """float32 [out_features, in_features], as `matrix.dequantize()`, faster for plain floats."""
    term = matrix.terms[0]
    if _float_rows is None or len(matrix.terms) > 1 or not isinstance(term, FloatTerm):
        return matrix.dequantize()
    rows = np.empty(matrix.shape, np.float32)
    _float_rows(term.type, np.ascontiguousarray(term.values), 0, rows)
    return rows
