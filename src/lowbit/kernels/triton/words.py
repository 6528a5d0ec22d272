"""Codes as a GPU reads them: 32-bit words [words, rows], for threads side by side to read side by side.

Rows and inputs are padded to a multiple of 64, the tile of the kernels, so that no load of weights needs a
mask. A code of `bits` is cut into planes as on the CPU (packed/layout.py); a plane of w bits holds 32 / w
consecutive inputs of one row in a word, the first in the lowest bits.

Ternary codes take 1.6 bits: a word has four bytes of five inputs each, input 20 * word + 5 * byte + j. With
n = 81 c0 + 27 c1 + 9 c2 + 3 c3 + c4 the byte is ceil(256 n / 243), a fraction of 256 in base 3, so that digit
j is ((byte * 3**j) % 256) * 3 // 256: two products and no division. (Exact for all 243 values; tested.)
"""

from __future__ import annotations

import numpy as np

from lowbit.packed.layout import PLANES

ROWS = 64  # rows and inputs of a tile of the kernels
INPUTS = 64
TRITS = 20  # in one word
_PLACES = np.array([81, 27, 9, 3, 1], np.uint32)


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded_codes(codes: np.ndarray, inputs: int, fill: int) -> np.ndarray:
    """[rows, inputs], both filled up."""
    wide = np.full((padded(codes.shape[0], ROWS), inputs), fill, np.uint8)
    wide[: codes.shape[0], : codes.shape[1]] = codes
    return wide


def plane_words(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    """Codes uint8 [out_features, in_features] as planes, each int32 [words, padded rows]; widest first."""
    wide = _padded_codes(codes, padded(codes.shape[1], INPUTS), 0)
    planes, shift = [], 0
    for width in PLANES[bits]:
        per_word = 32 // width
        parts = (wide >> shift & (1 << width) - 1).reshape(len(wide), -1, per_word)
        words = np.zeros(parts.shape[:2], np.uint32)
        for i in range(per_word):
            words |= parts[:, :, i].astype(np.uint32) << np.uint32(width * i)
        planes.append(np.ascontiguousarray(words.T).view(np.int32))
        shift += width
    return planes


def codes_of_planes(planes: list[np.ndarray], bits: int, out_features: int, in_features: int) -> np.ndarray:
    """Undo `plane_words`."""
    codes = np.zeros((out_features, in_features), np.uint8)
    shift = 0
    for width, plane in zip(PLANES[bits], planes, strict=True):
        words = np.ascontiguousarray(plane.view(np.uint32).T[:out_features])
        shifts = width * np.arange(32 // width, dtype=np.uint32)
        parts = (words[:, :, None] >> shifts & np.uint32((1 << width) - 1)).astype(np.uint8)
        codes |= parts.reshape(out_features, -1)[:, :in_features] << shift
        shift += width
    return codes


def trit_words(codes: np.ndarray) -> np.ndarray:
    """Codes 0, 1, 2, uint8 [out_features, in_features], as int32 [words, padded rows]; padding has code 1."""
    wide = _padded_codes(codes, padded(padded(codes.shape[1], INPUTS), TRITS), 1)
    numbers = (wide.reshape(len(wide), -1, 4, 5) * _PLACES).sum(axis=3)
    fractions = ((256 * numbers + 242) // 243).astype(np.uint8)
    words = fractions.view("<u4")[:, :, 0]
    return np.ascontiguousarray(words.T).view(np.int32)


def codes_of_trits(words: np.ndarray, out_features: int, in_features: int) -> np.ndarray:
    """Undo `trit_words`."""
    rows = np.ascontiguousarray(words.T[:out_features])
    fractions = rows.view(np.uint8).reshape(out_features, -1, 1).astype(np.uint32)
    powers = _PLACES[::-1]
    digits = (fractions * powers % 256 * 3 // 256).astype(np.uint8)
    return np.ascontiguousarray(digits.reshape(out_features, -1)[:, :in_features])


def group_rows(values: np.ndarray) -> np.ndarray:
    """A value per row and group, [out_features, groups], as [groups, padded rows]; padding is 0."""
    wide = np.zeros((values.shape[1], padded(values.shape[0], ROWS)), values.dtype)
    wide[:, : values.shape[0]] = values.T
    return wide


def groups_of_rows(stored: np.ndarray, out_features: int) -> np.ndarray:
    """Undo `group_rows`."""
    return np.ascontiguousarray(stored[:, :out_features].T)
