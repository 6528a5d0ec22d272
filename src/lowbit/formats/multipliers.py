"""m4 scales: a 4-bit multiplier for each group, an fp16 scale for each super-group.

    w = scale[super-group] * (multiplier[group] * level)         multiplier 0 .. 15

Groups can be small (16 inputs) since each costs 4 bits, and multiplier * level is still one signed byte, so
a product sees integer weights with one scale for each super-group. Two-level scales with integer multipliers
are known from GGUF's K-quants (6 bits for 16 inputs, 256 to a super-block) and VS-Quant, arXiv:2102.04503.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

MULTIPLIER_BITS = 4
MAX_MULTIPLIER = 2**MULTIPLIER_BITS - 1
MAX_PRODUCT = 127  # of a multiplier and an integer level: a signed byte
SUPER_MULTIPLE = 64  # activations that share a scale; super-groups are whole numbers of them
MAX_SUPER = 256


def super_size(in_features: int, group_size: int) -> int:
    """Inputs that share an fp16 scale: the largest multiple of `group_size` and 64 that divides
    `in_features` and is at most 256; 0, the whole row, if there is none.
    """
    unit = math.lcm(group_size, SUPER_MULTIPLE)
    return max((n for n in range(unit, MAX_SUPER + 1, unit) if in_features % n == 0), default=0)


def largest_integer_level(tables: Iterable[Iterable[float]]) -> float:
    """Largest magnitude of the levels in units of the largest power of two, 2**8 to 2**-24, of which all are
    multiples; infinity if there is none.

    A single table of consecutive integers keeps unit 1, as in `kernels.reference.integer_levels`.
    """
    levels = [float(v) for table in tables for v in table]
    peak = max(abs(v) for v in levels)
    steps = {b - a for a, b in pairwise(levels)}
    if len(steps) == 1 and all(v.is_integer() for v in levels):
        return peak
    for power in range(8, -25, -1):
        if all(math.ldexp(v, -power).is_integer() for v in levels):
            return math.ldexp(peak, -power)
    return math.inf
