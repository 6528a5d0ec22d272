"""GGUF's types of few levels: one bit, ternary, and 4-bit numbers from a table.

Source of the byte layouts: ggml-common.h and ggml-quants.c of the ggml project; MXFP4's elements and scales
are those of the OCP Microscaling Formats v1.0, NVFP4's scales are unsigned e4m3 for 16 weights.
"""

from __future__ import annotations

import numpy as np

from lowbit.model.gguf_parts import Bytes, Parts, bits, half, nibbles, pairs, words

# e2m1 in the order of its codes; the second zero is the negative one, which ggml gives no sign.
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)


def split_q1_0(blocks: Bytes) -> Parts:
    return Parts(bits(blocks[:, 2:]), half(blocks, 0))


def _trits(packed: Bytes, count: int) -> np.ndarray:
    """[n, bytes] -> [n, count, bytes]: digits of q, where a byte is ceil(256 q / 243): its product with 3^i,
    modulo 256, times 3 carries digit i into the ninth bit."""
    shifted = packed[:, None] * _POWERS[:count, None]
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8)


def split_tq1_0(blocks: Bytes) -> Parts:
    parts = (_trits(blocks[:, :32], 5), _trits(blocks[:, 32:48], 5), _trits(blocks[:, 48:52], 4))
    codes = np.concatenate([part.reshape(len(blocks), -1) for part in parts], axis=1)
    return Parts(codes, half(blocks, 52))


def split_tq2_0(blocks: Bytes) -> Parts:
    return Parts(pairs(blocks[:, :64].reshape(-1, 32)).reshape(-1, 256), half(blocks, 64))


def fits_trits(raw: Bytes) -> bool:
    """Whether no code in blocks of TQ2_0 is 3, which would mean the level 2 and which no quantizer writes."""
    packed = raw.reshape(-1, 66)[:, :64]
    return not (packed & packed >> 1 & 0x55).any()


def split_mxfp4(blocks: Bytes) -> Parts:
    return Parts(nibbles(blocks[:, 1:]).reshape(-1, 32), np.ascontiguousarray(blocks[:, :1]))


def split_nvfp4(blocks: Bytes) -> Parts:
    """The sign of a scale is not looked at, and NaN counts as 0; 255 alone stays, as ggml makes it 480."""
    codes = nibbles(blocks[:, 4:].reshape(-1, 8)).reshape(-1, 64)
    stored = blocks[:, :4]
    magnitude = stored & 127
    return Parts(codes, np.where(stored == 255, stored, np.where(magnitude == 127, 0, magnitude)))


def split_iq4_nl(blocks: Bytes) -> Parts:
    return Parts(nibbles(blocks[:, 2:]).reshape(-1, 32), half(blocks, 0))


def split_iq4_xs(blocks: Bytes) -> Parts:
    low = nibbles(blocks[:, 4:8]).transpose(0, 2, 1).reshape(-1, 8)
    high = words(blocks, 2, 4, "<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    factors = (low | high.astype(np.uint8) << 4).view(np.int8) - np.int8(32)
    codes = nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(-1, 256)
    return Parts(codes, half(blocks, 0), factors=factors)
