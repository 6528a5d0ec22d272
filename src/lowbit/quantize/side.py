"""What the splitting quantizers share: their checks, and adding a term to a rounded matrix."""

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed import PackedMatrix, Term


def checked_weight(weight: np.ndarray, what: str) -> np.ndarray:
    """`weight` as float32 [out_features, in_features]."""
    weight = np.asarray(weight)
    if weight.ndim != 2 or 0 in weight.shape or weight.dtype.kind not in "fiu":
        raise FormatError(
            f"{what}: received {weight.dtype} {list(weight.shape)}; needs a real [out_features, in_features]"
        )
    return np.ascontiguousarray(weight, np.float32)


def checked_importance(importance: np.ndarray, in_features: int, what: str) -> np.ndarray:
    """`importance` as float64 [in_features], finite and not negative."""
    importance = np.asarray(importance, np.float64)
    if importance.shape != (in_features,) or not np.isfinite(importance).all() or (importance < 0).any():
        raise FormatError(
            f"{what}: importance has shape {list(importance.shape)}; needs [{in_features}], finite and >= 0"
        )
    return importance


def with_term(matrix: PackedMatrix, term: Term, name: str) -> PackedMatrix:
    """The matrix with one more term. A value beyond fp16's range is refused as the term's own check does."""
    for what, _, array in term.numbers():
        if not np.isfinite(array).all():
            raise FormatError(f"{name}: {what} exceed the range of fp16; scale the weights down")
    return PackedMatrix(matrix.out_features, matrix.in_features, (*matrix.terms, term), name)
