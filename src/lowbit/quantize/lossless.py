"""bfloat16 weights as they are, their exponents coded: about 11.2 bits (after DFloat11, arXiv:2504.11651)."""

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.packed import PackedMatrix
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.statistics import Statistics


def lossless(
    weight: np.ndarray, format: Format, statistics: Statistics | None = None, *, rounded: bool = False
) -> PackedMatrix:
    """`weight` exactly.

    rounded: round other weights to bfloat16 first, instead of refusing them
    """
    if not format.coded:
        raise FormatError(f"lossless to {format.name}: only df11 keeps weights as they are; take df11")
    if rounded:
        weight = round_to_nearest(weight, Format.plain("bf16")).dequantize()
    elif (np.ascontiguousarray(weight, np.float32).view(np.uint32) & 0xFFFF).any():
        raise FormatError(
            "lossless to df11: the weights are no bfloat16 numbers, so they cannot be kept; "
            "lossless:rounded=yes rounds them first"
        )
    return round_to_nearest(weight, format)
