"""Format: constructors, validation, true widths."""

import dataclasses
import pickle

import ml_dtypes
import numpy as np
import pytest

import lowbit.formats
from lowbit.errors import FormatError
from lowbit.formats import DESCRIPTIONS, FORMATS, Format, parse_format


def test_exported_names():
    assert set(lowbit.formats.__all__) == {
        "DESCRIPTIONS",
        "FORMATS",
        "Format",
        "Scheme",
        "emulate",
        "parse_format",
    }


@pytest.mark.parametrize("name", FORMATS)
def test_catalogue(name):
    fmt = FORMATS[name]
    assert fmt.name == name
    assert DESCRIPTIONS[name] and "\n" not in DESCRIPTIONS[name] and len(DESCRIPTIONS[name]) < 90
    assert pickle.loads(pickle.dumps(fmt)) == fmt and hash(fmt) == hash(parse_format(name))
    for table in fmt.tables:
        assert 2 <= len(table) <= 2**fmt.bits and np.isfinite(table).all()
        assert all(type(v) is float for v in table)


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("mxfp4", ml_dtypes.float4_e2m1fn),
        ("nvfp4", ml_dtypes.float4_e2m1fn),
        ("mxfp6_e3m2", ml_dtypes.float6_e3m2fn),
        ("mxfp6_e2m3", ml_dtypes.float6_e2m3fn),
        ("mxfp8_e4m3", ml_dtypes.float8_e4m3fn),
        ("mxfp8_e5m2", ml_dtypes.float8_e5m2),
        ("e4m3fn-g64", ml_dtypes.float8_e4m3fn),
        ("e3m4-g64", ml_dtypes.float8_e3m4),
    ],
)
def test_weight_tables_are_the_finite_values_of_the_type(name, peer):
    fmt = parse_format(name)
    values = np.arange(2**fmt.bits, dtype=np.uint8).view(peer).astype(np.float64)
    assert list(fmt.tables[0]) == np.where(np.isfinite(values), values, 0.0).tolist()


def test_published_groups_and_scales():
    published = {
        "mxfp4": (32, "e8m0"),
        "mxfp8_e4m3": (32, "e8m0"),
        "mxint8": (32, "e8m0"),
        "nvfp4": (16, "e4m3"),
        "bfp4-g32": (32, "e8m0"),
        "ternary": (0, "fp16"),
        "int4-g64": (64, "fp16"),
        "bitmod3-g128": (128, "fp16"),
    }
    for name, want in published.items():
        assert (FORMATS[name].group_size, FORMATS[name].scale_type) == want


def test_constructors_give_named_formats():
    made = {
        "int4-g64": Format.integer(4),
        "int4-row": Format.integer(4, 0),
        "int4a-g32-fp32": Format.integer(4, 32, "asymmetric", "fp32"),
        "int3b-g64": Format.integer(3, mode="bipolar"),
        "int1-g64": Format.integer(1, mode="bipolar"),
        "ternary": Format.ternary(),
        "ternary-row-fp32": Format.ternary(scale_type="fp32"),
        "e3m2b5-g64": Format.minifloat(3, 2, bias=5),
        "e3m2ieee-g64": Format.minifloat(3, 2, specials="ieee"),
        "mxfp4": Format.minifloat(2, 1, group_size=32, scale_type="e8m0"),
        "nvfp4": Format.minifloat(2, 1, group_size=16, scale_type="e4m3"),
        "e5m2-g64": Format.minifloat(5, 2),
        "e5m2-g64-fp16": Format.minifloat(5, 2, scale_type="fp16"),
        "shift4-g64": Format.shift(4),
        "bitmod3-g64": Format.bitmod(3, 64),
        "bcq3-g128": Format.binary_coded(3),
        "trit2-g128": Format.trit_planes(2),
        "dual-g64": Format.dual_binary(),
        "bfp4-g32": Format.block_floating_point(4),
        "bfp4-g64-fp16": Format.block_floating_point(4, 64, "fp16"),
        "mxint8": Format.mx_integer(),
        "nf4-g64": Format.nf4(),
        "bf16": Format.plain("bf16"),
    }
    for name, fmt in made.items():
        assert fmt.name == name and parse_format(name) == fmt
    assert made["e5m2-g64"].scale_type == "fp32" and made["int4a-g32-fp32"].zero_point
    assert made["bcq3-g128"].terms == 3 and made["trit2-g128"].terms == 2
    assert len(made["bitmod3-g64"].tables) == 4 and made["bf16"].bits == 16


def test_codebook_of_the_user():
    fmt = Format.codebook([-1.5, 0.25, 3], group_size=32, name="mine")
    assert (fmt.name, fmt.bits, fmt.tables, fmt.group_size) == ("mine", 2, ((-1.5, 0.25, 3.0),), 32)
    assert Format.codebook(np.linspace(-1, 1, 17)).bits == 5
    assert Format.codebook(range(256)).bits == 8 and Format.codebook([1, 2]).bits == 1
    assert Format.codebook([0, 1]).name == "codebook2-g64"


def test_max_level():
    assert FORMATS["int4-g64"].max_level == 8 and FORMATS["bitmod4-g128"].max_level == 16
    assert FORMATS["mxfp8_e5m2"].max_level == 57344 and FORMATS["fp16"].max_level == 0


def test_bits_per_weight():
    want = {
        "int4-g64": 4 + 16 / 64,
        "int4a-g64": 4 + 24 / 64,
        "ternary": 1.6 + 16 / 768,
        "ternary-g64": 1.6 + 16 / 64,
        "int4-g16-m4": 4 + 4 / 16 + 16 / 256,
        "int2-g16-m4": 2 + 4 / 16 + 16 / 256,
        "mxfp4": 4.25,
        "nvfp4": 4.5,
        "bitmod3-g128": 3 + 24 / 128,
        "bcq3-g128": 3 * (1 + 16 / 128),
        "trit2-g128": 2 * (1.6 + 16 / 128),
        "dual-g64": 2 * (1 + 16 / 64),
        "fp16": 16,
        "fp32": 32,
    }
    for name, bits in want.items():
        assert FORMATS[name].bits_per_weight(768) == bits


GOOD = {"name": "x", "bits": 2, "tables": ((0.0, 1.0, 2.0),), "group_size": 32, "scale_type": "fp16"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 1}, "3 levels do not fit 1 bits"),
        ({"group_size": 24}, "multiple of 16"),
        ({"group_size": -16}, "multiple of 16"),
        ({"scale_type": "fp8"}, "fp16, fp32, e8m0, e4m3"),
        ({"scale_type": "none"}, "fp16, fp32, e8m0, e4m3"),
        ({"terms": 0}, "terms=0"),
        ({"tables": ()}, "0 tables"),
        ({"tables": ((0.0, 1.0),) * 5}, "5 tables"),
        ({"tables": ((0.0, 1.0), (0.0, 1.0, 2.0))}, "equal length"),
        ({"tables": ((0.0, 1.0),) * 2, "terms": 2}, "several tables"),
        ({"tables": ((0.0, float("nan")),)}, "finite"),
        ({"tables": ((0.0, float("inf")),)}, "finite"),
        ({"tables": ((1.0, 1.0),)}, "2 different levels"),
        ({"zero_point": True}, "zero-point"),
        ({"terms": 2}, "2 terms need the levels -1, 1 or 0, 1 in 1 bit or -1, 0, 1 in 2 bits"),
        ({"scale_type": "m4", "tables": ((0.0, 1.0, 9.0),)}, "9 as an integer"),
        ({"scale_type": "m4", "tables": ((0.0, 1.0, 0.1),)}, "no integer"),
        ({"scale_type": "m4", "group_size": 0}, "whole rows"),
        ({"float_type": "fp16"}, "plain float"),
        ({"float_type": "fp8"}, "fp16, bf16, fp32"),
    ],
)
def test_validation(change, word):
    Format(**GOOD)
    with pytest.raises(FormatError, match=word):
        Format(**(GOOD | change))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Format.integer(9),
        lambda: Format.integer(4, mode="unsigned"),
        lambda: Format.integer(4, 20),
        lambda: Format.minifloat(5, 3),
        lambda: Format.shift(6),
        lambda: Format.bitmod(5),
        lambda: Format.binary_coded(0),
        lambda: Format.trit_planes(5),
        lambda: Format.block_floating_point(1),
        lambda: Format.plain("fp64"),
        lambda: Format.codebook([1]),
        lambda: Format.codebook(range(257)),
        lambda: Format.codebook([1, float("nan")]),
    ],
)
def test_constructors_refuse(make):
    with pytest.raises(FormatError):
        make()


def test_super_groups_and_packing():
    m4 = parse_format("int4-g16-m4")
    assert [m4.scale_size(n) for n in (576, 1536, 2048, 96)] == [192, 256, 256, 0]
    assert m4.bits_per_weight(96) == 4 + 4 / 16 + 16 / 96
    assert FORMATS["int4-g64"].scale_size(576) == 64 and FORMATS["ternary"].scale_size(576) == 0
    packings = {
        "ternary": "base3",
        "ternary-g64": "base3",
        "ternary-g48": "planes",
        "ternary-g64-m4": "planes",
    }
    packings |= {"trit2-g128": "base3", "int2-g64": "planes", "bcq2-g128": "planes", "fp16": "planes"}
    for name, packing in packings.items():
        fmt = parse_format(name)
        assert fmt.packing == packing
        assert fmt.stored_bits == (1.6 if packing == "base3" else fmt.bits)
    assert Format.codebook([-1, 0, 1], 64).packing == "base3"


def test_formats_are_values():
    fmt = FORMATS["int4-g64"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.bits = 3  # type: ignore[misc]
    assert fmt != dataclasses.replace(fmt, group_size=32)
