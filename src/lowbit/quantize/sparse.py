"""Magnitude pruning, the survivors in any format with one table of levels: unstructured (arXiv:1506.02626)
and 2:4 (arXiv:2104.08378); with `importance` the criterion of Wanda (arXiv:2306.11695).
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format, parse_format
from lowbit.packed import CodeTerm, PackedMatrix, SparseTerm
from lowbit.quantize.round_to_nearest import check_finite, round_to_nearest
from lowbit.quantize.side import checked_importance, checked_weight


def sparse(
    weight: np.ndarray,
    format: Format | str,
    density: float | str = 0.5,
    importance: np.ndarray | None = None,
    search: str = "mse",
) -> PackedMatrix:
    """The largest weights of each row, rounded to the nearest levels of `format`; the others become 0.

    weight: float32 [out_features, in_features], finite
    density: share of each row's weights that stay; or "2:4", the two largest of each four neighbours
    importance: [in_features], factor of the magnitudes in the choice (Wanda: the norm of each input's
        activations); None: all alike
    A weight takes 1 + density * bits bits and its share of a scale.
    Raises FormatError for formats with zero points, several terms or tables: they have no sparse form.
    """
    weight, format = checked_weight(weight, "sparse"), parse_format(format)
    check_finite(weight, "sparse")
    kept = kept_weights(weight, density, importance)
    matrix = round_to_nearest(np.where(kept, weight, np.float32(0)), format, search)
    term = matrix.terms[0]
    if not isinstance(term, CodeTerm) or len(matrix.terms) > 1 or not (term.levels == 0).any():
        raise FormatError(f"sparse: {format.name} is no single term of codes with a level of 0; try int4-g64")
    if term.zero_points is not None or term.selectors is not None or term.multipliers is not None:
        raise FormatError(f"sparse: {format.name} has zero points, tables or multipliers; try int4-g64")
    made = SparseTerm.from_codes(
        term.unpack(*weight.shape),
        kept,
        term.bits,
        term.levels,
        term.scales,
        term.scale_type,
        term.group_size,
        term.tensor_scale,
    )
    return PackedMatrix(weight.shape[0], weight.shape[1], (made,), f"{format.name}-{density}")


def kept_weights(
    weight: np.ndarray, density: float | str, importance: np.ndarray | None = None
) -> np.ndarray:
    """bool, same shape: which weights stay. Of equal magnitudes the earlier stay."""
    size = np.abs(weight)
    if importance is not None:
        size = size * checked_importance(importance, weight.shape[1], "sparse").astype(np.float32)
    if density == "2:4":
        if weight.shape[1] % 4:
            raise FormatError(f"sparse: 2:4 needs inputs in fours, received in_features={weight.shape[1]}")
        return _largest(size.reshape(-1, 4), 2).reshape(weight.shape)
    if isinstance(density, str) or not 0 < density <= 1:
        raise FormatError(f"sparse: density={density!r}; it must be above 0 and at most 1, or '2:4'")
    return _largest(size, max(1, round(density * weight.shape[1])))


def _largest(size: np.ndarray, count: int) -> np.ndarray:
    """bool, same shape: the `count` largest of each row."""
    kept = np.zeros(size.shape, bool)
    order = np.argsort(-size, axis=1, kind="stable")[:, :count]
    np.put_along_axis(kept, order, True, axis=1)
    return kept
