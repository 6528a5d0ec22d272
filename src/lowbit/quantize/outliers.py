"""Outliers in 16 bit, the rest in any format: whole input columns (LLM.int8(), arXiv:2208.07339) or single
weights (SpQR, arXiv:2306.03078; SqueezeLLM, arXiv:2306.07629).
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format, parse_format
from lowbit.packed import ColumnsTerm, EntriesTerm, PackedMatrix, pack_groups
from lowbit.quantize.round_to_nearest import check_finite, round_to_nearest
from lowbit.quantize.side import checked_importance, checked_weight, with_term


def split_columns(
    weight: np.ndarray,
    format: Format | str,
    columns: np.ndarray | int,
    importance: np.ndarray | None = None,
    exclude: bool = True,
    search: str = "mse",
) -> PackedMatrix:
    """Some columns of `weight` in fp16, the others rounded to the nearest levels of `format`.

    weight: float32 [out_features, in_features], finite
    columns: which inputs; or how many: those of the largest `importance`
    importance: [in_features], e.g. the largest magnitude of each input's activations; None: of its weights
    exclude: the codes leave these inputs out, and activations are rounded without them (LLM.int8()).
        Otherwise the values are what is missing from the rounded weights there
    Raises FormatError if a column is not below in_features or the group size does not fit.
    """
    weight, format = checked_weight(weight, "split_columns"), parse_format(format)
    check_finite(weight, "split_columns")
    in_features = weight.shape[1]
    if np.ndim(columns) == 0:
        count = int(columns)
        if not 1 <= count <= in_features:
            raise FormatError(f"split_columns: {count} columns of {in_features}; take at least 1")
        weights = np.abs(weight).max(axis=0) if importance is None else importance
        columns = np.argsort(-checked_importance(weights, in_features, "split_columns"), kind="stable")[
            :count
        ]
    columns = np.unique(np.asarray(columns))
    if columns.dtype.kind not in "iu" or not columns.size or columns[0] < 0 or columns[-1] >= in_features:
        raise FormatError(f"split_columns: columns {columns[:8]}; they must be inputs below {in_features}")
    rest = weight.copy()
    rest[:, columns] = 0
    matrix = round_to_nearest(rest, format, search)
    values = weight[:, columns] if exclude else weight[:, columns] - matrix.dequantize()[:, columns]
    with np.errstate(over="ignore"):  # with_term refuses it
        stored = values.astype(np.float16)
    term = ColumnsTerm(columns.astype(np.uint32), pack_groups(stored), exclude)
    return with_term(matrix, term, f"{format.name}+{len(columns)}columns")


def split_entries(
    weight: np.ndarray,
    format: Format | str,
    fraction: float = 0.005,
    importance: np.ndarray | None = None,
    search: str = "mse",
) -> PackedMatrix:
    """The weights of largest magnitude in fp16 one by one, the others rounded to the levels of `format`.

    weight: float32 [out_features, in_features], finite
    fraction: of the weights; each takes 7 bytes
    importance: [in_features], factor of the magnitudes in the choice; None: all alike
    """
    weight, format = checked_weight(weight, "split_entries"), parse_format(format)
    check_finite(weight, "split_entries")
    count = max(1, round(fraction * weight.size))
    if not 0 < fraction <= 1:
        raise FormatError(f"split_entries: fraction={fraction}; it must be above 0 and at most 1")
    size = np.abs(weight)
    if importance is not None:
        size *= checked_importance(importance, weight.shape[1], "split_entries")
    places = np.sort(np.argpartition(size.reshape(-1), weight.size - count)[weight.size - count :])
    rows, columns = places // weight.shape[1], places % weight.shape[1]
    rest = weight.copy()
    rest[rows, columns] = 0
    matrix = round_to_nearest(rest, format, search)
    missing = weight[rows, columns] - matrix.dequantize()[rows, columns]
    term = EntriesTerm.from_places(rows, columns, missing, weight.shape[0])
    return with_term(matrix, term, f"{format.name}+{100 * fraction:g}%entries")
