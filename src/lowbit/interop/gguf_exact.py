"""Whether a stored matrix is one of GGUF's types under another name, and its blocks if it is.

A type holds a matrix exactly when its numbers fit, its groups are whole numbers of the type's, and its scales
are what the type can store: fp16 numbers, or (K types) whole multiples of one fp16 number per 256 weights. So
int4-g64 is Q4_0 with scales said twice, int4a is Q5_0 (the zero-point taken off), ternary is TQ1_0, and
integers with m4 multipliers are Q2_K, Q3_K, Q4_K or Q6_K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.formats import FORMATS
from lowbit.interop import gguf_blocks as blocks
from lowbit.interop.integers import Integers, halves, integers
from lowbit.interop.slabs import decoded, rows_of
from lowbit.packed import CodeTerm, FloatTerm, PackedMatrix, unpack_groups

Rows = Callable[[int, int], np.ndarray]  # (first row, count) -> uint8 [count, bytes of a row]
Packing = Callable[..., np.ndarray]
K_WEIGHTS = 256
_E2M1 = FORMATS["mxfp4"].tables[0]


@dataclass(frozen=True)
class _Linear:
    """A type of one scale and numbers low .. high for each `block` weights."""

    pack: Packing
    block: int
    low: int
    high: int


@dataclass(frozen=True)
class _Super:
    """A K type: numbers low .. low + span - 1, groups of `group` with factors of factor_low .. factor_high.

    offsets: w = d factor code - dmin least, code from 0 on; else w = d factor number
    """

    pack: Packing
    group: int
    low: int
    span: int
    factor_low: int
    factor_high: int
    offsets: bool


_LINEAR = {
    "Q4_0": _Linear(blocks.q4_0, 32, -8, 7),
    "Q5_0": _Linear(blocks.q5_0, 32, -16, 15),
    "Q8_0": _Linear(blocks.q8_0, 32, -128, 127),
    "TQ1_0": _Linear(blocks.tq1_0, 256, -1, 1),
    "TQ2_0": _Linear(blocks.tq2_0, 256, -1, 1),
}
_SUPERS = {
    "Q2_K": _Super(blocks.q2_k, 16, 0, 4, 0, 15, True),
    "Q3_K": _Super(blocks.q3_k, 16, -4, 8, -32, 31, False),
    "Q4_K": _Super(blocks.q4_k, 32, 0, 16, 0, 63, True),
    "Q6_K": _Super(blocks.q6_k, 16, -32, 64, -128, 127, False),
}
_FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
# From the smallest to the largest: where a matrix does not fit the wanted type, the first that it fits.
QUANTIZED = ("TQ1_0", "TQ2_0", "Q2_K", "Q3_K", "MXFP4", "Q4_0", "Q4_K", "Q4_1", "Q5_0", "Q6_K", "Q8_0")


def exact_rows(matrix: PackedMatrix, type_name: str) -> Rows | None:
    """How rows of the matrix lie in blocks of a type without rounding anything; None: they cannot.

    type_name: one of QUANTIZED, or F32, F16, BF16.
    """
    if type_name in _FLOATS:
        return _float_rows(matrix, type_name)
    if type_name == "MXFP4":
        return _mxfp4_rows(matrix)
    found = integers(matrix)
    if found is None:
        return None
    if type_name in _LINEAR:
        return _linear_rows(found, _LINEAR[type_name])
    if type_name == "Q4_1":
        return _q4_1_rows(found)
    return _super_rows(found, _SUPERS[type_name])


def _linear_rows(found: Integers, kind: _Linear) -> Rows | None:
    if found.offsets is not None or found.least < kind.low or found.most > kind.high:
        return None
    scales = found.per(kind.block)
    d = None if scales is None else halves(scales)
    if d is None:
        return None
    return _packed(kind.pack, found, kind.block, 0, d)


def _q4_1_rows(found: Integers) -> Rows | None:
    if found.zero_points is not None or found.most - found.least > 15:
        return None
    scales = found.per(32)
    if scales is None:
        return None
    offsets = found.offsets_per(32)
    if found.offsets is not None and (offsets is None or found.least):
        return None
    d = halves(scales)
    m = halves(scales * np.float32(found.least) if offsets is None else offsets)
    if d is None or m is None:
        return None
    return _packed(blocks.q4_1, found, 32, -found.least, d, m)


def _super_rows(found: Integers, kind: _Super) -> Rows | None:
    if found.zero_points is not None or (found.offsets is not None and (not kind.offsets or found.least)):
        return None
    low = found.least if kind.offsets else kind.low
    if found.least < low or found.most >= low + kind.span or found.columns % K_WEIGHTS:
        return None
    scales = found.per(kind.group)
    if scales is None:
        return None
    parts = _factored(scales, kind)
    if parts is None:
        return None
    factors, d = parts
    if not kind.offsets:
        return _packed(kind.pack, found, K_WEIGHTS, 0, factors, d)
    if found.offsets is None:
        dmin = halves(d.astype(np.float32) * np.float32(-low))
        least = factors if dmin is not None else None
    else:
        offsets = found.offsets_per(kind.group)
        again = None if offsets is None else _factored(-offsets, kind)
        least, dmin = again if again is not None else (None, None)
    if least is None or dmin is None:
        return None
    return _packed(kind.pack, found, K_WEIGHTS, -low, factors, least, d, dmin)


def _factored(scales: np.ndarray, kind: _Super) -> tuple[np.ndarray, np.ndarray] | None:
    """(factors int16 [rows, groups], d float16 [rows, blocks]) with d * factor == scale; None: there is none.

    The scale of largest magnitude is some whole multiple of d: all are tried.
    """
    groups = K_WEIGHTS // kind.group
    wide = np.ascontiguousarray(scales).reshape(-1, groups)
    factors = np.zeros(wide.shape, np.int16)
    d = np.zeros(len(wide), np.float16)
    place = np.abs(wide).argmax(axis=1)
    top = np.take_along_axis(wide, place[:, None], axis=1)[:, 0]
    left = np.flatnonzero(top != 0)
    tries = [*range(1, 16), *range(kind.factor_high, 15, -1), *range(kind.factor_low, 0)]
    for factor in tries:
        if not left.size:
            break
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            half = (top[left] / np.float32(factor)).astype(np.float16)
            unit = half.astype(np.float32)[:, None]
            whole = np.rint(wide[left] / unit)
            fits = (whole * unit == wide[left]) & (whole >= kind.factor_low) & (whole <= kind.factor_high)
        good = fits.all(axis=1) & np.isfinite(unit[:, 0])
        factors[left[good]] = whole[good]
        d[left[good]] = half[good]
        left = left[~good]
    if left.size:
        return None
    rows = len(scales)
    return factors.reshape(rows, -1, groups), d.reshape(rows, -1)


def _packed(pack: Packing, found: Integers, block: int, shift: int, *parts: np.ndarray) -> Rows:
    """Rows of blocks; parts: [rows, blocks of a row] or [rows, blocks of a row, groups], for `pack`."""

    def rows(first: int, count: int) -> np.ndarray:
        numbers = found.numbers(first, count)
        if shift:
            numbers += np.int16(shift)
        own: list[Any] = [part[first : first + count] for part in parts]
        flat = [part.reshape(-1, *part.shape[2:]) for part in own]
        return pack(numbers.reshape(-1, block), *flat).reshape(count, -1)

    return rows


def _mxfp4_rows(matrix: PackedMatrix) -> Rows | None:
    term = matrix.terms[0]
    if len(matrix.terms) > 1 or not isinstance(term, CodeTerm) or term.scale_type != "e8m0":
        return None
    if term.group_size != 32 or term.tensor_scale != 1.0 or tuple(term.levels.reshape(-1)) != _E2M1:
        return None

    def rows(first: int, count: int) -> np.ndarray:
        part = rows_of(matrix, first, count).terms[0]
        assert isinstance(part, CodeTerm)
        codes = part.unpack(count, matrix.in_features).reshape(-1, 32)
        return blocks.mxfp4(codes, unpack_groups(part.scales, count).reshape(-1)).reshape(count, -1)

    return rows


def _float_rows(matrix: PackedMatrix, type_name: str) -> Rows | None:
    """Floats of the same type, or numbers that the type holds."""
    term = matrix.terms[0]
    same = len(matrix.terms) == 1 and isinstance(term, FloatTerm) and term.type == _FLOATS[type_name]

    def rows(first: int, count: int) -> np.ndarray:
        return narrowed(decoded(rows_of(matrix, first, count)), type_name)

    if same or type_name == "F32":
        return rows
    values = decoded(matrix)
    return rows if np.array_equal(widened(narrowed(values, type_name), type_name), values) else None


def narrowed(values: np.ndarray, type_name: str) -> np.ndarray:
    """float32 [rows, n] as the bytes of F32, F16 or BF16, rounded to nearest even: uint8 [rows, bytes]."""
    if type_name == "F16":
        with np.errstate(over="ignore"):
            stored: np.ndarray = values.astype("<f2")
    elif type_name == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    else:
        stored = values.astype("<f4", copy=False)
    return np.ascontiguousarray(stored).view(np.uint8)


def widened(raw: np.ndarray, type_name: str) -> np.ndarray:
    """The inverse of `narrowed`."""
    if type_name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f2" if type_name == "F16" else "<f4").astype(np.float32)
