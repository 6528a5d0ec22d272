"""Scales as float32 numbers that their storage type holds exactly, and the scale of a whole tensor."""

import numpy as np

from lowbit.formats.multipliers import MAX_MULTIPLIER
from lowbit.formats.scales import decode_scales, encode_scales

F32 = np.float32
_TINY = F32(2.0**-100)  # smaller fp32 scales count as 0, so that 1 / (scale * step) stays finite
_LARGEST = {
    "fp16": F32(65504),
    "fp32": np.finfo(F32).max,
    "e8m0": F32(2.0**127),
    "e4m3": F32(448),
    "m4": F32(65504),
}
# Scales of these types keep enough digits for a least-squares refit to be worth more than a finer grid.
FINE = ("fp16", "fp32")


def round_scale(scales: np.ndarray, scale_type: str) -> np.ndarray:
    """float32 scales rounded to their storage type, saturating; e8m0 takes |scale|."""
    scales = scales.astype(F32, copy=False)
    if scale_type == "fp32":
        return np.where(np.abs(scales) < _TINY, F32(0), scales)
    if scale_type == "e8m0":
        scales = np.maximum(np.abs(scales), _TINY)
    largest = _LARGEST[scale_type]
    clipped = np.clip(scales, -largest, largest)
    return decode_scales(encode_scales(clipped, scale_type), scale_type).astype(F32)


def tensor_scale(largest: float, max_level: float, scale_type: str) -> float:
    """What to divide a whole tensor by, so that its scales fit their type; a float32 value.

    largest: largest |weight|; largest / max_level is the largest scale to expect.
    e4m3: that scale becomes 448 (NVFP4). Others: 1, or a power of two (so that nothing is rounded) where the
    scales would leave the range in which the type is precise. m4 scales are up to 15 times smaller.
    """
    if largest == 0.0:
        return 1.0
    scale = largest / max_level
    if scale_type == "e4m3":
        return float(F32(scale / 448.0)) or 1.0
    if scale_type == "m4":
        scale /= MAX_MULTIPLIER
    low, high = (2.0**-13, 2.0**14) if scale_type in ("fp16", "m4") else (2.0**-40, 2.0**40)
    if low <= scale <= high:
        return 1.0
    return float(2.0 ** max(-120, min(120, int(np.frexp(scale)[1]) - 1)))
