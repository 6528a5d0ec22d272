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
    return [*_winners(ours, text), *_losers(ours, text), *_beside(ours, rows, text)]


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
    uniform = [
        r for r in ours if r["bits_per_weight"] <= 3.2 and r["method"] == "rtn" and "auto" not in r["format"]
    ]
    mixed = [r for r in ours if r["format"] == "auto --bits 3.0"]
    if uniform and mixed:
        best = min(uniform, key=lambda row: _kl(row, text))
        chosen = min(mixed, key=lambda row: _kl(row, text))
        lines.append(
            f"- **Mixed at 3.0 bits**: {_named(chosen, text)}; the best uniform format of at most 3.2 bits, "
            f"rounded to nearest, {_named(best, text)}."
        )
    return lines


def _losers(ours: list[Row], text: str) -> list[str]:
    """Methods that are surely no better than rounding to nearest in the same format."""
    rounded = {row["format"]: row for row in ours if row["method"] == "rtn"}
    lines = []
    for row in ours:
        base = rounded.get(row["format"])
        if row["method"] == "rtn" or base is None:
            continue
        error = sum((r[text]["kl_standard_error"] or 0) ** 2 for r in (row, base)) ** 0.5
        if _kl(row, text) > _kl(base, text) + SURE * error:
            why = WHY.get(row["method"].partition(":")[0])
            lines.append(
                f"- `{row['key']}` {_kl(row, text):.4f}, rounded to nearest {_kl(base, text):.4f}"
                + (f": {why}." if why else ".")
            )
    return ["", "No better than rounding to nearest in the same format:", "", *lines] if lines else []


def _beside(ours: list[Row], rows: list[Row], text: str) -> list[str]:
    """Each row of another program beside our same method, and our best, at no more bits."""
    lines = []
    for row in rows:
        if "peer" not in row:
            continue
        size = "model_bits_per_weight" if row["peer"] == "llama.cpp" else "bits_per_weight"
        small = [r for r in ours if r[size] <= row[size] + 0.005]
        if not small:
            continue
        line = f"- {row['peer']} `{row['method']}` {row['format']}: {_figures(row, text)} "
        line += f"at {row[size]:.2f} bits"
        names = COUNTERPARTS.get(row["method"].partition("-")[0], ())
        same = [r for r in small if r["method"].partition(":")[0] in names and r["width"] == row["width"]]
        for title, candidates in (("the same method here", same), ("the best here at no more bits", small)):
            if candidates:
                best = min(candidates, key=lambda r: _kl(r, text))
                verdict = "less" if _kl(best, text) < _kl(row, text) else "more"
                line += (
                    f"; {title} loses {verdict}: `{best['key']}` {_figures(best, text)} at {best[size]:.2f}"
                )
        lines.append(line + ".")
    return ["", "Beside other programs (divergence, perplexity):", "", *lines] if lines else []


def _named(row: Row, text: str) -> str:
    return f"`{row['key']}` with {_kl(row, text):.4f} at {row['bits_per_weight']:.2f} bits"


def _figures(row: Row, text: str) -> str:
    return f"{_kl(row, text):.4f}, {row[text]['perplexity']:.3f}"


def _kl(row: Row, text: str) -> Any:
    return row[text]["kl_nats_per_token"]
