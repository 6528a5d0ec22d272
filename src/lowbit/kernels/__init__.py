"""Activations times a PackedMatrix.

`reference.py` defines the result in NumPy; `matmul` here runs the native kernels that equal it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lowbit.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from lowbit.packed import PackedMatrix

__all__ = ["ACTIVATION_BITS", "matmul"]

ACTIVATION_BITS = {"int8": 8, "int16": 16}


def matmul(x: np.ndarray, m: PackedMatrix, activations: str = "int8") -> np.ndarray:
    """`x @ m.dequantize().T` with quantized activations and integer accumulation.

    x: [batch, in_features], any real dtype, finite; computed from float32.
    m: a PackedMatrix [out_features, in_features].
    activations: "int8" (per row and group) or "int16" (two int8 limbs).
    Returns float32 [batch, out_features]; equal for every number of threads.
    """
    if activations not in ACTIVATION_BITS:
        allowed = ", ".join(ACTIVATION_BITS)
        raise UnsupportedError(f"matmul: activations={activations!r} is unknown; choose one of {allowed}")
    if not hasattr(m, "native"):
        raise FormatError(
            f"matmul: the second argument is {type(m).__name__}, not a PackedMatrix; "
            "make one with lowbit.quantize(array, format)"
        )
    x = np.asarray(x)
    if x.ndim != 2 or x.shape[1] != m.in_features:
        raise FormatError(
            f"matmul: x has shape {list(x.shape)}; required [batch, {m.in_features}] for a matrix of "
            f"{m.out_features} x {m.in_features}"
        )
    if x.dtype.kind not in "fiu":
        raise FormatError(f"matmul: x has dtype {x.dtype}; pass real numbers such as float32")
    if not np.isfinite(x).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise FormatError(f"matmul: x[{row}, {column}] is {x[row, column]}; every value must be finite")
    if x.shape[0] == 0:
        return np.zeros((0, m.out_features), np.float32)
    from lowbit import _native

    values = np.ascontiguousarray(x, dtype=np.float32)
    return _native.matmul(values, m.native(), ACTIVATION_BITS[activations])
