"""Codes and scales in GGUF's blocks decode to the very same numbers, by the gguf package."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from lowbit.interop.gguf_exact import QUANTIZED, exact_rows
from lowbit.model.gguf_matrix import matrix_from_gguf
from lowbit.model.gguf_types import TENSOR_TYPES, decode
from lowbit.packed import PackedMatrix, pack_codes, pack_groups
from lowbit.packed.terms import CodeTerm

from .matrices import quantized, weights

# Our format -> the types that hold it exactly.
HELD = {
    "int4-g32": {"Q4_0", "Q4_1", "Q5_0", "Q8_0"},
    "int4-g128": {"Q4_0", "Q4_1", "Q5_0", "Q8_0"},
    "int2-g64": {"Q4_0", "Q4_1", "Q5_0", "Q8_0"},
    "int5-g64": {"Q5_0", "Q8_0"},
    "int6-g32": {"Q8_0"},
    "int8-g32": {"Q8_0"},
    "int8-row": {"Q8_0"},
    "int4a-g64": {"Q5_0", "Q8_0"},
    "int3a-g64": {"Q4_0", "Q5_0", "Q8_0"},
    "int8a-g64": set(),
    "int4b-g64": {"Q5_0", "Q8_0"},
    "ternary": {*QUANTIZED} - {"MXFP4"},
    "ternary-g64": {"Q4_0", "Q4_1", "Q5_0", "Q8_0"},
    "int2-g16-m4": {"Q2_K", "Q3_K", "Q6_K"},
    "int3-g16-m4": {"Q3_K", "Q6_K"},
    "int4-g16-m4": {"Q6_K"},
    "int4-g32-m4": {"Q4_K", "Q6_K"},
    "mxfp4": {"MXFP4", "Q5_0", "Q8_0"},
    "mxint8": {"Q8_0"},
    "nf4-g64": set(),
    "nvfp4": set(),
    "bitmod4-g128": set(),
    "bcq2-g128": set(),
}
CASES = [
    pytest.param(name, kind, marks=pytest.mark.interop(type=kind, direction="write", against="gguf"))
    for name, kinds in HELD.items()
    for kind in sorted(kinds)
]


def decoded(raw: np.ndarray, kind: str) -> np.ndarray:
    return dequantize(raw, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_fits_is_stored_exactly(name, kind):
    matrix = quantized(name)
    rows = exact_rows(matrix, kind)
    raw = np.concatenate([rows(0, 32), rows(32, 38)])  # in parts
    np.testing.assert_array_equal(decoded(raw, kind), matrix.dequantize())


@pytest.mark.parametrize("name", HELD)
def test_what_does_not_fit_is_told(name):
    values = weights()
    values[3, 7] = 0.5  # scales in the range of fp16 whatever the groups
    matrix = quantized(name, values)
    found = {kind for kind in QUANTIZED if exact_rows(matrix, kind) is not None}
    assert found >= HELD[name]
    for kind in found:
        np.testing.assert_array_equal(decoded(exact_rows(matrix, kind)(0, 70), kind), matrix.dequantize())


def linear(codes: np.ndarray, scales: np.ndarray, **more) -> PackedMatrix:
    """A 4-bit matrix of levels 0 .. 15 with these codes and fp32 scales."""
    group = codes.shape[1] // scales.shape[1]
    levels = np.arange(16, dtype=np.float32)[None]
    term = CodeTerm(4, levels, pack_codes(codes, 4), pack_groups(scales), "fp32", group, **more)
    return PackedMatrix(*codes.shape, (term,))


def test_scales_that_fp16_does_not_hold_are_no_q4():
    codes = np.random.default_rng(0).integers(0, 8, (32, 64)).astype(np.uint8)
    scales = np.full((32, 2), 0.5, np.float32)
    assert exact_rows(linear(codes, scales), "Q4_0") is None  # codes could be up to 15
    assert exact_rows(linear(codes, scales), "Q8_0") is not None
    scales[9, 1] = np.float32(1 / 3)
    assert exact_rows(linear(codes, scales), "Q8_0") is None
    scales[9, 1] = 65536.0
    assert exact_rows(linear(codes, scales), "Q8_0") is None


@pytest.mark.interop(type="Q4_K", direction="write", against="gguf")
def test_offsets_and_scales_of_q4_k_are_found_again():
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (64, 2 * 144)).astype(np.uint8)
    halves = (rng.uniform(0.001, 0.1, (64, 2, 2))).astype(np.float16)
    raw.reshape(64, 2, 144)[:, :, :4] = halves.view(np.uint8).reshape(64, 2, 4)
    matrix = matrix_from_gguf(raw.reshape(-1), TENSOR_TYPES[12], 64, 512)
    again = exact_rows(matrix, "Q4_K")(0, 64)
    np.testing.assert_array_equal(decoded(again, "Q4_K"), decoded(raw, "Q4_K"))


@pytest.mark.parametrize("number", [2, 3, 6, 8, 10, 11, 12, 14])
def test_blocks_of_every_linear_type_are_found_again(number):
    """Read by our reader, written again: the same numbers. Random bytes with sound fp16 scales."""
    kind = TENSOR_TYPES[number]
    rng = np.random.default_rng(number)
    raw = rng.integers(0, 256, (64, 512 // kind.block, kind.nbytes)).astype(np.uint8)
    half_at = {2: (0,), 3: (0, 2), 6: (0,), 8: (0,), 10: (80, 82), 11: (108,), 12: (0, 2), 14: (208,)}[number]
    for at in half_at:
        half = rng.uniform(-1, 1, raw.shape[:2]).astype(np.float16)
        raw[:, :, at : at + 2] = half.view(np.uint8).reshape(*raw.shape[:2], 2)
    raw[5] = 0
    matrix = matrix_from_gguf(raw.reshape(-1), kind, 64, 512)
    rows = exact_rows(matrix, kind.name)
    assert rows is not None, kind.name
    np.testing.assert_array_equal(decode(rows(0, 64).reshape(-1), kind), decode(raw.reshape(-1), kind))


def test_one_flipped_code_is_seen():
    matrix = quantized("int4-g32")
    raw = exact_rows(matrix, "Q4_0")(0, 70)
    raw[0, 5] ^= 1
    assert np.count_nonzero(decoded(raw, "Q4_0") != matrix.dequantize()) == 1
