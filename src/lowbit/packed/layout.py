"""How codes and group parameters lie in memory: the kernel order, on disk and in RAM alike.

Rows are padded to blocks of 32 and inputs to chunks of 32. A chunk of one block holds two tiles of
16 rows; a tile holds 8 steps of 4 inputs. In the 64-byte vector of one step, byte 4 * row + j belongs to
(row of the tile, input 4 * step + j), which is the operand order of an int8 dot product with 16 lanes.

A code of `bits` is cut into planes of 1, 2, 4 or 8 bits, widest first, the first plane taking the lowest
bits. A plane of w bits stores the 8 steps of a tile in w vectors: vector v holds steps
(8/w) v .. (8/w) v + 8/w - 1, step (8/w) v + i in bits w i .. w i + w - 1 of each byte. So one load, a shift
and a mask give a whole step, and the planes of a tile follow one another.

The NumPy functions named `*_reference` define this order; docs/formats.md says the same in prose.
"""

import numpy as np

from lowbit.errors import FormatError

try:  # The native module packs many times faster; the functions below define what it must produce.
    from lowbit._native import pack_codes as _native_pack
    from lowbit._native import unpack_codes as _native_unpack
except ImportError:
    _native_pack = _native_unpack = None

BLOCK_ROWS = 32
TILE_ROWS = 16
CHUNK = 32
STEPS = 8  # of 4 inputs, in one chunk
PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}
_SLAB_BYTES = 1 << 24  # temporary memory of one step of packing


def block_count(out_features: int) -> int:
    return -(-out_features // BLOCK_ROWS)


def chunk_count(in_features: int) -> int:
    return -(-in_features // CHUNK)


def codes_shape(out_features: int, in_features: int, bits: int) -> tuple[int, int, int, int]:
    """Shape of the uint8 array of packed codes: [blocks, chunks, 2 tiles, 64 * bits]."""
    return (block_count(out_features), chunk_count(in_features), 2, 64 * bits)


def group_count(in_features: int, group_size: int) -> int:
    """Number of scales of a row; `group_size` 0 means one for the whole row."""
    return in_features // group_size if group_size else 1


def check_group_size(in_features: int, group_size: int, what: str = "pack") -> None:
    """Raise FormatError unless `group_size` is 0 or a multiple of 16 that divides `in_features`."""
    if group_size == 0:
        return
    fits = [g for g in range(16, in_features + 1, 16) if in_features % g == 0]
    if group_size > 0 and group_size % 16 == 0 and in_features % group_size == 0:
        return
    below = max((g for g in fits if g < group_size), default=None)
    above = min((g for g in fits if g > group_size), default=None)
    nearest = " or ".join(f"-g{g}" for g in (below, above) if g)
    remedy = f"use {nearest}, or -row" if nearest else "use -row (one scale for the whole row)"
    if group_size < 0 or group_size % 16:
        problem = f"group_size={group_size} is not a multiple of 16"
    else:
        problem = f"in_features={in_features} is not a multiple of group_size={group_size}"
    raise FormatError(f"{what}: {problem}; {remedy}")


def _check_bits(bits: int) -> None:
    if bits not in PLANES:
        raise FormatError(f"pack: bits={bits}, but stored codes have 1 to 8 bits")


def pack_codes_reference(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack `codes` into kernel order.

    codes: uint8 [out_features, in_features], each below 2**bits.
    Returns uint8 [blocks, chunks, 2, 64 * bits]; padding has code 0.
    """
    _check_bits(bits)
    out_features, in_features = codes.shape
    packed = np.zeros(codes_shape(out_features, in_features, bits), np.uint8)
    blocks, chunks = packed.shape[:2]
    slab = max(1, _SLAB_BYTES // (BLOCK_ROWS * CHUNK * max(chunks, 1)))
    for first in range(0, blocks, slab):
        rows = codes[first * BLOCK_ROWS : (first + slab) * BLOCK_ROWS]
        n = min(slab, blocks - first)
        padded = np.zeros((n * BLOCK_ROWS, chunks * CHUNK), np.uint8)
        padded[: rows.shape[0], :in_features] = rows
        # [block, tile, row, chunk, step, j] -> [block, chunk, tile, step, row, j]
        steps = padded.reshape(n, 2, TILE_ROWS, chunks, STEPS, 4).transpose(0, 3, 1, 4, 2, 5)
        steps = steps.reshape(n, chunks, 2, STEPS, 64)
        start, shift = 0, 0
        for width in PLANES[bits]:
            per_byte = 8 // width
            part = ((steps >> shift) & ((1 << width) - 1)).reshape(n, chunks, 2, width, per_byte, 64)
            vectors = np.zeros((n, chunks, 2, width, 64), np.uint8)
            for i in range(per_byte):
                vectors |= part[:, :, :, :, i] << (width * i)
            size = 64 * width
            packed[first : first + n, :, :, start : start + size] = vectors.reshape(n, chunks, 2, size)
            start += size
            shift += width
    return packed


def unpack_codes_reference(packed: np.ndarray, out_features: int, in_features: int, bits: int) -> np.ndarray:
    """Undo `pack_codes_reference`: uint8 [out_features, in_features]."""
    _check_bits(bits)
    codes = np.empty((out_features, in_features), np.uint8)
    blocks, chunks = packed.shape[:2]
    slab = max(1, _SLAB_BYTES // (BLOCK_ROWS * CHUNK * max(chunks, 1)))
    for first in range(0, blocks, slab):
        part = packed[first : first + slab]
        n = part.shape[0]
        steps = np.zeros((n, chunks, 2, STEPS, 64), np.uint8)
        start, shift = 0, 0
        for width in PLANES[bits]:
            per_byte = 8 // width
            vectors = part[:, :, :, start : start + 64 * width].reshape(n, chunks, 2, width, 1, 64)
            shifts = (width * np.arange(per_byte, dtype=np.uint8)).reshape(per_byte, 1)
            values = (vectors >> shifts) & ((1 << width) - 1)
            steps |= values.reshape(n, chunks, 2, STEPS, 64) << shift
            start += 64 * width
            shift += width
        # [block, chunk, tile, step, row, j] -> [block, tile, row, chunk, step, j]
        rows = steps.reshape(n, chunks, 2, STEPS, TILE_ROWS, 4).transpose(0, 2, 4, 1, 3, 5)
        rows = rows.reshape(n * BLOCK_ROWS, chunks * CHUNK)
        target = codes[first * BLOCK_ROWS : (first + n) * BLOCK_ROWS]
        target[:] = rows[: target.shape[0], :in_features]
    return codes


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes into kernel order; the fast form of `pack_codes_reference`.

    Raises FormatError if `codes` is not uint8 [out_features, in_features] or a code needs more bits.
    """
    _check_bits(bits)
    if codes.ndim != 2 or codes.dtype != np.uint8:
        raise FormatError(
            f"pack_codes: codes are {codes.dtype} {list(codes.shape)}; give uint8 [out_features, in_features]"
        )
    if bits < 8 and codes.size and int(codes.max()) >> bits:
        raise FormatError(
            f"pack_codes: code {int(codes.max())} does not fit {bits} bits; mask or use more bits"
        )
    if _native_pack is None:
        return pack_codes_reference(codes, bits)
    packed = np.empty(codes_shape(codes.shape[0], codes.shape[1], bits), np.uint8)
    _native_pack(np.ascontiguousarray(codes), packed, bits)
    return packed


def unpack_codes(packed: np.ndarray, out_features: int, in_features: int, bits: int) -> np.ndarray:
    """Codes uint8 [out_features, in_features] of a packed array [blocks, chunks, 2, 64 * bits]."""
    _check_bits(bits)
    expected = codes_shape(out_features, in_features, bits)
    if packed.shape != expected or packed.dtype != np.uint8:
        raise FormatError(
            f"unpack_codes: packed codes are {packed.dtype} {list(packed.shape)}; a {bits}-bit matrix of "
            f"{out_features} x {in_features} has uint8 {list(expected)}"
        )
    if _native_unpack is None:
        return unpack_codes_reference(packed, out_features, in_features, bits)
    codes = np.empty((out_features, in_features), np.uint8)
    _native_unpack(np.ascontiguousarray(packed), codes, bits)
    return codes


def pack_groups(values: np.ndarray, fill: int = 0) -> np.ndarray:
    """Scales, zero-points, offsets or selectors [out_features, groups] to [blocks, groups, 32].

    Padded rows get `fill`.
    """
    out_features, groups = values.shape
    blocks = block_count(out_features)
    padded = np.full((blocks * BLOCK_ROWS, groups), fill, values.dtype)
    padded[:out_features] = values
    return np.ascontiguousarray(padded.reshape(blocks, BLOCK_ROWS, groups).transpose(0, 2, 1))


def unpack_groups(packed: np.ndarray, out_features: int) -> np.ndarray:
    """Undo `pack_groups`: [blocks, groups, 32] to [out_features, groups]."""
    blocks, groups, rows = packed.shape
    return np.ascontiguousarray(packed.transpose(0, 2, 1).reshape(blocks * rows, groups)[:out_features])


def pack_multipliers(multipliers: np.ndarray) -> np.ndarray:
    """4-bit multipliers of m4 scales, uint8 [out_features, groups], to [blocks, groups, 16].

    Byte r of a group has row r of tile 0 in its low nibble and row r of tile 1 in its high one. Padded rows
    hold 0. Raises FormatError for a multiplier above 15.
    """
    if multipliers.dtype != np.uint8 or int(multipliers.max(initial=0)) > 15:
        raise FormatError(
            f"pack_multipliers: received {multipliers.dtype} up to {multipliers.max(initial=0)}; "
            "give uint8, 0 to 15"
        )
    rows = pack_groups(multipliers)
    return rows[:, :, :TILE_ROWS] | rows[:, :, TILE_ROWS:] << 4


def unpack_multipliers(packed: np.ndarray, out_features: int) -> np.ndarray:
    """Undo `pack_multipliers`: uint8 [out_features, groups]."""
    return unpack_groups(np.concatenate([packed & 15, packed >> 4], axis=2), out_features)


def pack_values(values: np.ndarray) -> np.ndarray:
    """Plain float weights [out_features, in_features] to [blocks, in_features, 32], padded rows 0."""
    return pack_groups(values)


def unpack_values(packed: np.ndarray, out_features: int) -> np.ndarray:
    """Undo `pack_values`."""
    return unpack_groups(packed, out_features)
