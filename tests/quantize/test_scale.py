"""Scales as their storage holds them."""

import numpy as np
import pytest

from lowbit.formats.scales import encode_scales
from lowbit.quantize.scale import round_scale, tensor_scale


@pytest.mark.parametrize("scale_type", ["fp16", "fp32", "e8m0", "e4m3"])
def test_rounded_scales_are_stored_exactly(scale_type, rng):
    wide = np.concatenate([[0, 1, 448, 500, 65504, 70000, 1e-30, 1e-9], np.exp(rng.normal(0, 8, 500))])
    scales = np.concatenate([wide, -wide]).astype(np.float32)
    rounded = round_scale(scales, scale_type)
    assert rounded.dtype == np.float32 and np.isfinite(rounded).all()
    np.testing.assert_array_equal(round_scale(rounded, scale_type), rounded)
    encode_scales(rounded, scale_type)  # none is out of range
    if scale_type == "e8m0":
        assert (np.log2(rounded) % 1 == 0).all()
    bits = {"fp16": 11, "fp32": 24, "e8m0": 1, "e4m3": 4}[scale_type]
    low, high = {
        "fp16": (2**-14, 65504),
        "fp32": (2**-99, 1e38),
        "e8m0": (2**-99, 1e38),
        "e4m3": (2**-6, 448),
    }[scale_type]
    normal = (np.abs(scales) >= low) & (np.abs(scales) <= high)
    ratio = np.abs(rounded[normal] / scales[normal])
    assert np.abs(ratio - 1).max() <= (0.5 if bits == 1 else 2.0**-bits)


@pytest.mark.parametrize("scale_type", ["fp16", "fp32", "e8m0", "e4m3"])
@pytest.mark.parametrize("largest", [1e-38, 1e-20, 1e-6, 0.05, 1.0, 300.0, 1e9, 1e38])
def test_the_scale_of_a_tensor_brings_scales_into_range(largest, scale_type):
    divisor = tensor_scale(largest, 7.0, scale_type)
    assert divisor == np.float32(divisor) > 0
    scale = largest / 7.0 / divisor
    if scale_type == "fp16":
        assert 2**-14 < scale < 2**15
    if scale_type == "e4m3":
        assert scale == pytest.approx(448, rel=1e-3)
    else:
        assert np.frexp(divisor)[0] == 0.5  # a power of two: dividing by it rounds nothing
    assert tensor_scale(0.0, 7.0, scale_type) == 1.0


def test_usual_weights_are_left_alone():
    for largest in (0.02, 0.1, 1.0, 50.0):
        for levels in (1.0, 7.0, 127.0):
            assert tensor_scale(largest, levels, "fp16") == 1.0
