"""Scales: how the factor of a group is stored.

type   storage   value
fp16   float16   signed; largest 65504, smallest 2**-24
fp32   float32   signed
e8m0   uint8     2**(code - 127), no sign, no zero (OCP Microscaling Formats v1.0 section 5.4.1)
e4m3   uint8     e4m3fn: signed, largest 448, smallest 2**-9 (NVFP4; pair it with a scale per tensor)
m4     float16   of a super-group, as fp16; its groups have 4-bit multipliers (multipliers.py)
"""

from __future__ import annotations

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats.minifloat import E8M0, minifloat

SCALE_TYPES = ("fp16", "fp32", "e8m0", "e4m3", "m4")
SCALE_BITS = {"fp16": 16, "fp32": 32, "e8m0": 8, "e4m3": 8, "m4": 16, "none": 0}
SCALE_MAX = {
    "fp16": 65504.0,
    "fp32": float(np.finfo(np.float32).max),
    "e8m0": 2.0**127,
    "e4m3": 448.0,
    "m4": 65504.0,
}

_E4M3 = minifloat(4, 3, specials="fn")
_E8M0_VALUES = np.ldexp(1.0, np.arange(255) - 127).astype(np.float32)
_E4M3_VALUES = _E4M3.values().astype(np.float32)


def check_scale_type(scale_type: str) -> None:
    if scale_type not in SCALE_TYPES:
        raise FormatError(f"scale type {scale_type!r} is unknown; use one of {', '.join(SCALE_TYPES)}")


def encode_scales(scales: np.ndarray, scale_type: str) -> np.ndarray:
    """Return `scales` in storage: float16, float32 or uint8 of the same shape, rounded to nearest even.

    scales: float array, finite. Numbers too small for the type become its smallest: zero, or 2**-127 (code 0)
    for e8m0. Raises FormatError for infinities, NaN, numbers above the largest, and negative e8m0 scales.
    """
    check_scale_type(scale_type)
    scales = np.asarray(scales)
    wide = scales.astype(np.float64)
    if not np.isfinite(wide).all():
        raise FormatError(f"encode_scales({scale_type}): a scale is infinite or NaN; check the weights")
    if scale_type == "e8m0":
        if (wide < 0).any():
            raise FormatError(
                f"encode_scales(e8m0): scale {wide.min():g} is negative, e8m0 has no sign; use fp16"
            )
        stored = E8M0.encode(np.maximum(wide, 2.0**-127))
        bad = stored == 255
    elif scale_type == "e4m3":
        stored = _E4M3.encode(wide)
        bad = (stored & 127) == 127
    else:
        dtype = np.float32 if scale_type == "fp32" else np.float16
        with np.errstate(over="ignore"):
            stored = wide.astype(dtype)
        bad = np.isinf(stored)
    if bad.any():
        worst = float(np.abs(wide).max())
        raise FormatError(
            f"encode_scales({scale_type}): scale {worst:g} is above the largest {SCALE_MAX[scale_type]:g};"
            " use scale type fp32, or divide by a scale per tensor"
        )
    return stored


def decode_scales(stored: np.ndarray, scale_type: str) -> np.ndarray:
    """Return stored scales (float16, float32 or uint8, as `encode_scales` gives them) as float32, same shape.

    The NaN codes of e8m0 (255) and e4m3 (127, 255) raise FormatError: they appear in damaged files only.
    """
    check_scale_type(scale_type)
    stored = np.asarray(stored)
    want = np.dtype({"fp16": np.float16, "fp32": np.float32, "m4": np.float16}.get(scale_type, np.uint8))
    if stored.dtype != want:
        raise FormatError(f"decode_scales({scale_type}): storage is {stored.dtype}, it must be {want}")
    if scale_type == "e8m0":
        if (stored == 255).any():
            raise FormatError("decode_scales(e8m0): code 255 is NaN; the scales are damaged")
        return _E8M0_VALUES[stored]
    if scale_type == "e4m3":
        if ((stored & 127) == 127).any():
            raise FormatError("decode_scales(e4m3): codes 127 and 255 are NaN; the scales are damaged")
        return _E4M3_VALUES[stored]
    return stored.astype(np.float32)
