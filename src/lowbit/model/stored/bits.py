"""Codes of 1 to 8 bits out of 32-bit words, in which they follow one another from the lowest bit on.

Words are little endian. `dense`: codes run on from one word into the next (32 codes in `bits` words).
`padded`: a word holds 32 // bits whole codes, and the bits above them are unused.
"""

from __future__ import annotations

import numpy as np


def unpack_dense(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [rows, count] from int32 [rows, at least ceil(count * bits / 32)]."""
    data = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    rows = len(data)
    if bits == 8:
        return data[:, :count].copy()
    if bits in (1, 2, 4):
        per_byte = 8 // bits
        shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
        codes = (data[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
        return codes.reshape(rows, -1)[:, :count]
    # A code of 3, 5, 6 or 7 bits lies in at most two bytes.
    first = np.arange(count, dtype=np.int64) * bits
    low = first >> 3
    wide = np.zeros((rows, data.shape[1] + 1), np.uint16)
    wide[:, :-1] = data
    wide[:, :-1] |= wide[:, 1:] << np.uint16(8)
    return ((wide[:, low] >> (first & 7).astype(np.uint16)) & np.uint16((1 << bits) - 1)).astype(np.uint8)


def unpack_padded(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [rows, count] from int32 [rows, at least ceil(count / (32 // bits))]."""
    per_word = 32 // bits
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    codes = ((unsigned[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)).astype(np.uint8)
    return codes.reshape(len(words), -1)[:, :count]


def dense_words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def padded_words(count: int, bits: int) -> int:
    return -(-count // (32 // bits))
