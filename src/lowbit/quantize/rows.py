"""Rows of a quantized matrix refined: codes of what they lack, such as the 8-bit output features of MixLLM
(arXiv:2412.14590) on a matrix of 4 bits. Which rows is chosen over the whole model (compress/salience.py).
"""

from collections.abc import Sequence

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format, parse_format
from lowbit.packed import CodeTerm, PackedMatrix, RowsTerm
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.side import checked_weight, with_term


def refine_rows(
    matrix: PackedMatrix,
    weight: np.ndarray,
    rows: Sequence[int] | np.ndarray,
    format: Format | str,
    search: str = "mse",
) -> PackedMatrix:
    """The matrix plus what `rows` of `weight` lack of it, rounded to the nearest levels of `format`.

    weight: float32 [out_features, in_features], what `matrix` was made of, finite
    rows: which outputs; none: the matrix as it is
    format: one term of codes. An int4 residual of an int4 matrix makes 8 bits: its steps are a fifteenth
    Raises FormatError for rows that the matrix has not, or a format of floats or several terms.
    """
    weight, format = checked_weight(weight, "refine_rows"), parse_format(format)
    rows = np.unique(np.asarray(rows))
    if not rows.size:
        return matrix
    if weight.shape != matrix.shape:
        raise FormatError(f"refine_rows: weight is {list(weight.shape)}, the matrix {list(matrix.shape)}")
    if rows.dtype.kind not in "iu" or rows[0] < 0 or rows[-1] >= len(weight):
        raise FormatError(f"refine_rows: rows {rows[:8]}; they must be outputs below {len(weight)}")
    missing = round_to_nearest(np.ascontiguousarray(weight[rows] - matrix.dequantize()[rows]), format, search)
    codes = missing.terms[0]
    if len(missing.terms) > 1 or not isinstance(codes, CodeTerm):
        raise FormatError(f"refine_rows: {format.name} is no single term of codes; use one such as int4-g32")
    name = f"{matrix.format_name}+{len(rows)}rows"
    return with_term(matrix, RowsTerm(rows.astype(np.uint32), codes), name)
