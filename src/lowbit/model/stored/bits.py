"""Codes of 1 to 8 bits out of 32-bit words, in which they follow one another from the lowest bit on.

Words are little endian. `dense`: codes run on from one word into the next (32 codes in `bits` words).
`padded`: a word holds 32 // bits whole codes, and the bits above them are unused.
"""

from __future__ import annotations

import numpy as np


def unpack_dense(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [rows, count] from int32 [rows, at least ceil(count * bits / 32)]."""
    data = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    mask = (1 << bits) - 1
    if bits == 8:
        return data[:, :count].copy()
    if bits in (1, 2, 4):
        codes = np.empty((*data.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):
            codes[:, :, i] = data >> np.uint8(i * bits) & np.uint8(mask)
        return codes.reshape(len(data), -1)[:, :count]
    # Eight codes lie in `bits` bytes, each in at most two of them.
    eights = -(-count // 8)
    if data.shape[1] < eights * bits:
        data = np.pad(data, ((0, 0), (0, eights * bits - data.shape[1])))
    parts = data[:, : eights * bits].reshape(len(data), eights, bits).astype(np.uint16)
    codes = np.empty((len(data), eights, 8), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        wide = parts[:, :, byte] >> np.uint16(shift)
        if shift + bits > 8:
            wide = wide | parts[:, :, byte + 1] << np.uint16(8 - shift)
        codes[:, :, i] = wide & np.uint16(mask)
    return codes.reshape(len(data), -1)[:, :count]


def unpack_padded(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 [rows, count] from int32 [rows, at least ceil(count / (32 // bits))]."""
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    codes = np.empty((*unsigned.shape, 32 // bits), np.uint8)
    for i in range(32 // bits):
        codes[:, :, i] = unsigned >> np.uint32(i * bits) & np.uint32((1 << bits) - 1)
    return codes.reshape(len(words), -1)[:, :count]


def dense_words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def padded_words(count: int, bits: int) -> int:
    return -(-count // (32 // bits))
