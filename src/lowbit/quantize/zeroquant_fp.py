"""ZeroQuant-FP: float weights whose scales stand in ratios of powers of two, so that casting is a shift.

To multiply FP4 weights with FP8 activations, a kernel casts them up; if scales are powers of two, or differ
by powers of two within a row, it only adds to exponents.

"power" (M1): every scale becomes a power of two, times one factor for the matrix
"row" (M2): a row keeps its largest scale S, the others become S / 2^k

The paper rounds k up; here the better of the neighbours is taken, by squared error. Low-rank compensation on
top of it is `lorc:base=zqfp`. Source: arXiv:2307.09782.
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.packed import PackedMatrix
from lowbit.quantize.grid import F32
from lowbit.quantize.parameters import Parameters, check_coded
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.scale import FINE, round_scale

RATIOS = ("row", "power")


def zeroquant_fp(weight: np.ndarray, format: Format, ratios: str = "row") -> PackedMatrix:
    """Round to the levels of `format`, scales restricted as `ratios` says.

    weight: float32 [out_features, in_features], finite
    Raises FormatError for several terms, zero-points, or scales that are neither fp16 nor fp32.
    """
    what = f"zqfp to {format.name}"
    check_coded(format, what)
    if ratios not in RATIOS:
        raise FormatError(f"{what}: ratios={ratios!r}; use one of {', '.join(RATIOS)}")
    if format.terms > 1 or format.zero_point or format.scale_type not in FINE:
        raise FormatError(
            f"{what}: it restricts fp16 or fp32 scales of one term; use one such as e2m1-g64, or rtn to "
            "mxfp4, whose scales are powers of two"
        )
    free = Parameters.of(round_to_nearest(weight, format), format)
    sign, size = np.sign(free.scales), np.abs(free.scales)
    if ratios == "row":
        largest = size.max(axis=2, keepdims=True)
        largest = np.where(largest > 0, largest, F32(1))
    else:
        largest = np.ones((*size.shape[:2], 1), F32)
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(size / largest))
    columns = np.ascontiguousarray(weight.T)
    best: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # scales, codes, errors of groups
    for up in (0, 1):
        factors = np.exp2(np.where(np.isfinite(exponent), exponent + up, 0)).astype(F32)
        scales = sign * largest * factors
        if ratios == "row":
            scales = sign * np.minimum(np.abs(scales), largest)
        scales = round_scale(scales, format.scale_type)
        tried = Parameters(format, free.in_features, free.tensor_scale, scales, free.marks)
        codes, rounded = tried.nearest(columns)
        errors = np.square(columns - rounded).reshape(free.groups, free.width, -1).sum(axis=1).T
        if best is None:
            best = scales, codes, errors
            continue
        better = errors < best[2]
        each = np.repeat(better.T, free.width, axis=0)
        best = np.where(better, scales, best[0]), np.where(each, codes, best[1]), errors
    assert best is not None
    found = Parameters(format, free.in_features, free.tensor_scale, best[0], free.marks)
    return found.pack(np.ascontiguousarray(best[1].transpose(0, 2, 1)))
