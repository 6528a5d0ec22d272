"""The grammar of names."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats import FORMATS, Format, parse_format
from lowbit.formats.parse import format_from_json, format_to_json, split_name

BASES = (
    [f"int{b}{mode}" for b in range(1, 9) for mode in ("", "a", "b")]
    + [f"e{e}m{m}" for e in range(1, 8) for m in range(8 - e) if e + m > 1]
    + ["e4m3fn", "e4m3fnuz", "e5m2fnuz", "e4m3b11fnuz", "e3m2ieee", "e4m3finite", "e2m1b5", "e2m1b-2", "fp4"]
    + ["ternary", "nf4", "mxint8", "mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4"]
    + ["shift2", "shift3", "shift4", "shift5", "bitmod3", "bitmod4"]
    + [f"bcq{n}" for n in range(1, 9)]
    + [f"trit{n}" for n in range(1, 5)]
    + [f"bfp{n}" for n in range(2, 9)]
)


@pytest.mark.parametrize("name", FORMATS)
def test_every_name_of_the_catalogue_round_trips(name):
    fmt = parse_format(name)
    assert fmt == FORMATS[name] and parse_format(fmt.name) == fmt and fmt.name == name
    assert parse_format(f"  {name.upper()} ") == fmt and parse_format(fmt) is fmt


@pytest.mark.parametrize("base", BASES)
def test_every_element_with_every_suffix_round_trips(base):
    for group in ("", "-g16", "-g32", "-g64", "-g128", "-row"):
        for scale in ("", "-fp16", "-fp32", "-e8m0", "-e4m3"):
            fmt = parse_format(base + group + scale)
            assert parse_format(fmt.name) == fmt
            if group:
                assert fmt.group_size == (0 if group == "-row" else int(group[2:]))
            if scale:
                assert fmt.scale_type == scale[1:]


def test_defaults_of_bare_names():
    for bare, full in {
        "int4": "int4-g64-fp16",
        "nf4": "nf4-g64",
        "fp4": "e2m1-g64",
        "mxfp4": "e2m1-g32-e8m0",
        "nvfp4": "e2m1-g16-e4m3",
        "bcq3": "bcq3-g128",
        "bfp4": "bfp4-g32-e8m0",
        "ternary": "ternary-row-fp16",
        "e5m2": "e5m2-g64-fp32",
        "mxfp4-g64": "e2m1-g64-e8m0",
        "int4-m4": "int4-g16-m4",
        "ternary-m4": "ternary-g16-m4",
    }.items():
        assert parse_format(bare) == parse_format(full)


def test_split_name():
    assert split_name("int4-g64-fp32") == ("int4", 64, "fp32")
    assert split_name("int4") == ("int4", None, None)
    assert split_name("ternary-row") == ("ternary", 0, None)
    assert split_name("fp16") == ("fp16", None, None)
    assert split_name("e2m1-e4m3") == ("e2m1", None, "e4m3")
    assert split_name("int4-g16-m4") == ("int4", 16, "m4")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("itn4-g64", ["int4-g64"]),
        ("nf5-g64", ["nf4-g64"]),
        ("mxpf4", ["mxfp4"]),
        ("ternery", ["ternary"]),
        ("bitmod-g128", ["bitmod3-g128", "bitmod4-g128"]),
        ("int4-64", ["int4-g64"]),
        ("int4-g64-fp8", ["int4-g64"]),
        ("zzzzzz", ["lowbit formats"]),
        ("", ["lowbit formats"]),
        ("int9", ["bits=9", "1 to 8"]),
        ("int0", ["bits=0", "1 to 8"]),
        ("int4-g48x", ["int4-g"]),
        ("int4-g40", ["group_size=40", "multiple of 16"]),
        ("int4-g0", ["-row"]),
        ("shift9", ["bits=9"]),
        ("bitmod5", ["3 or 4"]),
        ("bcq9", ["planes=9"]),
        ("trit0", ["planes=0"]),
        ("bfp1", ["mantissa_bits=1"]),
        ("e8m0", ["scale type"]),
        ("e5m10", ["16 bits", "at most 8"]),
        ("e0m3", ["exponent bits", "int4"]),
        ("e15m3", ["exponent_bits"]),
        ("fp16-g64", ["no groups", "'fp16'"]),
        ("nf4-g16-m4", ["no integer", "use scale type fp16"]),
        ("int5-g16-m4", ["16 as an integer", "at most 8"]),
        ("int4b-g16-m4", ["15 as an integer"]),
        ("e2m1-g16-m4", ["12 as an integer"]),
        ("int4a-g16-m4", ["no zero-point"]),
        ("bitmod3-g32-m4", ["one table"]),
        ("bcq3-g16-m4", ["one term"]),
        ("int4-row-m4", ["m4 scales of whole rows", "-g16"]),
    ],
)
def test_bad_names_say_what_is_near(name, words):
    with pytest.raises(FormatError) as error:
        parse_format(name)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("value", [None, 4, b"int4", ["int4"]])
def test_other_types_are_refused(value):
    with pytest.raises(FormatError, match="name such as"):
        parse_format(value)


@settings(max_examples=50)
@given(st.text(max_size=24))
def test_any_text_gives_a_format_or_a_format_error(text):
    with contextlib.suppress(FormatError):
        assert isinstance(parse_format(text), Format)


@given(
    st.from_regex(r"(e\d{1,3}m\d{1,3}(b-?\d{1,5})?(fn|ieee|fnuz|finite)?|int\d)(-g\d{1,9})?", fullmatch=True)
)
def test_any_name_of_the_right_shape_gives_a_format_or_a_format_error(text):
    try:
        fmt = parse_format(text)
    except FormatError:
        return
    assert parse_format(fmt.name) == fmt


@pytest.mark.parametrize("name", FORMATS)
def test_json_of_named_formats_is_the_name(name):
    assert format_to_json(FORMATS[name]) == name and format_from_json(name) == FORMATS[name]


def test_json_of_codebooks_holds_everything():
    for fmt in (
        Format.codebook([-1.1, 0.0, 0.7], group_size=32, name="mine"),
        Format.codebook([-8.0, 3.0], name="int4-g64"),  # the name says something else
        Format("two", 1, ((-1.0, 1.0), (-1.0, 2.0)), 16, "e4m3"),
    ):
        value = json.loads(json.dumps(format_to_json(fmt)))
        assert isinstance(value, dict) and format_from_json(value) == fmt


@pytest.mark.parametrize(
    "value",
    [
        {"name": "x"},
        {"name": "x", "bits": 1, "tables": [[0, 1]], "group_size": 0, "scale_type": "fp16", "extra": 1},
        {"name": "x", "bits": "many", "tables": [[0, 1]], "group_size": 0, "scale_type": "fp16"},
        {"name": "x", "bits": 1, "tables": 5, "group_size": 0, "scale_type": "fp16"},
        {"name": "x", "bits": 1, "tables": [["a", "b"]], "group_size": 0, "scale_type": "fp16"},
        {"name": "x", "bits": 1, "tables": [[0, 1, 2]], "group_size": 0, "scale_type": "fp16"},
        17,
        None,
    ],
)
def test_damaged_json_is_refused(value):
    with pytest.raises(FormatError):
        format_from_json(value)
