"""Whole numbers and scales to the bytes of GGUF blocks; nothing is rounded here.

Every function takes whole numbers, int16 [n, weights of a block], and float16 scales [n] (of K types: one for
the block, with the factors of its groups), and gives uint8 [n, bytes of a block].
Source of the byte layouts: ggml-common.h of the ggml project; the tests hold them against the gguf package.
"""

from __future__ import annotations

import numpy as np


def _start(half: np.ndarray, nbytes: int, at: int = 0) -> np.ndarray:
    """Blocks of zeros with an fp16 number at byte `at`."""
    blocks = np.zeros((len(half), nbytes), np.uint8)
    _put_half(blocks, half, at)
    return blocks


def _put_half(blocks: np.ndarray, half: np.ndarray, at: int) -> None:
    blocks[:, at : at + 2] = np.ascontiguousarray(half, "<f2").view(np.uint8).reshape(-1, 2)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [n, 2 k] -> [n, k]: the first half in the low nibbles."""
    half = codes.shape[1] // 2
    return codes[:, :half] | codes[:, half:] << 4


def _pairs(codes: np.ndarray) -> np.ndarray:
    """uint8 [n, 4 k] -> [n, k]: each quarter in a 2-bit field, lowest first."""
    fields = codes.reshape(len(codes), 4, -1)
    return fields[:, 0] | fields[:, 1] << 2 | fields[:, 2] << 4 | fields[:, 3] << 6


def q4_0(numbers: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Numbers -8 .. 7."""
    blocks = _start(d, 18)
    blocks[:, 2:] = _nibbles((numbers + 8).astype(np.uint8))
    return blocks


def q4_1(numbers: np.ndarray, d: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Numbers 0 .. 15; w = d number + m."""
    blocks = _start(d, 20)
    _put_half(blocks, m, 2)
    blocks[:, 4:] = _nibbles(numbers.astype(np.uint8))
    return blocks


def q5_0(numbers: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Numbers -16 .. 15."""
    codes = (numbers + 16).astype(np.uint8)
    blocks = _start(d, 22)
    blocks[:, 2:6] = np.packbits(codes >> 4, axis=1, bitorder="little")
    blocks[:, 6:] = _nibbles(codes & 15)
    return blocks


def q8_0(numbers: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Numbers -128 .. 127."""
    blocks = _start(d, 34)
    blocks[:, 2:] = numbers.astype(np.int8).view(np.uint8)
    return blocks


def tq1_0(numbers: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Numbers -1, 0, 1: base-3 digits, as a byte n of 0 .. 242 rounded up to ceil(256 n / 243).

    Bytes 0-31 hold weights i + 32 k (k = 0 .. 4), bytes 32-47 weights 160 + i + 16 k, bytes 48-51 weights
    240 + i + 4 k (k = 0 .. 3)."""
    digits = (numbers + 1).astype(np.uint8)
    first = digits[:, :160].reshape(-1, 5, 32)
    second = digits[:, 160:240].reshape(-1, 5, 16)
    third = digits[:, 240:].reshape(-1, 4, 4)
    third = np.concatenate([third, np.zeros_like(third[:, :1])], axis=1)
    blocks = _start(d, 54, at=52)
    for at, part in ((0, first), (32, second), (48, third)):
        value = part[:, 0].astype(np.uint16)
        for k in range(1, 5):
            value = 3 * value + part[:, k]
        blocks[:, at : at + part.shape[2]] = ((value * 256 + 242) // 243).astype(np.uint8)
    return blocks


def tq2_0(numbers: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Numbers -1, 0, 1 (and 2) in 2-bit fields, 32 apart."""
    codes = (numbers + 1).astype(np.uint8).reshape(-1, 128)
    blocks = _start(d, 66, at=64)
    blocks[:, :64] = _pairs(codes).reshape(-1, 64)
    return blocks


def mxfp4(codes: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Codes of e2m1 (sign, two exponent bits, a mantissa bit), uint8; exponents: the bytes of e8m0."""
    blocks = np.empty((len(codes), 17), np.uint8)
    blocks[:, 0] = exponents
    blocks[:, 1:] = _nibbles(codes)
    return blocks


def q2_k(numbers: np.ndarray, factors: np.ndarray, least: np.ndarray, d: np.ndarray, dmin: np.ndarray):
    """Numbers 0 .. 3; w = d factor number - dmin least, both 0 .. 15, of 16 groups."""
    blocks = _start(d, 84, at=80)
    _put_half(blocks, dmin, 82)
    blocks[:, :16] = factors.astype(np.uint8) | least.astype(np.uint8) << 4
    blocks[:, 16:80] = _pairs(numbers.astype(np.uint8).reshape(-1, 128)).reshape(-1, 64)
    return blocks


def q3_k(numbers: np.ndarray, factors: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Numbers -4 .. 3; factors -32 .. 31 of 16 groups."""
    codes = (numbers + 4).astype(np.uint8)
    blocks = _start(d, 110, at=108)
    # Bit k of byte i is the third bit of weight 32 k + i.
    blocks[:, :32] = np.packbits((codes >> 2).reshape(-1, 8, 32), axis=1, bitorder="little")[:, 0]
    blocks[:, 32:96] = _pairs((codes & 3).reshape(-1, 128)).reshape(-1, 64)
    stored = (factors + 32).astype(np.uint8)
    blocks[:, 96:104] = _nibbles(stored & 15)
    blocks[:, 104:108] = _pairs(stored >> 4)
    return blocks


def q4_k(numbers: np.ndarray, factors: np.ndarray, least: np.ndarray, d: np.ndarray, dmin: np.ndarray):
    """Numbers 0 .. 15; w = d factor number - dmin least, both 0 .. 63, of 8 groups."""
    blocks = _start(d, 144)
    _put_half(blocks, dmin, 2)
    scale, low = factors.astype(np.uint8), least.astype(np.uint8)
    blocks[:, 4:8] = scale[:, :4] | scale[:, 4:] >> 4 << 6
    blocks[:, 8:12] = low[:, :4] | low[:, 4:] >> 4 << 6
    blocks[:, 12:16] = scale[:, 4:] & 15 | low[:, 4:] << 4
    blocks[:, 16:] = _nibbles(numbers.astype(np.uint8).reshape(-1, 64)).reshape(-1, 128)
    return blocks


def q6_k(numbers: np.ndarray, factors: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Numbers -32 .. 31; factors int8 of 16 groups."""
    codes = (numbers + 32).astype(np.uint8).reshape(-1, 128)
    blocks = _start(d, 210, at=208)
    blocks[:, :128] = _nibbles(codes & 15).reshape(-1, 128)
    blocks[:, 128:192] = _pairs(codes >> 4).reshape(-1, 64)
    blocks[:, 192:208] = factors.astype(np.int8).view(np.uint8)
    return blocks
