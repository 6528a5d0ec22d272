"""Every block decoder bit for bit against the `gguf` package, on random and on extreme blocks."""

from importlib.metadata import version

import gguf
import numpy as np
import pytest
from gguf import quants
from gguf.quants import dequantize

from lowbit.errors import UnsupportedError
from lowbit.model.gguf_grids import grid
from lowbit.model.gguf_matrix import matrix_from_gguf
from lowbit.model.gguf_types import TENSOR_TYPES, check_readable, decode, split, tensor_type
from lowbit.packed.terms import SCALE_DTYPES

QUANTIZED = [kind for kind in TENSOR_TYPES.values() if kind.split is not None]
CHECKED = [kind for kind in QUANTIZED if kind.name != "Q1_0"]  # which the package cannot decode
HALVES = {  # byte of each fp16 number of a block
    "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": (), "IQ1_M": (),
}  # fmt: skip
HALVES = {kind.name: HALVES.get(kind.name, (0,)) for kind in QUANTIZED}
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


def interop(kinds):
    """One parameter for each type, marked as held against the `gguf` package."""
    return [
        pytest.param(
            kind, id=kind.name, marks=pytest.mark.interop(type=kind.name, direction="read", against="gguf")
        )
        for kind in kinds
    ]


def edge_blocks(kind):
    """Every byte at every place over three grounds, and every fp16 number where scales lie."""
    one = np.arange(256, dtype=np.uint8)
    grounds = [np.full(kind.nbytes, byte, np.uint8) for byte in (0, 0x3C, 0x81)]
    blocks = []
    for ground in grounds:
        each = np.tile(ground, (kind.nbytes, 256, 1))
        for at in range(kind.nbytes):
            each[at, :, at] = one
        blocks.append(each.reshape(-1, kind.nbytes))
    return np.concatenate(blocks)


def scale_blocks(kind, rng):
    """Random codes under every fp16 bit pattern: subnormal, infinite and NaN ones included."""
    blocks = rng.integers(0, 256, (4096, kind.nbytes), dtype=np.uint8)
    patterns = np.arange(0, 65536, 16, dtype=np.uint16) | rng.integers(0, 16, 4096).astype(np.uint16)
    for at in HALVES.get(kind.name, ()):
        blocks[:, at : at + 2] = patterns[:, None].view(np.uint8)
    if kind.name == "IQ1_M":  # the nibbles of the scale are spread over four words
        for word in range(4):
            at = 49 + 2 * word
            blocks[:, at] = blocks[:, at] & 15 | (patterns >> 4 * word & 15).astype(np.uint8) << 4
    return blocks


def outside(blocks, kind):
    """What the `gguf` package gives."""
    with np.errstate(all="ignore"):
        return dequantize(blocks, gguf.GGMLQuantizationType(kind.number)).reshape(-1)


@pytest.mark.parametrize("kind", interop(CHECKED))
def test_decoder(kind, rng):
    random = rng.integers(0, 256, (400, kind.nbytes), dtype=np.uint8)
    constant = np.repeat(np.arange(256, dtype=np.uint8)[:, None], kind.nbytes, axis=1)
    for blocks in (random, constant, edge_blocks(kind), scale_blocks(kind, rng)):
        got = decode(blocks.reshape(-1), kind)
        assert got.dtype == np.float32 and same_bits(got, outside(blocks, kind))
    assert not same_bits(got, decode(np.roll(blocks, 1, axis=1).reshape(-1), kind))  # the test can fail


@pytest.mark.parametrize("kind", interop(CHECKED))
def test_what_the_package_writes(kind, rng):
    """Weights quantized by the package, with blocks of zeros and of one large weight."""
    weights = rng.normal(size=(40, 512)).astype(np.float32)
    weights[3] = 0
    weights[5, ::7] *= 1000
    if kind.packing == "base3":
        weights = np.sign(np.round(weights)) * 0.5
    number = gguf.GGMLQuantizationType(kind.number)
    try:
        blocks = gguf.quants.quantize(weights, number)
    except NotImplementedError:
        pytest.skip(f"the gguf package of version {version('gguf')} does not quantize to {kind.name}")
    got = decode(blocks.reshape(-1), kind)
    assert same_bits(got, outside(blocks.reshape(-1, kind.nbytes), kind))
    assert not got.reshape(weights.shape)[3].any()
    assert np.corrcoef(got, weights.reshape(-1))[0, 1] > 0.8


def test_one_bit_weights_by_hand():
    """Q1_0 is in ggml, but the package has no decoder: bits 0 and 1 are -d and d."""
    block = np.zeros(18, np.uint8)
    block[:2] = np.float16([0.75]).view(np.uint8)
    block[2], block[17] = 0b0000_0101, 0x80
    got = decode(block, TENSOR_TYPES[41])
    expected = np.full(128, -0.75, np.float32)
    expected[[0, 2, 127]] = 0.75
    np.testing.assert_array_equal(got, expected)


def test_grids_are_the_packages():
    for name, entry in (
        ("iq1", quants.IQ1_S),
        ("iq2_xxs", quants.IQ2_XXS),
        ("iq2_xs", quants.IQ2_XS),
        ("iq2_s", quants.IQ2_S),
        ("iq3_xxs", quants.IQ3_XXS),
        ("iq3_s", quants.IQ3_S),
    ):
        entry.init_grid()
        magnitudes = np.array(entry.grid_map, np.float32)[grid(name)]
        np.testing.assert_array_equal(magnitudes, entry.grid.reshape(entry.grid_shape))


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
    assert parts.codes.max() < (4 if kind.name == "TQ2_0" else len(kind.levels))
    with_factors = kind.scale_type == "m8"
    stored = SCALE_DTYPES[kind.scale_type]
    assert parts.scales.shape == (100, 1 if with_factors else groups) and parts.scales.dtype == stored
    assert (parts.factors is not None) == with_factors
    assert (parts.offsets is not None) == kind.has_offsets
    assert (parts.offset_factors is not None) == (with_factors and kind.has_offsets)
    for factors in (parts.factors, parts.offset_factors):
        assert factors is None or (factors.shape == (100, groups) and factors.dtype == np.int8)


def test_bits_as_run():
    """What docs/formats.md says about memory: the terms as they are made, without padding of rows."""
    for kind in QUANTIZED:
        raw = np.zeros(64 * 1280 // kind.block * kind.nbytes, np.uint8)  # both 256 and 20 divide 1280
        matrix = matrix_from_gguf(raw, kind, 64, 1280)
        levels = matrix.terms[0].levels.nbytes
        assert 8 * (matrix.nbytes - levels) / (64 * 1280) == pytest.approx(kind.run_bits), kind.name


def test_unknown_and_unreadable():
    with pytest.raises(
        UnsupportedError, match=r"tensor 'x' has the unknown type 1234; lowbit reads F32, F16, Q4_0"
    ):
        tensor_type(1234, "tensor 'x'")
    with pytest.raises(UnsupportedError, match="type 31: a repacked Q4_0"):
        tensor_type(31, "tensor 'x'")
    with pytest.raises(UnsupportedError, match=r"type Q8_K has no decoder .it holds activations"):
        check_readable(TENSOR_TYPES[15], "load")
    with pytest.raises(UnsupportedError, match="type I32 has no decoder"):
        decode(np.zeros(4, np.uint8), TENSOR_TYPES[26])
