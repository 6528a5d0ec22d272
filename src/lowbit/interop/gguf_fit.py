"""Floats to GGUF blocks, by least squares with our weighing of errors.

Types that are one of our formats (Q4_0 is int4-g32, TQ1_0 ternary-g256 ..) are rounded by
quantize/round_to_nearest.py and packed as they are. Three types are fitted natively (native/isa/gguf_fit),
with the same weighing: the squared error of a weight counts 3/4 + 1/4 w^2 / mean(w^2) times in its group.

Q4_1, w = d q + m: for 11 scales from 0.66 to 1.04 times the range over 15, codes around the middle of the
    range, then (d, m) of least squares for these codes; the best is refined twice, before and after both are
    rounded to fp16.
Q4_K, w = d sc q - dmin m: each group of 32 is fitted so, with an offset that is not positive; d and dmin
    bring the largest to 63; then, by turns, the sc and m beside the present ones of least error for each
    group, and the d and dmin of least squares for the block; from two starts, the best of all is kept.
Q6_K, w = d sc q: the scale of least squares of each group of 16 out of 12 of both signs, then as for Q4_K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.formats import parse_format
from lowbit.interop.gguf_exact import exact_rows, narrowed
from lowbit.model.gguf_types import TENSOR_TYPES
from lowbit.quantize.native import largest_magnitude
from lowbit.quantize.round_to_nearest import check_finite, quantize_with_error

try:
    from lowbit import _native
except ImportError:
    _native = None  # type: ignore[assignment]
_fit_blocks: Any = getattr(_native, "fit_blocks", None)

BY_NAME = {kind.name: kind for kind in TENSOR_TYPES.values()}
ROUNDED = {  # types that are a format
    "Q4_0": "int4-g32",
    "Q5_0": "int5-g32",
    "Q8_0": "int8-g32",
    "TQ1_0": "ternary-g256",
    "TQ2_0": "ternary-g256",
    "MXFP4": "mxfp4",
}
FITTED = ("Q4_1", "Q4_K", "Q6_K")  # natively
FLOATS = ("F32", "F16", "BF16")
Encode = Callable[[np.ndarray], np.ndarray]


def fitted(weight: np.ndarray, type_name: str, what: str) -> np.ndarray:
    """float32 [rows, inputs], finite, to uint8 [rows, bytes of a row]. `what` opens errors.

    type_name: a key of ROUNDED, or one of FITTED or FLOATS.
    """
    weight = np.ascontiguousarray(weight)
    if not np.isfinite(largest_magnitude(weight)):
        check_finite(weight, what)
    if type_name in FLOATS:
        return _floats(weight, type_name, what)
    if type_name in FITTED:
        kind = BY_NAME[type_name]
        if _fit_blocks is None:
            raise UnsupportedError(f"{what} to {type_name}: the native module is not built; run make build")
        out = np.empty((len(weight), weight.shape[1] // kind.block * kind.nbytes), np.uint8)
        _fit_blocks(kind.number, weight, out)
        return out
    format = parse_format(ROUNDED[type_name])
    # `largest` of one step keeps the scale of the tensor, which GGUF has not, at 1.
    matrix, _ = quantize_with_error(weight, format, what=what, largest=format.max_level)
    rows = exact_rows(matrix, type_name)
    if rows is None:
        raise UnsupportedError(f"{what} to {type_name}: the weights are beyond its scales; take f16 or bf16")
    return rows(0, len(weight))


def _floats(weight: np.ndarray, type_name: str, what: str) -> np.ndarray:
    raw = narrowed(weight, type_name)
    if type_name == "F16" and weight.size and float(np.abs(weight).max()) >= 65520:
        raise UnsupportedError(
            f"{what} to F16: the largest weight {float(np.abs(weight).max()):g} is above 65504; take bf16"
        )
    return raw
