"""LLM-FP4: for each matrix, the split of exponent and mantissa and the scales of least output error.

A float format has three free things: how many of its bits are exponent, the exponent bias, and the largest
value kept. With a real scale for each group, bias and largest value are one number, which is searched by what
errors cost (importance.py); the split is tried for the whole matrix: e3m0, e2m1 and e1m2 for 4 bits.
Source: arXiv:2310.16836. Its channel-wise bias of activations is a fold.
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.packed import PackedMatrix
from lowbit.quantize.importance import round_by_importance
from lowbit.quantize.statistics import Statistics


def llm_fp4(weight: np.ndarray, format: Format, statistics: Statistics) -> PackedMatrix:
    """Round to the minifloat of as many bits, groups and scales as `format`, itself one, that fits best.

    weight: float32 [out_features, in_features], finite
    The result's format name is that of the split taken. Raises FormatError for what is no minifloat.
    """
    what = f"llm_fp4 to {format.name}"
    splits = _splits(format)
    if all(format.tables != split.tables for split in splits):
        raise FormatError(f"{what}: it is no minifloat; use one such as e2m1-g64, e3m2-g64 or mxfp4")
    hessian = statistics.checked(weight.shape[1], what).hessian
    best: PackedMatrix | None = None
    least = np.inf
    for split in splits:
        matrix = round_by_importance(weight, split, np.diag(hessian))
        rest = weight - matrix.dequantize()
        error = float(np.vdot(rest @ hessian, rest))
        if best is None or error < least:
            best, least = matrix, error
    assert best is not None
    return best


def _splits(format: Format) -> list[Format]:
    """All minifloats of this width; `format` itself stays the first of equals."""
    if format.float_type is not None or format.scale_type == "m4" or format.bits < 3:
        return []
    shape = {"group_size": format.group_size, "scale_type": format.scale_type}
    bits = format.bits
    splits = [Format.minifloat(e, bits - 1 - e, **shape) for e in range(1, min(bits, 6))]  # type: ignore[arg-type]
    if bits == 8:
        splits.append(Format.minifloat(4, 3, None, "fn", **shape))  # type: ignore[arg-type]
    return sorted(splits, key=lambda split: split.tables != format.tables)
