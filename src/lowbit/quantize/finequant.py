"""FineQuant: groups are halved as long as that pays, from the weights alone.

Matrices differ in how far their weights spread within a row. Starting from the groups of a format, or whole
rows (`int4-row`), the group size is halved while that lowers the squared error more than the same bits would
as longer codes: below 4^-bits of it, for a further bit halves all errors.
Source: arXiv:2308.09723, which looks at the range of the groups in the place of their error.
"""

from dataclasses import replace

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.formats.format import GROUP_MULTIPLE
from lowbit.packed import PackedMatrix
from lowbit.quantize.parameters import check_coded
from lowbit.quantize.round_to_nearest import quantize_with_error


def finequant(weight: np.ndarray, format: Format, demand: float = 1.0, smallest: int = 32) -> PackedMatrix:
    """Round to `format` with its group size, or the half, the fourth, .. of it.

    weight: float32 [out_features, in_features], finite
    demand: times which a halving must pay for its bits, on a logarithmic scale
    smallest: no smaller groups
    The format's name in the result tells the group size. Raises FormatError for floats and bad options.
    """
    what = f"finequant to {format.name}"
    check_coded(format, what)
    if demand <= 0 or smallest < GROUP_MULTIPLE:
        raise FormatError(
            f"{what}: demand={demand}, smallest={smallest}; demand must be positive, smallest at least "
            f"{GROUP_MULTIPLE}"
        )
    best, error = quantize_with_error(weight, format, what=what)
    size = format.group_size or weight.shape[1]
    while size % 2 == 0 and (size := size // 2) >= smallest and size % GROUP_MULTIPLE == 0:
        finer = replace(format, name=_name(format, size), group_size=size)
        matrix, its = quantize_with_error(weight, finer, what=what)
        bits = matrix.bits_per_weight - best.bits_per_weight
        if its >= error * 4.0 ** (-demand * bits):
            break
        best, error = matrix, its
    return best


def _name(format: Format, size: int) -> str:
    suffix = f"-g{format.group_size}" if format.group_size else "-row"
    head, found, tail = format.name.partition(suffix)
    return f"{head}-g{size}{tail}" if found else f"{format.name}-g{size}"
