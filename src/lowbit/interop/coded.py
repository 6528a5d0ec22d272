"""A matrix as GPTQ, AWQ and compressed-tensors see it: unsigned codes, a zero-point and a scale per group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.interop.integers import Integers, halves, integers, spread
from lowbit.packed import PackedMatrix


@dataclass(frozen=True)
class Shape:
    """What a target has to know before it writes.

    bits: of a code; group: inputs of a scale, 0 for the whole row; symmetric: the zero-point is 2**(bits - 1)
    half: are all scales fp16 numbers?
    """

    bits: int
    group: int
    symmetric: bool
    half: bool

    @property
    def name(self) -> str:
        return f"int{self.bits}{'' if self.symmetric else 'a'}-{f'g{self.group}' if self.group else 'row'}"


@dataclass(frozen=True, eq=False)
class Coded:
    """w = scale * (code - zero_point).

    codes: uint8 [rows, inputs]; scales: float32 [rows, groups]; zero_points: uint8 [rows, groups]
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray


def shape_of(matrix: PackedMatrix) -> Shape | None:
    """The fewest bits and largest groups that hold the matrix exactly; None: it has other levels."""
    found = integers(matrix)
    if found is None or found.offsets is not None:
        return None
    group = 0 if found.group == found.columns else found.group
    half = halves(found.scales) is not None
    symmetric = _symmetric_bits(found)
    if found.zero_points is not None and not _constant(found):
        if int(found.table.min()) or int(found.zero_points.max()) > int(found.table.max()):
            return None
        return Shape(max(int(found.table.max()).bit_length(), 1), group, False, half)
    return None if symmetric > 8 else Shape(symmetric, group, True, half)


def coded(matrices: Sequence[PackedMatrix], shape: Shape) -> Coded | None:
    """The rows of the matrices in codes of this shape, exactly; None: they do not fit it."""
    parts = [_coded(matrix, shape) for matrix in matrices]
    if any(part is None for part in parts):
        return None
    if len(parts) == 1:
        return parts[0]
    whole = [part for part in parts if part is not None]
    return Coded(
        *(np.concatenate([getattr(p, f) for p in whole]) for f in ("codes", "scales", "zero_points"))
    )


def _coded(matrix: PackedMatrix, shape: Shape) -> Coded | None:
    found = integers(matrix)
    if found is None or found.offsets is not None:
        return None
    columns = found.columns
    group = shape.group or columns
    scales = found.per(group)
    if scales is None or (shape.half and halves(scales) is None):
        return None
    middle = 1 << (shape.bits - 1)
    rows = matrix.out_features
    if found.zero_points is None or _constant(found):
        if _symmetric_bits(found) > shape.bits:
            return None
        if found.zero_points is None and found.consecutive:
            codes = found.codes(0, rows) + np.uint8((int(found.table[0]) + middle) % 256)
        else:
            codes = (found.numbers(0, rows) + middle).astype(np.uint8)
        return Coded(codes, scales, np.full(scales.shape, middle, np.uint8))
    if shape.symmetric or int(found.table.max()) >> shape.bits or int(found.zero_points.max()) >> shape.bits:
        return None
    zero_points = spread(found.zero_points, found.group, group, columns)
    if zero_points is None:
        return None
    numbers = found.numbers(0, rows).reshape(rows, zero_points.shape[1], -1)
    codes = numbers + zero_points[:, :, None].astype(np.int16)
    return Coded(codes.reshape(rows, columns).astype(np.uint8), scales, zero_points.astype(np.uint8))


def _symmetric_bits(found: Integers) -> int:
    """Bits of two's complement that hold every number."""
    return max((-found.least - 1).bit_length(), found.most.bit_length(), 0) + 1


def _constant(found: Integers) -> bool:
    """Is one zero-point everyone's, so that symmetric codes do as well?"""
    zero_points = found.zero_points
    if zero_points is None or not (zero_points == zero_points.flat[0]).all():
        return False
    return _symmetric_bits(found) <= max(int(found.table.max()).bit_length(), 1)


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, count] to int32 [n, ceil(count * bits / 32)]: densely, lowest bits first."""
    rows, count = codes.shape
    words = -(-count * bits // 32)
    if bits in (1, 2, 4, 8):
        per = 8 // bits
        padded = np.zeros((rows, words * 4 * per), np.uint8)
        padded[:, :count] = codes
        packed = padded[:, ::per].copy()
        for i in range(1, per):
            packed |= padded[:, i::per] << (bits * i)
        return packed.view("<i4")
    # 8 codes fill `bits` bytes: put together as one number of 64 bits.
    padded = np.zeros((rows, -(-count // 8) * 8), np.uint8)
    padded[:, :count] = codes
    wide = np.zeros((rows, padded.shape[1] // 8), np.uint64)
    for i in range(8):
        wide |= padded[:, i::8].astype(np.uint64) << np.uint64(bits * i)
    data = wide.astype("<u8").view(np.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    packed = np.zeros((rows, 4 * words), np.uint8)
    size = min(data.shape[1], 4 * words)
    packed[:, :size] = data[:, :size]
    return packed.view("<i4")
