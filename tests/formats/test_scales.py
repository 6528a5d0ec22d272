"""Scales in storage: every code, rounding, limits."""

import ml_dtypes
import numpy as np
import pytest

from lowbit.errors import FormatError
from lowbit.formats.scales import SCALE_BITS, SCALE_MAX, SCALE_TYPES, decode_scales, encode_scales

STORAGE = {"fp16": np.float16, "fp32": np.float32, "e8m0": np.uint8, "e4m3": np.uint8, "m4": np.float16}


@pytest.mark.parametrize(
    ("scale_type", "peer", "nan"),
    [("e8m0", ml_dtypes.float8_e8m0fnu, {255}), ("e4m3", ml_dtypes.float8_e4m3fn, {127, 255})],
)
def test_every_code_of_8_bits(scale_type, peer, nan):
    codes = np.array([c for c in range(256) if c not in nan], np.uint8)
    values = decode_scales(codes, scale_type)
    assert values.dtype == np.float32
    assert (values == codes.view(peer).astype(np.float32)).all()
    assert (encode_scales(values, scale_type) == codes).all()
    for code in nan:
        with pytest.raises(FormatError, match="NaN"):
            decode_scales(np.array([3, code], np.uint8), scale_type)


def test_every_fp16_scale():
    codes = np.arange(2**16, dtype=np.uint16).view(np.float16)
    codes = codes[np.isfinite(codes)]
    assert (
        encode_scales(decode_scales(codes, "fp16"), "fp16").view(np.uint16) == codes.view(np.uint16)
    ).all()


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
def test_storage_shape_and_error(scale_type, rng):
    scales = np.exp2(rng.uniform(-5, 5, (3, 4, 32))).astype(np.float32)
    stored = encode_scales(scales, scale_type)
    assert stored.dtype == STORAGE[scale_type] and stored.shape == scales.shape
    assert stored.itemsize * 8 == SCALE_BITS[scale_type]
    half_step = {"fp16": 2**-11, "fp32": 0, "e8m0": 1 / 3, "e4m3": 2**-4, "m4": 2**-11}[scale_type]
    assert (np.abs(decode_scales(stored, scale_type) / scales - 1) <= half_step).all()


def test_float64_scales_are_rounded_once():
    x = np.array([1 + 2.0**-11 + 2.0**-40])
    assert encode_scales(x, "fp16") == np.float16(1 + 2.0**-10)


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
def test_zero_and_limits(scale_type):
    largest = SCALE_MAX[scale_type]
    assert decode_scales(encode_scales(np.array([largest]), scale_type), scale_type) == np.float32(largest)
    zero = encode_scales(np.zeros(2, np.float32), scale_type)
    assert (zero == 0).all()
    assert decode_scales(zero, scale_type)[0] == (2.0**-127 if scale_type == "e8m0" else 0.0)
    with pytest.raises(FormatError, match="above the largest"):
        encode_scales(np.array([1.0, largest * 1.6]), scale_type)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(FormatError, match="infinite or NaN"):
            encode_scales(np.array([bad]), scale_type)


def test_signs():
    for scale_type in ("fp16", "fp32", "e4m3", "m4"):
        assert decode_scales(encode_scales(np.array([-1.5]), scale_type), scale_type) == -1.5
    with pytest.raises(FormatError, match="negative"):
        encode_scales(np.array([1.0, -0.5]), "e8m0")


def test_wrong_storage_and_types():
    with pytest.raises(FormatError, match="float16"):
        decode_scales(np.zeros(3, np.float32), "fp16")
    with pytest.raises(FormatError, match="uint8"):
        decode_scales(np.zeros(3, np.int64), "e8m0")
    for function in (encode_scales, decode_scales):
        with pytest.raises(FormatError, match="fp16, fp32, e8m0, e4m3"):
            function(np.zeros(3), "fp8")
