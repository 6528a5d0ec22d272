"""`lowbit formats`: the catalogue of number formats, or one of them drawn."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from lowbit.cli import output

if TYPE_CHECKING:
    from lowbit.formats import Format

ROW = 2048  # inputs for which the cost of one scale per row is given
LINE_WIDTH = 73


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help="a format, also one outside the list: int3-g128"
    )


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.formats import DESCRIPTIONS, FORMATS, parse_format

    if args.name is not None:
        return _describe(parse_format(args.name), DESCRIPTIONS)
    return {"formats": [_describe(fmt, DESCRIPTIONS) for fmt in FORMATS.values()]}


def _describe(fmt: Format, descriptions: dict[str, str]) -> dict[str, Any]:
    return {
        "name": fmt.name,
        "description": descriptions.get(fmt.name, ""),
        "bits": fmt.bits,
        "stored_bits": fmt.stored_bits,
        "terms": fmt.terms,
        "levels": [list(table) for table in fmt.tables],
        "group_size": fmt.group_size,
        "scale_type": fmt.scale_type,
        "zero_point": fmt.zero_point,
        "bits_per_weight": fmt.bits_per_weight(ROW),
    }


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    if args.name is None:
        _show_all(result["formats"])
    else:
        _show_one(result)


def _show_all(formats: list[dict[str, Any]]) -> None:
    header = ("format", "bits", "levels", "group", "scale", "bits/weight", "what it is")
    rows = [
        (
            f["name"],
            f"{f['terms']} x {f['stored_bits']:g}" if f["terms"] > 1 else f"{f['stored_bits']:g}",
            _level_count(f),
            _group(f),
            f["scale_type"],
            f"{f['bits_per_weight']:.3f}",
            f["description"],
        )
        for f in formats
    ]
    sys.stdout.write(output.table(header, rows, right=range(1, 6)))
    sys.stdout.write(
        f"\nbits/weight counts scales and tables, at {ROW} inputs. Other names work too: "
        "int3-g128, e3m3-g32, nf4-row.\n`lowbit formats NAME` draws one.\n"
    )


def _show_one(f: dict[str, Any]) -> None:
    rows = [("format", f["name"] + (f" ({f['description']})" if f["description"] else ""))]
    bits = f"{f['stored_bits']:g}" + (", five codes to a byte" if f["stored_bits"] != f["bits"] else "")
    rows += [("code bits", f"{f['terms']} terms of {bits}" if f["terms"] > 1 else bits)]
    m4 = "4-bit multiplier of the group times fp16 of up to 256 inputs (m4)"
    rows += [("group", _group(f)), ("scale", m4 if f["scale_type"] == "m4" else f["scale_type"])]
    rows += [("weight", _formula(f)), ("bits per weight", f"{f['bits_per_weight']:.3f} at {ROW} inputs")]
    sys.stdout.write(output.pairs(rows))
    for number, table in enumerate(f["levels"]):
        name = f"levels of table {number}" if len(f["levels"]) > 1 else "levels"
        sys.stdout.write(f"\n{output.bold(name)}, {len(table)}, in code order\n")
        sys.stdout.write(_wrapped([f"{level:g}" for level in table]) + "\n" + number_line(table))


def number_line(levels: list[float]) -> str:
    """Where the levels lie: a line of dashes with a tick per level, and its ends below.

    Levels that share a column show as `#`.
    """
    low, high = min(levels), max(levels)
    counts = [0] * LINE_WIDTH
    for level in set(levels):
        counts[round((level - low) / (high - low) * (LINE_WIDTH - 1))] += 1
    line = "".join("-" if n == 0 else "|" if n == 1 else "#" for n in counts)
    left, right = f"{low:g}", f"{high:g}"
    labels = [" "] * LINE_WIDTH
    labels[: len(left)] = left
    labels[LINE_WIDTH - len(right) :] = right
    zero = round(-low / (high - low) * (LINE_WIDTH - 1)) if low < 0 < high else 0
    if len(left) < zero < LINE_WIDTH - len(right) - 1:
        labels[zero] = "0"
    return f"{line}\n{''.join(labels).rstrip()}\n"


def _wrapped(words: list[str]) -> str:
    import textwrap

    return textwrap.fill("  ".join(words), LINE_WIDTH, break_long_words=False, break_on_hyphens=False)


def _formula(f: dict[str, Any]) -> str:
    if not f["levels"]:
        return "stored as it is"
    if f["zero_point"]:
        return "scale * (code - zero_point)"
    which = "levels[selector of the group][code]" if len(f["levels"]) > 1 else "levels[code]"
    if f["scale_type"] == "m4":
        return f"scale * (multiplier * {which})"
    return f"scale * {which}" + (f", summed over {f['terms']} terms" if f["terms"] > 1 else "")


def _level_count(f: dict[str, Any]) -> str:
    if not f["levels"]:
        return "-"
    count = len(set(f["levels"][0]))
    return f"{len(f['levels'])} x {count}" if len(f["levels"]) > 1 else str(count)


def _group(f: dict[str, Any]) -> str:
    return "-" if not f["levels"] else str(f["group_size"] or "row")
