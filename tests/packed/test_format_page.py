"""docs/formats.md is enough to read a model: the reader below is written from that page alone."""

import json
import struct

import numpy as np
import pytest

from lowbit.formats import FORMATS, emulate
from lowbit.packed import (
    NO_INPUT,
    CodeTerm,
    GatheredTerm,
    PackedMatrix,
    TensorWriter,
    pack_codes,
    pack_groups,
)
from lowbit.quantize import refine_rows, round_to_nearest

from .test_m8 import m8_term


# --- a reader from the page: NumPy and JSON only ---
def read_safetensors(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    assert (8 + length) % 64 == 0
    types = {"U8": "u1", "U16": "<u2", "U32": "<u4", "I8": "i1", "F16": "<f2", "F32": "<f4"}
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[begin:end], types[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def code_at(packed, bits, row, column):
    planes = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}[bits]
    tile = packed[row // 32, column // 32, row % 32 // 16]
    step, byte = column % 32 // 4, 4 * (row % 16) + column % 4
    code = shift = start = 0
    for width in planes:
        vector, i = step // (8 // width), step % (8 // width)
        value = tile[start + 64 * vector + byte] >> (width * i) & ((1 << width) - 1)
        code |= int(value) << shift
        shift, start = shift + width, start + 64 * width
    return code


def base3_code_at(packed, row, column):
    vector, step = column // 20, column % 20 // 4
    byte = int(packed[row // 32, vector, row % 32 // 16, 4 * (row % 16) + column % 4])
    n, last = (64 + (byte - 192) // 3, (byte - 192) % 3) if byte >= 192 else (byte % 64, byte // 64)
    return last if step == 4 else n // 3**step % 3


def multiplier_at(packed, row, group):
    byte = int(packed[row // 32, group, row % 16])
    return byte >> 4 if row % 32 >= 16 else byte & 15


def decoded_scale(stored, scale_type):
    if scale_type == "e8m0":
        return np.float32(2.0 ** (int(stored) - 127))
    if scale_type == "e4m3":
        sign, e, m = -1 if stored & 128 else 1, int(stored) >> 3 & 15, int(stored) & 7
        return np.float32(sign * (2.0 ** (e - 7) * (1 + m / 8) if e else 2.0**-6 * m / 8))
    return np.float32(stored)


def read_entropy(field, out_features, in_features):
    codes, escapes, offsets, exponents = (field[n] for n in ("codes", "escapes", "offsets", "exponents"))
    values = np.zeros((out_features, in_features), np.uint32)
    for block in range(len(codes)):
        nibble, byte = [int(offsets[2 * block])] * 2, int(offsets[2 * block + 1])
        for r, v, w in np.ndindex(codes.shape[1], 2, 64):
            record = codes[block, r]
            code = sum((int(record[24 * v + 8 * p + w // 8]) >> w % 8 & 1) << p for p in range(3))
            exponent = int(exponents[code])
            if code == 7:
                escape = int(escapes[nibble[v]]) >> 4 * v & 15
                nibble[v] += 1
                exponent = int(exponents[7 + escape]) if escape < 15 else int(escapes[byte])
                byte += escape == 15
            row, column = 32 * block + w % 32, 4 * r + 2 * v + w // 32
            if row < out_features and column < in_features:
                mantissa = int(record[48 + 64 * v + w])
                values[row, column] = (mantissa & 128) << 24 | exponent << 23 | (mantissa & 127) << 16
        assert max(nibble) == offsets[2 * block + 1] and byte == offsets[2 * block + 2]
    assert offsets[-1] + 64 == len(escapes) and not escapes[-64:].any()
    return values.view(np.float32)


def read_matrix(entry, arrays):
    out_features, in_features = entry["shape"]
    total = np.zeros((out_features, in_features), np.float32)
    for number, term in enumerate(entry["terms"]):
        field = {name.split(".")[1]: a for name, a in arrays.items() if name.split(".")[0] == str(number)}
        if term["kind"] == "rows":
            rows = field.pop("rows")
            inner = {"shape": [len(rows), in_features], "terms": [term | {"kind": "codes"}]}
            total[rows] += read_matrix(inner, {f"0.{name}": array for name, array in field.items()})
            continue
        if term["kind"] == "gathered":
            inputs = field.pop("inputs")
            inner = {"shape": [out_features, len(inputs)], "terms": [term | {"kind": "codes"}]}
            weights = read_matrix(inner, {f"0.{name}": array for name, array in field.items()})
            for j, i in enumerate(inputs):
                if i != 4294967295:
                    total[:, i] += weights[:, j]
            continue
        if term["kind"] == "entropy":
            total += read_entropy(field, out_features, in_features)
            continue
        for o, i in np.ndindex(out_features, in_features):
            if term["kind"] == "floats":
                value = field["values"][o // 32, i, o % 32]
                if term["type"] == "bf16":
                    value = np.array(int(value) << 16, np.uint32).view(np.float32)
                total[o, i] += np.float32(value)
                continue
            m4 = term["scale_type"] == "m4"
            size = term["super_size"] if m4 else term["group_size"]
            place = (o // 32, i // size if size else 0, o % 32)
            table = int(field["selectors"][place]) if "selectors" in field else 0
            if term.get("packing") == "base3":
                code = base3_code_at(field["codes"], o, i)
            else:
                code = code_at(field["codes"], term["bits"], o, i)
            value = field["levels"][table, code]
            if m4:
                value *= np.float32(multiplier_at(field["multipliers"], o, i // term["group_size"]))
            if "zero_points" in field:
                value -= np.float32(field["zero_points"][place])
            if term["scale_type"] == "m8":
                wide = (o // 32, i // term["super_size"] if term["super_size"] else 0, o % 32)
                scale = np.float32(field["scales"][wide]) * np.float32(field["factors"][place])
            else:
                scale = decoded_scale(field["scales"][place], term["scale_type"])
            scale *= np.float32(term["tensor_scale"])
            if "tensor_divisor" in term:
                scale /= np.float32(term["tensor_divisor"])
            value = scale * value
            if "offset_factors" in field:
                value += np.float32(field["offsets"][wide]) * np.float32(field["offset_factors"][place])
            elif "offsets" in field:
                value += np.float32(field["offsets"][place])
            total[o, i] += value
    return total


# --- the tests ---
def write_and_read(matrix, path):
    meta, arrays = matrix.state()
    named = {f"some.weight.{name}": array for name, array in arrays.items()}
    layout = {name: (array.dtype, array.shape) for name, array in named.items()}
    with TensorWriter(path, layout, {"format": "lowbit"}) as writer:
        for name, array in named.items():
            writer.write(name, array)
    stored = read_safetensors(path)
    entry = json.loads(json.dumps(meta))
    return read_matrix(entry, {name.removeprefix("some.weight."): array for name, array in stored.items()})


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_by_the_page_alone(name, tmp_path, rng):
    weight = emulate(rng.standard_normal((35, 128)).astype(np.float32), FORMATS["bf16"])
    matrix = round_to_nearest(weight, FORMATS[name])
    decoded = write_and_read(matrix, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(decoded, matrix.dequantize())
    assert np.abs(decoded).max() > 0


def test_offsets_and_odd_widths_read_by_the_page_alone(tmp_path, rng):
    codes = rng.integers(0, 128, (17, 48), dtype=np.uint8)
    term = CodeTerm(
        bits=7,
        levels=np.arange(128, dtype=np.float32)[None],
        codes=pack_codes(codes, 7),
        scales=pack_groups(rng.standard_normal((17, 3)).astype(np.float16)),
        scale_type="fp16",
        group_size=16,
        offsets=pack_groups(rng.standard_normal((17, 3)).astype(np.float16)),
        tensor_scale=0.5,
    )
    matrix = PackedMatrix(17, 48, (term,))
    np.testing.assert_array_equal(write_and_read(matrix, tmp_path / "m.safetensors"), matrix.dequantize())


@pytest.mark.parametrize("super_size", [48, 0])
def test_m8_scales_read_by_the_page_alone(super_size, tmp_path, rng):
    term = m8_term(rng, 5, (17, 96, 16, super_size), offsets=True)
    matrix = PackedMatrix(17, 96, (term,))
    np.testing.assert_array_equal(write_and_read(matrix, tmp_path / "m.safetensors"), matrix.dequantize())
    again = PackedMatrix.from_state(*matrix.state())
    np.testing.assert_array_equal(again.dequantize(), matrix.dequantize())


def test_refined_rows_read_by_the_page_alone(tmp_path, rng):
    weight = rng.standard_normal((70, 64)).astype(np.float32)
    coarse = round_to_nearest(weight, FORMATS["int3-g64"])
    matrix = refine_rows(coarse, weight, [3, 32, 69], "int4-g32")
    decoded = write_and_read(matrix, tmp_path / "m.safetensors")
    np.testing.assert_array_equal(decoded, matrix.dequantize())
    assert np.flatnonzero((decoded != coarse.dequantize()).any(axis=1)).tolist() == [3, 32, 69]


def test_gathered_codes_and_a_divisor_read_by_the_page_alone(tmp_path, rng):
    inputs = np.full(64, NO_INPUT, np.uint32)
    inputs[rng.choice(64, 40, replace=False)] = rng.permutation(48)[:40]
    codes = pack_codes(rng.integers(0, 16, (35, 64), dtype=np.uint8), 4)
    scales = pack_groups(rng.integers(0, 120, (35, 4), dtype=np.uint8))
    levels = rng.standard_normal((1, 16)).astype(np.float32)
    term = CodeTerm(4, levels, codes, scales, "e4m3", 16, tensor_scale=3.0, tensor_divisor=7.0)
    matrix = PackedMatrix(35, 48, (GatheredTerm(inputs, term),))
    decoded = write_and_read(matrix, tmp_path / "m.safetensors")
    np.testing.assert_array_equal(decoded, matrix.dequantize())
    assert (decoded == 0).all(axis=0).sum() == 8


def test_a_base3_matrix_written_by_hand_reads_as_the_page_says(tmp_path):
    """Bytes by hand: 17 rows of 20 inputs are one vector for each of two tiles; padding is 104."""
    codes = np.full((1, 1, 2, 64), 104, np.uint8)
    codes[0, 0, 0, 0] = 0 + 3 * 1 + 9 * 2 + 27 * 0 + 64 * 2  # row 0, inputs 0, 4, 8, 12, 16
    codes[0, 0, 0, 4 * 15 + 3] = 2  # row 15, inputs 3, 7, ..: 2, then 0
    codes[0, 0, 1, 0 + 1] = 242  # row 16, inputs 1, 5, ..: all 2
    scales = np.zeros((1, 1, 32), np.float16)
    scales[0, 0, [0, 15, 16]] = 2, -1, 0.5
    levels = np.array([[-1, 0, 1]], np.float32)
    term = CodeTerm(2, levels, codes, scales, "fp16", 0, packing="base3")
    expected = np.zeros((17, 20), np.float32)
    expected[0, ::4] = -2, 0, 2, -2, 2
    expected[15, 3::4] = -1, 1, 1, 1, 1
    expected[16, 1::4] = 0.5
    matrix = PackedMatrix(17, 20, (term,))
    np.testing.assert_array_equal(matrix.dequantize(), expected)
    np.testing.assert_array_equal(write_and_read(matrix, tmp_path / "m.safetensors"), expected)


def test_an_m4_matrix_written_by_hand_reads_as_the_page_says(tmp_path):
    """17 rows of 128 inputs, 4 bits, groups of 32, super-groups of 64."""
    codes = np.full((1, 4, 2, 256), 0x88, np.uint8)  # code 8, level 0
    codes[0, 0, 0, 0] = 0x98  # row 0, input 4: code 9
    codes[0, 3, 1, 64 * 3 + 2] = 0x80  # row 16, input 96 + 24 + 2: code 0
    multipliers = np.zeros((1, 4, 16), np.uint8)
    multipliers[0, 0, 0] = 0x03  # row 0, group 0
    multipliers[0, 3, 0] = 0xF0  # row 16, group 3
    scales = np.zeros((1, 2, 32), np.float16)
    scales[0, 0, 0], scales[0, 1, 16] = 0.25, -2
    levels = np.arange(-8, 8, dtype=np.float32)[None]
    term = CodeTerm(4, levels, codes, scales, "m4", 32, multipliers=multipliers, super_size=64)
    expected = np.zeros((17, 128), np.float32)
    expected[0, 4], expected[16, 122] = 0.25 * (3 * 1), -2 * (15 * -8)
    matrix = PackedMatrix(17, 128, (term,))
    np.testing.assert_array_equal(matrix.dequantize(), expected)
    np.testing.assert_array_equal(write_and_read(matrix, tmp_path / "m.safetensors"), expected)


def test_the_page_lists_what_the_files_hold():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    for word in (
        "codes",
        "scales",
        "zero_points",
        "offsets",
        "selectors",
        "levels",
        "values",
        "multipliers",
        "super_size",
    ):
        assert f"`{word}`" in page
    for scale_type in ("fp16", "fp32", "e8m0", "e4m3", "m4"):
        assert f"| `{scale_type}` |" in page
