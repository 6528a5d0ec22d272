"""What a matrix of a format will store, known before it is quantized: for headers and budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed.base3 import base3_shape
from lowbit.packed.float_term import FLOAT_DTYPES
from lowbit.packed.layout import (
    BLOCK_ROWS,
    TILE_ROWS,
    block_count,
    check_group_size,
    codes_shape,
    group_count,
)
from lowbit.packed.terms import SCALE_DTYPES

if TYPE_CHECKING:
    from lowbit.formats import Format

ArrayLayout = dict[str, tuple[type, tuple[int, ...]]]  # name -> (dtype, shape)


def planned_arrays(format: Format, out_features: int, in_features: int, what: str = "plan") -> ArrayLayout:
    """The arrays of `PackedMatrix.state()` for a matrix of this shape, in the order of their terms.

    Raises FormatError, opening with `what`, if the group size does not divide in_features, or if the format
    codes weights, so that their number of bytes depends on them.
    """
    if format.coded:
        raise FormatError(f"{what}: the size of {format.name} weights is known when they are coded")
    blocks = block_count(out_features)
    if format.float_type is not None:
        return {"0.values": (FLOAT_DTYPES[format.float_type], (blocks, in_features, BLOCK_ROWS))}
    check_group_size(in_features, format.group_size, f"{what} to {format.name}")
    groups = (blocks, group_count(in_features, format.group_size), BLOCK_ROWS)
    scales = (blocks, group_count(in_features, format.scale_size(in_features)), BLOCK_ROWS)
    codes = codes_shape(out_features, in_features, format.bits)
    if format.packing == "base3":
        codes = base3_shape(out_features, in_features)
    arrays: ArrayLayout = {}
    for term in range(format.terms):
        arrays[f"{term}.codes"] = (np.uint8, codes)
        arrays[f"{term}.scales"] = (SCALE_DTYPES[format.scale_type], scales)
        if format.scale_type == "m4":
            arrays[f"{term}.multipliers"] = (np.uint8, (*groups[:2], TILE_ROWS))
        if format.zero_point:
            arrays[f"{term}.zero_points"] = (np.uint8, groups)
        if len(format.tables) > 1:
            arrays[f"{term}.selectors"] = (np.uint8, groups)
        arrays[f"{term}.levels"] = (np.float32, (len(format.tables), len(format.tables[0])))
    return arrays
