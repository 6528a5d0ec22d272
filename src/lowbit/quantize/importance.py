"""Round-to-nearest whose scales are searched for the inputs that calibration saw.

The error of a weight costs the mean square of its input (the diagonal of the Hessian): an importance matrix,
as llama.cpp's imatrix has it. The search of every format takes these factors (search.py). With them, large
weights need not count more than others: Kullback-Leibler divergence of a 15M-parameter Llama, quantized by
round-to-nearest, with importance and that (mse), with importance alone (plain):

    int2-g32 2.785 2.069 1.916    int3-g96 0.633 0.558 0.479    int4-g32 0.127 0.106 0.091
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.packed import PackedMatrix, check_group_size
from lowbit.quantize.grid import F32
from lowbit.quantize.native import largest_magnitude, quantize_native
from lowbit.quantize.parameters import check_coded
from lowbit.quantize.round_to_nearest import quantize_reference

FLOOR = 1e-3  # of the mean: no input counts less, since other texts may use it


def round_by_importance(
    weight: np.ndarray,
    format: Format,
    importance: np.ndarray,
    search: str = "plain",
    largest: float | None = None,
) -> PackedMatrix:
    """Round each group of `weight` to levels of `format` with the least weighted squared error.

    weight: float32 [out_features, in_features], finite
    importance: [in_features], what a squared error in each input's weights costs; its scale does not matter
    search: "plain", or "mse", in which large weights count more besides
    largest: largest magnitude of the whole tensor where `weight` is a part of it
    Raises FormatError for floats, which have no scales, and for shapes that do not match.
    """
    what = f"round to {format.name} by importance"
    check_coded(format, what)
    check_group_size(weight.shape[1], format.group_size, what)
    own = largest_magnitude(np.ascontiguousarray(weight))
    if not np.isfinite(own):
        raise FormatError(f"{what}: a weight is NaN or infinite; the checkpoint is damaged")
    counts = relative(importance, weight.shape[1], what)
    largest, weight = max(own, largest or 0.0), np.ascontiguousarray(weight)
    fast = quantize_native(weight, format, search, largest, counts)
    return (fast or quantize_reference(weight, format, search, largest, counts))[0]


def relative(importance: np.ndarray, in_features: int, what: str) -> np.ndarray:
    """float32 [in_features]: importance over its mean, not below FLOOR; 1 if all are 0."""
    if importance.shape != (in_features,) or not np.isfinite(importance).all() or (importance < 0).any():
        raise FormatError(
            f"{what}: importance is {list(importance.shape)}; needs [{in_features}], finite and >= 0"
        )
    mean = float(importance.mean(dtype=np.float64))
    if mean == 0.0:
        return np.ones(in_features, F32)
    return np.maximum(importance / mean, FLOOR).astype(F32)
