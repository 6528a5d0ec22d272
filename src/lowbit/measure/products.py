"""Matrices to time products with: any format, any size, as many cold copies as a cache cannot hold."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.errors import FormatError, RequestError
from lowbit.formats import Format
from lowbit.measure.machine import cache_bytes, memory_bytes
from lowbit.model.arena import Arena
from lowbit.packed import BLOCK_ROWS, CodeTerm, FloatTerm, PackedMatrix
from lowbit.quantize import quantize_array

# Weights of consecutive products together: several times any last-level cache that the machine reports.
COLD_CACHES, LEAST_COLD_BYTES, MOST_COPIES = 4, 128 * 2**20, 512
PATTERN_ROWS = 64  # rows that are really quantized; the others repeat them, which changes no timing
MOST_FEATURES = 1 << 28  # of a matrix, as PackedMatrix has it
MEMORY_SHARE = 0.8  # of the available memory that one product may take


def parse_shape(text: str | tuple[int, int]) -> tuple[int, int]:
    """`5632x2048` -> (5632, 2048): out_features, in_features."""
    parts = text.lower().split("x") if isinstance(text, str) else [str(n) for n in text]
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() and 0 < int(p) <= MOST_FEATURES for p in parts):
        raise RequestError(
            f"shape {text!r}: must be OUTxIN, both 1 to {MOST_FEATURES}; for example 5632x2048"
        )
    return int(parts[0]), int(parts[1])


def random_matrix(fmt: Format, out_features: int, in_features: int) -> PackedMatrix:
    """Normal weights in `fmt`: PATTERN_ROWS rows are quantized and repeated to `out_features`.

    Terms that do not lie in blocks of rows (codes and floats do) cannot be repeated; a matrix that has one
    is quantized whole.
    """
    rows = min(PATTERN_ROWS, out_features)
    pattern = quantize_array(_weights(fmt, rows, in_features), fmt, search="minmax")
    if rows == out_features:
        return pattern
    if not all(type(term) in (CodeTerm, FloatTerm) for term in pattern.terms):
        return quantize_array(_weights(fmt, out_features, in_features), fmt, search="minmax")
    meta, arrays = pattern.state()
    # The first axis of every packed array is blocks of 32 rows; tables of levels belong to no row.
    blocks = -(-out_features // BLOCK_ROWS)
    repeated = {
        key: a if key.endswith(".levels") else np.resize(a, (blocks, *a.shape[1:]))
        for key, a in arrays.items()
    }
    return PackedMatrix.from_state({**meta, "shape": [out_features, in_features]}, repeated)


def _weights(fmt: Format, out_features: int, in_features: int) -> np.ndarray:
    """Normal weights, float32; what a lossless format is for is of type bfloat16."""
    weight = np.random.default_rng(0).standard_normal((out_features, in_features), dtype=np.float32)
    return (weight.view(np.uint32) & 0xFFFF0000).view(np.float32) if fmt.float_type else weight


def cold_bytes() -> int:
    """Weights that no cache of this machine holds."""
    return max(LEAST_COLD_BYTES, COLD_CACHES * (cache_bytes(3) or 0))


def copies_of(matrix: PackedMatrix, total_bytes: int) -> list[PackedMatrix]:
    """Enough copies of `matrix` to fill `total_bytes`, in an arena as the loader makes them."""
    count = max(1, min(MOST_COPIES, -(-total_bytes // matrix.nbytes)))
    meta, arrays = matrix.state()
    arena = Arena()

    def copy(array: np.ndarray) -> np.ndarray:
        new = arena.empty(array.shape, array.dtype)
        new[...] = array
        return new

    return [PackedMatrix.from_state(meta, {key: copy(a) for key, a in arrays.items()}) for _ in range(count)]


def refuse_too_large(fmt: Format, shape: tuple[int, int], batch: int) -> None:
    """Raise RequestError if such a product, its copies and its activations would not fit into memory."""
    out_features, in_features = shape
    try:
        weights = out_features * in_features * fmt.bits_per_weight(in_features) / 8
    except FormatError:  # the group does not divide the row: reported where it is measured
        return
    pattern = min(PATTERN_ROWS, out_features) * in_features * 4
    # The matrix and its copies; the rows in float32, several of them while quantizing; x, its integers, y.
    needed = weights + max(weights, cold_bytes()) + 6 * pattern + batch * 4 * (2 * in_features + out_features)
    available = memory_bytes("MemAvailable")
    if available is not None and needed > MEMORY_SHARE * available:
        raise RequestError(
            f"{fmt.name} {out_features}x{in_features}, batch {batch}: needs {needed / 1e9:,.1f} GB and "
            f"{available / 1e9:,.1f} GB are available; choose a smaller shape or batch"
        )


def expected_product(matrix: PackedMatrix, x: np.ndarray) -> Any:
    """x @ W.T in float64 on the dequantized weights."""
    return x.astype(np.float64) @ matrix.dequantize().astype(np.float64).T
