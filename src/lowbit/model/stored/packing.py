"""Codes, levels and scales of a file as the terms of a PackedMatrix, in the narrowest exact types."""

from __future__ import annotations

import numpy as np

from lowbit.formats.minifloat import minifloat
from lowbit.model.stored.grouping import Grouping
from lowbit.packed import CodeTerm, GatheredTerm, PackedMatrix, Term, pack_base3, pack_codes, pack_groups


def code_matrix(
    codes: np.ndarray,
    bits: int,
    levels: np.ndarray,
    scales: np.ndarray,
    groups: Grouping,
    name: str,
    *,
    zero_points: np.ndarray | None = None,
    scale_type: str | None = None,
    tensor_divisor: float = 1.0,
    base3: bool = False,
) -> PackedMatrix:
    """The matrix scales * (levels[codes] - zero_points).

    codes: uint8 [out_features, in_features]. levels: float32 [n], n <= 2**bits. scales: float32
    [out_features, stored groups], or [1, stored groups] for all rows; with scale_type "e8m0" or "e4m3" uint8.
    zero_points: uint8 of the shape of the scales. scale_type None: float16 where that is exact, else float32.
    base3: ternary codes in 1.6 bits, where the groups allow it.
    """
    out_features, in_features = codes.shape
    scales = groups.parameters(np.broadcast_to(scales, (out_features, scales.shape[1])))
    if scale_type is None:
        scales, scale_type = narrowed(scales)
    zeros = None
    if zero_points is not None:
        zeros = groups.parameters(np.broadcast_to(zero_points, (out_features, zero_points.shape[1])))
        zeros = pack_groups(np.ascontiguousarray(zeros))
    base3 = base3 and groups.size % 64 == 0 and groups.inputs is None
    ordered = groups.codes(codes)
    term = CodeTerm(
        bits=bits,
        levels=np.ascontiguousarray(levels, np.float32)[None],
        codes=pack_base3(ordered) if base3 else pack_codes(ordered, bits),
        scales=pack_groups(np.ascontiguousarray(scales)),
        scale_type=scale_type,
        group_size=groups.size,
        zero_points=zeros,
        tensor_divisor=tensor_divisor,
        packing="base3" if base3 else "planes",
    )
    whole: Term = term if groups.inputs is None else GatheredTerm(groups.inputs, term)
    suffix = "" if scale_type != "fp32" else "-fp32"
    return PackedMatrix(out_features, in_features, (whole,), name + suffix)


def narrowed(scales: np.ndarray) -> tuple[np.ndarray, str]:
    """(the scales as float16, "fp16") where that changes none of them, else (float32, "fp32").

    bfloat16 scales become float32 only where their exponents need it: their 8 bits of significand fit
    float16.
    """
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if np.array_equal(halves.astype(np.float32), scales):
        return halves, "fp16"
    return scales.astype(np.float32, copy=False), "fp32"


def size_name(size: int, in_features: int) -> str:
    """ "g64", or "row" for groups as long as a row."""
    return "row" if size >= in_features else f"g{size}"


def _float_levels(exponent_bits: int, mantissa_bits: int, specials: str) -> np.ndarray:
    """Values of a small float in code order; codes that are no number have level 0 and must not occur."""
    values = minifloat(exponent_bits, mantissa_bits, specials=specials).values()
    return np.where(np.isfinite(values), values, 0).astype(np.float32)


E2M1 = _float_levels(2, 1, "finite")
E2M3 = _float_levels(2, 3, "finite")
FP8 = {"F8_E4M3": _float_levels(4, 3, "fn"), "F8_E5M2": _float_levels(5, 2, "ieee")}
FP8_NAMES = {"F8_E4M3": "fp8-e4m3", "F8_E5M2": "fp8-e5m2"}


def has_nan(codes: np.ndarray, dtype: str) -> bool:
    """Is one of these 8-bit floats NaN or infinite?"""
    magnitudes = codes & 0x7F
    limit = 0x7F if dtype == "F8_E4M3" else 0x7C
    return int(magnitudes.max(initial=0)) >= limit
