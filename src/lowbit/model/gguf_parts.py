"""What every block of a GGUF tensor is taken apart into, and the bit fields that blocks are made of.

    weight = scale * level[code] + offset

`scale` belongs to a group of 16 weights or more. It is stored as a number of its own, or as an fp16 number of
the whole block times a small integer factor of the group; the same holds for `offset`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Bytes = np.ndarray  # uint8


class Parts(NamedTuple):
    """Of n blocks. Without factors there is a scale, and perhaps an offset, for each group; with them one for
    each block."""

    codes: np.ndarray  # uint8 [n, weights of a block]
    scales: np.ndarray  # float16, or uint8 (e8m0, e4m3) [n, groups] or [n, 1]
    offsets: np.ndarray | None = None  # float16, like scales
    factors: np.ndarray | None = None  # int8 [n, groups]
    offset_factors: np.ndarray | None = None  # int8 [n, groups]


def half(blocks: Bytes, start: int) -> np.ndarray:
    """The fp16 value at byte `start` of each block: float16 [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")


def words(blocks: Bytes, start: int, stop: int, dtype: str) -> np.ndarray:
    """Bytes [start, stop) of each block as integers of `dtype`."""
    return np.ascontiguousarray(blocks[:, start:stop]).view(dtype)


def nibbles(packed: Bytes) -> np.ndarray:
    """[n, bytes] -> [n, 2, bytes]: low nibbles, then high nibbles."""
    return np.stack((packed & 15, packed >> 4), axis=1)


def neighbours(packed: Bytes) -> np.ndarray:
    """[n, bytes] -> [n, 2 * bytes]: low and high nibble of each byte, side by side."""
    return np.stack((packed & 15, packed >> 4), axis=2).reshape(len(packed), -1)


def pairs(packed: Bytes) -> np.ndarray:
    """[n, bytes] -> [n, 4, bytes]: the four 2-bit fields of each byte, lowest first."""
    return np.stack((packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6), axis=1)


def bits(packed: Bytes) -> np.ndarray:
    """[n, bytes] -> [n, 8 * bytes] bits, lowest first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def negative(stored: np.ndarray) -> np.ndarray:
    """float16 with the other sign, NaN included."""
    return (stored.view(np.uint16) ^ 0x8000).view("<f2")
