"""Every block decoder bit for bit against the `gguf` package, on random and on extreme blocks."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from lowbit.errors import UnsupportedError
from lowbit.model.gguf_types import TENSOR_TYPES, check_readable, decode, split, tensor_type

QUANTIZED = [kind for kind in TENSOR_TYPES.values() if kind.split is not None]
FLOATS = [kind for kind in TENSOR_TYPES.values() if kind.float_type is not None]


def same_bits(got, want):
    """Equal bit for bit, any NaN for any NaN."""
    both_nan = np.isnan(got) & np.isnan(want)
    return bool(((got.view(np.uint32) == want.view(np.uint32)) | both_nan).all())


@pytest.mark.parametrize("kind", TENSOR_TYPES.values(), ids=lambda kind: kind.name)
def test_sizes_and_numbers(kind):
    number = gguf.GGMLQuantizationType[kind.name]
    assert number == kind.number
    assert gguf.GGML_QUANT_SIZES[number] == (kind.block, kind.nbytes)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_decoder(kind, rng):
    random = rng.integers(0, 256, (400, kind.nbytes), dtype=np.uint8)
    constant = np.repeat(np.arange(256, dtype=np.uint8)[:, None], kind.nbytes, axis=1)
    blocks = np.concatenate((random, constant))
    with np.errstate(all="ignore"):
        want = dequantize(blocks, gguf.GGMLQuantizationType(kind.number)).reshape(-1)
        got = decode(blocks.reshape(-1), kind)
    assert got.dtype == np.float32 and same_bits(got, want)
    assert not same_bits(got, decode(np.roll(blocks, 1, axis=1).reshape(-1), kind))  # the test can fail


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.name)
def test_floats(kind):
    if kind.name == "F32":
        raw = np.array([0, -0.0, 1e-45, np.inf, np.nan, 3.4e38], "<f4")
        want = raw.astype(np.float32)
    else:
        raw = np.arange(65536, dtype="<u2")
        want = (
            raw.view("<f2").astype(np.float32)
            if kind.name == "F16"
            else (raw.astype("<u4") << 16).view("<f4")
        )
    assert same_bits(decode(raw.view(np.uint8), kind), want)


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_parts_are_in_range(kind, rng):
    raw = rng.integers(0, 256, 100 * kind.nbytes, dtype=np.uint8)
    parts = split(raw, kind)
    groups = kind.block // kind.group
    assert parts.codes.shape == (100, kind.block) and parts.codes.dtype == np.uint8
    assert parts.codes.max() < 1 << kind.bits
    assert parts.scales.shape == (100, groups)
    assert parts.scales.dtype == (np.float32 if kind.scale_type == "fp32" else np.float16)
    assert (parts.offsets is not None) == kind.has_offsets


def test_unknown_and_unreadable():
    with pytest.raises(
        UnsupportedError, match=r"tensor 'x' has the unknown type 1234; lowbit reads F32, F16, Q4_0"
    ):
        tensor_type(1234, "tensor 'x'")
    with pytest.raises(UnsupportedError, match="type IQ4_NL has no decoder"):
        check_readable(TENSOR_TYPES[20], "load")
    with pytest.raises(UnsupportedError, match="type TQ1_0 has no decoder"):
        decode(np.zeros(54, np.uint8), TENSOR_TYPES[34])
