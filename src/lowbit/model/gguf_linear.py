"""GGUF's types of evenly spaced levels: Q4_0 .. Q8_0 with a scale for 32 weights, and the K-quants.

A K-quant block of 256 weights has an fp16 scale (and for some an fp16 minimum), which each group of 16 or 32
weights multiplies by an integer factor of 4 to 8 bits.
Source of the byte layouts: ggml-common.h and ggml-quants.c of the ggml project.
"""

from __future__ import annotations

import numpy as np

from lowbit.model.gguf_parts import Bytes, Parts, bits, half, negative, nibbles, pairs


def split_q4_0(blocks: Bytes) -> Parts:
    return Parts(nibbles(blocks[:, 2:]).reshape(-1, 32), half(blocks, 0))


def split_q4_1(blocks: Bytes) -> Parts:
    return Parts(nibbles(blocks[:, 4:]).reshape(-1, 32), half(blocks, 0), half(blocks, 2))


def split_q5_0(blocks: Bytes) -> Parts:
    codes = nibbles(blocks[:, 6:]).reshape(-1, 32) | bits(blocks[:, 2:6]) << 4
    return Parts(codes, half(blocks, 0))


def split_q5_1(blocks: Bytes) -> Parts:
    codes = nibbles(blocks[:, 8:]).reshape(-1, 32) | bits(blocks[:, 4:8]) << 4
    return Parts(codes, half(blocks, 0), half(blocks, 2))


def split_q8_0(blocks: Bytes) -> Parts:
    return Parts(blocks[:, 2:] ^ 0x80, half(blocks, 0))  # int8 v is the code v + 128


def _planes(packed: Bytes, block: int) -> np.ndarray:
    """Bits of 32 bytes: plane b of them belongs to weights 32 b .. 32 b + 31; [n, 256]."""
    return np.unpackbits(packed[:, None], axis=1, bitorder="little").reshape(-1, block)


def split_q2_k(blocks: Bytes) -> Parts:
    packed = blocks[:, :16]
    codes = pairs(blocks[:, 16:80].reshape(-1, 32)).reshape(-1, 256)
    return Parts(
        codes,
        half(blocks, 80),
        negative(half(blocks, 82)),
        (packed & 15).view(np.int8),
        (packed >> 4).view(np.int8),
    )


def split_q3_k(blocks: Bytes) -> Parts:
    low = pairs(blocks[:, 32:96].reshape(-1, 32)).reshape(-1, 256)
    factors = nibbles(blocks[:, 96:104]).reshape(-1, 16) | pairs(blocks[:, 104:108]).reshape(-1, 16) << 4
    codes = low | _planes(blocks[:, :32], 256) << 2
    return Parts(codes, half(blocks, 108), factors=factors.view(np.int8) - np.int8(32))


def six_bit_pairs(packed: Bytes) -> tuple[np.ndarray, np.ndarray]:
    """The 12 bytes of Q4_K and Q5_K: eight 6-bit factors of the scale and eight of the minimum, int8 [n, 8].

    Bytes 0-3 and 4-7 hold the first four of each in their low 6 bits; their top 2 bits are the top bits of
    the last four, whose low nibbles fill bytes 8-11."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate((first & 63, last & 15 | first >> 6 << 4), axis=1)
    least = np.concatenate((second & 63, last >> 4 | second >> 6 << 4), axis=1)
    return scale.view(np.int8), least.view(np.int8)


def split_q4_k(blocks: Bytes) -> Parts:
    scale, least = six_bit_pairs(blocks[:, 4:16])
    codes = nibbles(blocks[:, 16:].reshape(-1, 32)).reshape(-1, 256)
    return Parts(codes, half(blocks, 0), negative(half(blocks, 2)), scale, least)


def split_q5_k(blocks: Bytes) -> Parts:
    scale, least = six_bit_pairs(blocks[:, 4:16])
    low = nibbles(blocks[:, 48:].reshape(-1, 32)).reshape(-1, 256)
    codes = low | _planes(blocks[:, 16:48], 256) << 4
    return Parts(codes, half(blocks, 0), negative(half(blocks, 2)), scale, least)


def split_q6_k(blocks: Bytes) -> Parts:
    low = nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 256)
    high = pairs(blocks[:, 128:192].reshape(-1, 32)).reshape(-1, 256)
    factors = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return Parts(low | high << 4, half(blocks, 208), factors=factors)
