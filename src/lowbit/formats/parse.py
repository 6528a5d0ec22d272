"""Names of formats: `<element>[-g<N>|-row][-fp16|-fp32|-e8m0|-e4m3|-m4]`, or a name that fixes everything.

int4  int4a  int4b     integers of 1 to 8 bits: symmetric, asymmetric, bipolar
ternary                -1, 0, +1
e3m2  e4m3fn  e2m1b3   minifloats of 3 to 8 bits, see `minifloat.parse_minifloat`; fp4 is e2m1
nf4                    QLoRA
shift4                 signed powers of two
bitmod3  bitmod4       BitMoD
bcq3                   3 binary-coded terms
trit2                  2 ternary terms
dual                   2 terms of 0 and 1
bfp4                   block floating point, 4-bit mantissas
mxfp4 .. nvfp4         published formats, which fix group and scale; a suffix overrides
fp16  bf16  fp32       plain floats, without suffixes
df11                   bf16 with coded exponents, lossless
Missing suffixes take the default of the constructor in `format.py`; `-m4` alone means groups of 16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from lowbit.errors import FormatError
from lowbit.formats.catalogue import FORMATS
from lowbit.formats.format import GROUP_MULTIPLE, PUBLISHED, Format
from lowbit.formats.minifloat import FLOAT_TYPES, parse_minifloat

_SUFFIXES = re.compile(
    r"(?P<base>.+?)(?:-(?:g(?P<group>\d{1,7})|(?P<row>row)))?(?:-(?P<scale>fp16|fp32|e8m0|e4m3|m4))?"
)

# Families whose name is a word and a small number: pattern, and the constructor that takes the number.
_NUMBERED: tuple[tuple[re.Pattern[str], Callable[..., Format]], ...] = (
    (re.compile(r"shift(\d{1,2})"), Format.shift),
    (re.compile(r"bitmod(\d{1,2})"), Format.bitmod),
    (re.compile(r"bcq(\d{1,2})"), Format.binary_coded),
    (re.compile(r"trit(\d{1,2})"), Format.trit_planes),
    (re.compile(r"bfp(\d{1,2})"), Format.block_floating_point),
)
_WORDS: dict[str, Callable[..., Format]] = {
    "ternary": Format.ternary,
    "nf4": Format.nf4,
    "dual": Format.dual_binary,
    "mxint8": Format.mx_integer,
}
_INTEGER = re.compile(r"int(\d{1,2})([ab]?)")
_MODES = {"": "symmetric", "a": "asymmetric", "b": "bipolar"}


def split_name(name: str) -> tuple[str, int | None, str | None]:
    """Return element, group size (0 for `-row`) and scale type of a name; None for what it leaves out."""
    match = _SUFFIXES.fullmatch(name.strip().lower())
    if match is None:
        raise _unknown(name)
    group = 0 if match["row"] else None if match["group"] is None else int(match["group"])
    return match["base"], group, match["scale"]


def parse_format(name: str | Format) -> Format:
    """Return the Format that `name` describes; a Format is returned as it is.

    Raises FormatError that lists the nearest known names for one that cannot be read.
    """
    if isinstance(name, Format):
        return name
    if not isinstance(name, str):
        raise FormatError(
            f"parse_format: received {type(name).__name__}, needs a name such as 'int4-g64' or a Format"
        )
    base, group, scale = split_name(name)
    given: dict[str, Any] = {}
    if group is not None:
        if group == 0 and "-row" not in name.lower():
            raise FormatError(f"parse_format({name!r}): group size 0; write -row for one scale per row")
        given["group_size"] = group
    if scale is not None:
        given["scale_type"] = scale
        if scale == "m4" and group is None:
            given["group_size"] = GROUP_MULTIPLE  # small groups are what m4 scales are for
    if base in FLOAT_TYPES or base == "df11":
        if given:
            raise FormatError(f"parse_format({name!r}): {base} has no groups or scales; write {base!r}")
        return Format.lossless() if base == "df11" else Format.plain(base)
    if base in PUBLISHED:
        base, usual_group, usual_scale = PUBLISHED[base]
        given = {"group_size": usual_group, "scale_type": usual_scale} | given
    if base in _WORDS:
        return _WORDS[base](**given)
    if match := _INTEGER.fullmatch(base):
        return Format.integer(int(match[1]), mode=_MODES[match[2]], **given)
    for pattern, constructor in _NUMBERED:
        if match := pattern.fullmatch(base):
            return constructor(int(match[1]), **given)
    element = parse_minifloat("e2m1" if base == "fp4" else base)
    if element is None:
        raise _unknown(name)
    if not element.signed:
        raise FormatError(
            f"parse_format({name!r}): {base} is a scale type without sign or zero, not a weight format"
        )
    return Format.minifloat(
        element.exponent_bits, element.mantissa_bits, element.bias, element.specials, **given
    )


def format_to_json(fmt: Format) -> str | dict[str, Any]:
    """Return the name if it says everything, otherwise (codebooks of the user) all fields."""
    try:
        if parse_format(fmt.name) == fmt:
            return fmt.name
    except FormatError:
        pass
    return {
        "name": fmt.name,
        "bits": fmt.bits,
        "tables": [list(table) for table in fmt.tables],
        "group_size": fmt.group_size,
        "scale_type": fmt.scale_type,
        "zero_point": fmt.zero_point,
        "terms": fmt.terms,
    }


def format_from_json(value: str | Mapping[str, Any] | Format) -> Format:
    """Return the Format that `format_to_json` wrote.

    Raises FormatError if the value is neither a name nor all fields.
    """
    if isinstance(value, (str, Format)):
        return parse_format(value)
    required = {"name", "bits", "tables", "group_size", "scale_type"}
    if not isinstance(value, Mapping) or not required <= set(value) <= required | {"zero_point", "terms"}:
        raise FormatError(
            f"format: received {value!r}, needs a name or a mapping with {', '.join(sorted(required))}"
        )
    try:
        return Format(
            name=str(value["name"]),
            bits=int(value["bits"]),
            tables=tuple(tuple(float(v) for v in table) for table in value["tables"]),
            group_size=int(value["group_size"]),
            scale_type=str(value["scale_type"]),
            zero_point=bool(value.get("zero_point", False)),
            terms=int(value.get("terms", 1)),
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"format: a field of {dict(value)!r} has the wrong type: {error}") from None


def _unknown(name: str) -> FormatError:
    import difflib  # costs milliseconds that only an error should pay

    near = difflib.get_close_matches(
        name.strip().lower(), [*FORMATS, "fp4", "int4", "e2m1", "nf4"], n=3, cutoff=0.4
    )
    hint = f"did you mean {' or '.join(near)}?" if near else "`lowbit formats` lists the names"
    return FormatError(f"parse_format({name!r}): no such format; {hint}")
