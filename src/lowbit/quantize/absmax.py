"""Symmetric integers whose scale is the largest weight of a group over the largest level, as in GLM-130B.

GLM-130B (arXiv:2210.02414) stores INT4 weights so, a scale for each row
(`int4-row`), without calibration. The lowest level, -8 of INT4, is not used.
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.formats.tables import symmetric_integers
from lowbit.packed import PackedMatrix
from lowbit.quantize.grid import F32
from lowbit.quantize.parameters import Parameters
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.scale import round_scale
from lowbit.quantize.statistics import Statistics


def absmax(weight: np.ndarray, format: Format, statistics: Statistics | None = None) -> PackedMatrix:
    """Round to symmetric integers of 2 to 8 bits; scale = max |w| / (2^(bits - 1) - 1) of each group.

    weight: float32 [out_features, in_features], finite; `statistics` are not used
    Raises FormatError for other formats.
    """
    if format.tables != (symmetric_integers(format.bits),) or format.bits < 2 or format.scale_type == "m4":
        raise FormatError(
            f"absmax to {format.name}: it spans symmetric integers with a scale per group or row; use "
            "int4-row, or rtn with search=minmax for other formats"
        )
    start = Parameters.of(round_to_nearest(weight, format, "minmax"), format)
    grouped = np.abs(weight).reshape(len(weight), start.groups, -1).max(axis=2)
    top = F32(2 ** (format.bits - 1) - 1)
    scales = round_scale(grouped / top * F32(1 / start.tensor_scale), format.scale_type)
    found = Parameters(format, start.in_features, start.tensor_scale, scales[None], None)
    codes, _ = found.nearest(np.ascontiguousarray(weight.T))
    # A scale that its type rounded down would let the largest negative weight reach the lowest level.
    return found.pack(np.maximum(codes.transpose(0, 2, 1), np.uint8(1)))
