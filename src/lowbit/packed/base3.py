"""Base-3 packing of ternary codes: five codes of 0, 1 or 2 in one byte, 1.6 bits each.

Rows are padded to blocks of 32 in two tiles of 16, as in layout.py. A *step* is 4 inputs; byte 4 * row + j of
a 64-byte vector belongs to (row of the tile, input 4 * step + j). A vector holds five consecutive steps:
vector v of a tile has steps 5 v .. 5 v + 4, so that 64 bytes hold 16 rows of 20 inputs. With the first four
codes as n = c0 + 3 c1 + 9 c2 + 27 c3, the byte is

    64 c4 + n                     n < 64
    192 + 3 (n - 64) + c4         n = 64 .. 80          0 .. 242 in all

which a 64-entry byte lookup nearly decodes by itself. Padded rows and inputs have code 1, which is level 0 of
ternary formats: 104 where all five are padding. The functions named `*_reference` define this order.
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed.layout import BLOCK_ROWS, TILE_ROWS, block_count

try:
    from lowbit._native import pack_base3 as _native_pack
    from lowbit._native import unpack_base3 as _native_unpack
except ImportError:
    _native_pack = _native_unpack = None

STEPS = 5  # of 4 inputs, in one byte
INPUTS = 4 * STEPS  # of one vector
PADDING = 1  # code of padded rows and inputs
PADDING_BYTE = 104  # five of them
_SLAB_BYTES = 1 << 24  # temporary memory of one step of packing


def base3_shape(out_features: int, in_features: int) -> tuple[int, int, int, int]:
    """Shape of the uint8 array of packed codes: [blocks, vectors, 2 tiles, 64]."""
    return (block_count(out_features), -(-in_features // INPUTS), 2, 64)


def pack_base3_reference(codes: np.ndarray) -> np.ndarray:
    """Pack codes uint8 [out_features, in_features] below 3 into uint8 [blocks, vectors, 2, 64]."""
    out_features, in_features = codes.shape
    packed = np.empty(base3_shape(out_features, in_features), np.uint8)
    blocks, vectors = packed.shape[:2]
    slab = max(1, _SLAB_BYTES // (BLOCK_ROWS * INPUTS * max(vectors, 1)))
    for first in range(0, blocks, slab):
        rows = codes[first * BLOCK_ROWS : (first + slab) * BLOCK_ROWS]
        n = min(slab, blocks - first)
        padded = np.full((n * BLOCK_ROWS, vectors * INPUTS), PADDING, np.uint8)
        padded[: rows.shape[0], :in_features] = rows
        # [block, tile, row, vector, step, j] -> [step, block, vector, tile, row, j]
        steps = padded.reshape(n, 2, TILE_ROWS, vectors, STEPS, 4).transpose(4, 0, 3, 1, 2, 5)
        low = steps[0] + 3 * steps[1] + 9 * steps[2] + 27 * steps[3]
        # Bytes wrap around where `low` is below 64, which the other branch takes.
        values = np.where(low < 64, 64 * steps[4] + low, 3 * low + steps[4])
        packed[first : first + n] = values.reshape(n, vectors, 2, 64)
    return packed


def unpack_base3_reference(packed: np.ndarray, out_features: int, in_features: int) -> np.ndarray:
    """Undo `pack_base3_reference`: uint8 [out_features, in_features].

    Damaged bytes, above 242, give a fourth code of 3.
    """
    codes = np.empty((out_features, in_features), np.uint8)
    blocks, vectors = packed.shape[:2]
    slab = max(1, _SLAB_BYTES // (BLOCK_ROWS * INPUTS * max(vectors, 1)))
    for first in range(0, blocks, slab):
        part = packed[first : first + slab].reshape(-1, vectors, 2, TILE_ROWS, 4)
        n = part.shape[0]
        # [block, vector, tile, row, j, step] -> [block, tile, row, vector, step, j]
        escaped = part >= 192
        low = np.where(escaped, part // 3, part & 63)  # 64 + (part - 192) / 3 is part / 3
        digits = [low % 3, low // 3 % 3, low // 9 % 3, low // 27, np.where(escaped, part % 3, part >> 6)]
        rows = np.stack(digits, axis=-1).transpose(0, 2, 3, 1, 5, 4).reshape(n * BLOCK_ROWS, vectors * INPUTS)
        target = codes[first * BLOCK_ROWS : (first + n) * BLOCK_ROWS]
        target[:] = rows[: target.shape[0], :in_features]
    return codes


def pack_base3(codes: np.ndarray) -> np.ndarray:
    """Pack ternary codes; the fast form of `pack_base3_reference`.

    Raises FormatError if `codes` is not uint8 [out_features, in_features] or a code is above 2.
    """
    if codes.ndim != 2 or codes.dtype != np.uint8:
        raise FormatError(
            f"pack_base3: codes are {codes.dtype} {list(codes.shape)}; give uint8 [out_features, in_features]"
        )
    if codes.size and int(codes.max()) > 2:
        raise FormatError(f"pack_base3: code {int(codes.max())}; base-3 codes are 0, 1 or 2")
    if _native_pack is None:
        return pack_base3_reference(codes)
    packed = np.empty(base3_shape(*codes.shape), np.uint8)
    _native_pack(np.ascontiguousarray(codes), packed)
    return packed


def unpack_base3(packed: np.ndarray, out_features: int, in_features: int) -> np.ndarray:
    """Codes uint8 [out_features, in_features] of a packed array [blocks, vectors, 2, 64]."""
    expected = base3_shape(out_features, in_features)
    if packed.shape != expected or packed.dtype != np.uint8:
        raise FormatError(
            f"unpack_base3: packed codes are {packed.dtype} {list(packed.shape)}; a base-3 matrix of "
            f"{out_features} x {in_features} has uint8 {list(expected)}"
        )
    if _native_unpack is None:
        return unpack_base3_reference(packed, out_features, in_features)
    codes = np.empty((out_features, in_features), np.uint8)
    _native_unpack(np.ascontiguousarray(packed), codes)
    return codes
