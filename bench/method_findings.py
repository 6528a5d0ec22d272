"""What a table of methods says: who wins at which width, what is no better than rounding and why, and how
lowbit stands beside other programs.

Computed from the figures, so that the page cannot disagree with its table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from method_cases import PLAIN

Row = Mapping[str, Any]
# Why a method may lose to rounding to nearest in the same format; the text is shown only if it does.
WHY = {
    "smoothquant": "it moves outliers of activations into the weights, which get harder to round; that pays "
    "where activations have one scale for a whole token, and lowbit's have one for each group",
    "llmfp4": "it is made for 4-bit activations with one exponent range, which are not rounded here",
    "llmfp4+llmfp4": "it is made for 4-bit activations, which are not rounded here",
    "llmint8": "it is made for activations with a scale for a whole token and for models with outlier "
    "channels, which appear above 6 billion parameters",
    "absmax": "scales that span the largest weight; the search of round to nearest cuts outliers off",
    "hadamard": "weights of a model this small have few outliers that a rotation could spread, and small "
    "groups confine them anyway",
    "zqfp": "scales in ratios of powers of two are a restriction, for speed on other machines",
    "finequant": "smaller groups where they pay, against groups that are all small",
    "ptqtp": "two trits have nine sums and take the bits of two planes, for which five trits to a byte only "
    "make up where groups allow that",
    "awq": "its factors can only trade one channel against another within a group",
}
COUNTERPARTS = {
    "rtn": ("rtn",),
    "hqq": ("hqq",),
    "gptq": ("gptq",),
    "awq": ("awq",),
    "signround": ("descent",),
}
SURE = 2.0  # standard errors of a difference


def findings(found: Mapping[str, Any], text: str) -> list[str]:
    """Lines of Markdown."""
    rows = [row for row in found["rows"] if text in row and _kl(row, text) is not None]
    ours = [row for row in rows if "peer" not in row]
    return [
        *_winners(ours, text),
        *_losers(ours, text),
        *_beside(ours, [row for row in rows if "peer" in row and "size_bytes" not in row], text),
        *_by_bytes(ours, [row for row in rows if "peer" in row and "size_bytes" in row], text),
    ]


def _winners(ours: list[Row], text: str) -> list[str]:
    lines = []
    for width in ("8", "4", "3", "2", "1.6"):
        some = sorted((row for row in ours if row["width"] == width), key=lambda row: _kl(row, text))
        if not some:
            continue
        line = f"- **{width} bits**: least divergence {_named(some[0], text)}"
        rounded = next((r for r in some if r["method"] == "rtn" and r["format"] == PLAIN.get(width)), None)
        if rounded is not None:
            within = next(r for r in some if r["bits_per_weight"] <= rounded["bits_per_weight"] + 0.005)
            share = _kl(within, text) / _kl(rounded, text)
            line += (
                f"; at no more bits than `{rounded['format']}` rounded to nearest, {_named(within, text)}, "
            )
            line += f"which loses {share:.0%} of what that loses"
        lines.append(line + ".")
    return [*lines, *_mixed(ours, text)]


def _mixed(ours: list[Row], text: str) -> list[str]:
    """Each budget of bits: the best choice, and what is best in one format of no more bits."""
    budgets = {
        row["format"]: row["format"].split()[2] for row in ours if row["format"].startswith("auto --bits")
    }
    lines = []
    for format, bits in budgets.items():
        chosen = min((row for row in ours if row["format"] == format), key=lambda row: _kl(row, text))
        uniform = [
            row
            for row in ours
            if "auto" not in row["format"] and row["bits_per_weight"] <= float(bits) + 0.01
        ]
        line = f"- **Mixed, {bits} bits**: {_named(chosen, text)}"
        if uniform:
            best = min(uniform, key=lambda row: _kl(row, text))
            line += (
                f", which loses {_verdict(chosen, best, text)} beside the best in one format of no more bits"
            )
            line += f", {_named(best, text)}"
            same = [row for row in uniform if row["method"] == chosen["method"]]
            if same and best not in same:
                alike = min(same, key=lambda row: _kl(row, text))
                line += f"; in one format by the same method {_named(alike, text)}"
        lines.append(line + ".")
    return lines


def _losers(ours: list[Row], text: str) -> list[str]:
    """Methods that are surely no better than rounding to nearest in the same format, or where nothing was
    rounded to that, in the best format of no more bits."""
    rounded = [row for row in ours if row["method"] == "rtn"]
    lines = []
    for row in ours:
        same = [base for base in rounded if base["format"] == row["format"]]
        small = [
            base
            for base in rounded
            if base["bits_per_weight"] <= row["bits_per_weight"] + 0.005 and "auto" not in base["format"]
        ]
        if row["method"] == "rtn" or not (same or small):
            continue
        base = min(same or small, key=lambda r: _kl(r, text))
        error = sum((r[text]["kl_standard_error"] or 0) ** 2 for r in (row, base)) ** 0.5
        if _kl(row, text) > _kl(base, text) + SURE * error:
            why = WHY.get(row["method"].partition(":")[0])
            place = "" if same else f" (`{base['format']}`)"
            lines.append(
                f"- `{row['key']}` {_kl(row, text):.4f}, rounded to nearest{place} {_kl(base, text):.4f}"
                + (f": {why}." if why else ".")
            )
    return ["", "No better than rounding to nearest:", "", *lines] if lines else []


def _beside(ours: list[Row], others: list[Row], text: str) -> list[str]:
    """Each row of another program beside our same method, and our best, at no more bits."""
    lines = []
    for row in others:
        small = [r for r in ours if r["bits_per_weight"] <= row["bits_per_weight"] + 0.005]
        if not small:
            continue
        line = f"- {row['peer']} `{row['method']}` {row['format']}: {_figures(row, text)} "
        line += f"at {row['bits_per_weight']:.2f} bits"
        names = COUNTERPARTS.get(row["method"].partition("-")[0], ())
        same = [r for r in small if r["method"].partition(":")[0] in names and r["width"] == row["width"]]
        for title, candidates in (("the same method here", same), ("the best here at no more bits", small)):
            if candidates:
                best = min(candidates, key=lambda r: _kl(r, text))
                line += (
                    f"; {title} loses {_verdict(best, row, text)}: `{best['key']}` {_figures(best, text)} at "
                    f"{best['bits_per_weight']:.2f}"
                )
        lines.append(line + ".")
    return ["", "Beside other programs (divergence, perplexity):", "", *lines] if lines else []


def _verdict(best: Row, row: Row, text: str) -> str:
    """Less or more, or as much within the error of the difference."""
    errors = [r[text]["kl_standard_error"] or 0 for r in (best, row)]
    if abs(_kl(best, text) - _kl(row, text)) <= sum(e**2 for e in errors) ** 0.5:
        return "as much within the error"
    return "less" if _kl(best, text) < _kl(row, text) else "more"


def _by_bytes(ours: list[Row], others: list[Row], text: str) -> list[str]:
    """Each file of another program beside ours of the lowest perplexity in no more bytes."""
    lines = []
    for row in others:
        small = [r for r in ours if r["size_bytes"] <= row["size_bytes"]]
        line = f"- {row['peer']} `{row['method']}` {row['format']}: {_file(row, text)}"
        if small:
            best = min(small, key=lambda r: r[text]["perplexity"])
            verdict = "lower" if best[text]["perplexity"] < row[text]["perplexity"] else "not lower"
            line += f"; here {verdict} with `{best['key']}`: {_file(best, text)}"
        lines.append(line + ".")
    return ["", "Beside files of other programs, in no more bytes:", "", *lines] if lines else []


def _file(row: Row, text: str) -> str:
    told = row[text]
    size = f"{row['size_bytes'] / 1e6:.1f} MB"
    return f"perplexity {told['perplexity']:.3f}, divergence {_kl(row, text):.4f}, {size}"


def _named(row: Row, text: str) -> str:
    return f"`{row['key']}` with {_kl(row, text):.4f} at {row['bits_per_weight']:.2f} bits"


def _figures(row: Row, text: str) -> str:
    return f"{_kl(row, text):.4f}, {row[text]['perplexity']:.3f}"


def _kl(row: Row, text: str) -> Any:
    return row[text]["kl_nats_per_token"]
