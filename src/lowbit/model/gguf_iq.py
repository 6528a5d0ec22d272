"""GGUF's IQ types of 1 to 3 bits: a few bits choose four or eight magnitudes at once from a grid.

The grid's members are small integers (gguf_grids.py has them), so each weight is a code of 2 to 4 bits into a
table of all magnitudes with both signs, and the groups' scales are fp16 times an odd integer. Codes of a
weight and of its negative are complements of each other.

    IQ1_S   levels -7 1 9 in eighths; a group whose offset is -1/8 has -9 -1 7, the same with the other sign
    IQ1_M   the offset changes every eight weights, so that both threes are levels
    IQ2     -43 -25 -8 8 25 43 in eighths     IQ3_XXS  4 12 20 .. 52 62 in quarters     IQ3_S  1 3 .. 15

Source of the byte layouts: ggml-common.h and ggml-quants.c of the ggml project.
"""

from __future__ import annotations

import numpy as np

from lowbit.model.gguf_grids import grid
from lowbit.model.gguf_parts import Bytes, Parts, bits, half, neighbours, pairs, words

IQ1_S = (-7, 1, 9)
IQ1_M = (-9, -7, -1, 1, 7, 9)
IQ2 = (0, -43, -25, -8, 8, 25, 43, 0)  # the outer two have no code
IQ3_XXS = (-62, -52, -44, -36, -28, -20, -12, -4, 4, 12, 20, 28, 36, 44, 52, 62)
IQ3_S = tuple(range(-15, 16, 2))


def _even_signs(fields: np.ndarray) -> np.ndarray:
    """7-bit fields -> bytes of signs: the eighth makes their number even."""
    low = (fields & 127).astype(np.uint8)
    parity = low ^ low >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return low | parity << 7


def _signed(magnitudes: np.ndarray, signs: Bytes, middle: int) -> np.ndarray:
    """Codes middle + magnitude, or for a set sign their complement. signs: uint8 [n, weights / 8]."""
    codes = (middle + magnitudes).reshape(len(signs), -1)
    return codes ^ (bits(np.ascontiguousarray(signs)) * np.uint8(2 * middle - 1))


def _odd(fields: np.ndarray) -> np.ndarray:
    """2 s + 1 of the scale fields s: a group's factor."""
    return (2 * fields + 1).astype(np.int8)


def _shifts(*amounts: int) -> np.ndarray:
    return np.array(amounts, np.uint32)


def split_iq2_xxs(blocks: Bytes) -> Parts:
    pieces = words(blocks, 2, 66, "<u4").reshape(-1, 8, 2)
    index = np.ascontiguousarray(pieces[..., 0]).view(np.uint8).reshape(-1, 32)
    fields = pieces[..., 1]
    signs = _even_signs(fields[..., None] >> _shifts(0, 7, 14, 21)).reshape(-1, 32)
    return Parts(_signed(grid("iq2_xxs")[index], signs, 4), half(blocks, 0), factors=_odd(fields >> 28))


def split_iq2_xs(blocks: Bytes) -> Parts:
    fields = words(blocks, 2, 66, "<u2")
    codes = _signed(grid("iq2_xs")[fields & 511], _even_signs(fields >> 9), 4)
    return Parts(codes, half(blocks, 0), factors=_odd(neighbours(blocks[:, 66:74])))


def split_iq2_s(blocks: Bytes) -> Parts:
    high = pairs(blocks[:, 66:74]).transpose(0, 2, 1).reshape(-1, 32)
    index = blocks[:, 2:34] | high.astype(np.uint16) << 8
    codes = _signed(grid("iq2_s")[index], blocks[:, 34:66], 4)
    return Parts(codes, half(blocks, 0), factors=_odd(neighbours(blocks[:, 74:82])))


def split_iq3_xxs(blocks: Bytes) -> Parts:
    fields = words(blocks, 66, 98, "<u4")
    signs = _even_signs(fields[..., None] >> _shifts(0, 7, 14, 21)).reshape(-1, 32)
    codes = _signed(grid("iq3_xxs")[blocks[:, 2:66]], signs, 8)
    return Parts(codes, half(blocks, 0), factors=_odd(fields >> 28))


def split_iq3_s(blocks: Bytes) -> Parts:
    index = blocks[:, 2:66] | bits(np.ascontiguousarray(blocks[:, 66:74])).astype(np.uint16) << 8
    codes = _signed(grid("iq3_s")[index], blocks[:, 74:106], 8)
    return Parts(codes, half(blocks, 0), factors=_odd(neighbours(blocks[:, 106:110])))


def split_iq1_s(blocks: Bytes) -> Parts:
    fields = words(blocks, 34, 50, "<u2")
    index = blocks[:, 2:34] | (fields[..., None] >> _shifts(0, 3, 6, 9) & 7).reshape(-1, 32) << 8
    lowered = fields >> 15 != 0
    codes = grid("iq1")[index].reshape(-1, 8, 32)
    codes = np.where(lowered[..., None], 2 - codes, codes).reshape(-1, 256)
    factors = _odd(fields >> 12 & 7)
    return Parts(codes, half(blocks, 0), factors=np.where(lowered, -factors, factors))


def split_iq1_m(blocks: Bytes) -> Parts:
    """The fp16 scale lies in the top nibbles of the four words of scales."""
    fields = words(blocks, 48, 56, "<u2")
    scale = (fields >> 12 << np.array([0, 4, 8, 12], np.uint16)).sum(axis=1, keepdims=True, dtype=np.uint16)
    high = neighbours(blocks[:, 32:48])
    index = blocks[:, :32] | (high & 7).astype(np.uint16) << 8
    raised = (high >> 3 ^ 1)[..., None]
    codes = (2 * grid("iq1")[index] + raised).reshape(-1, 256)
    factors = (fields[..., None] >> _shifts(0, 3, 6, 9) & 7).reshape(-1, 16)
    return Parts(codes, scale.view("<f2"), factors=_odd(factors))
