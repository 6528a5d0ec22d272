"""A picture of where a step's time goes: the step on top, its parts below, their phases below these.

Widths are shares of the time, as in a flame graph turned over. One self-contained HTML page without scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from lowbit.measure.breakdown import PARTS, parts_of
from lowbit.measure.plot import COLOURS

WIDTH, ROW = 760.0, 34.0
LETTER = 6.4  # px of a letter, about
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 800px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 1.6em; } svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: #111; }
table { border-collapse: collapse; font-size: 13px; }
td, th { padding: 2px 12px 2px 0; text-align: right; } td:first-child, th:first-child { text-align: left; }
th { border-bottom: 1px solid; }
"""


def flame(rows: list[Mapping[str, Any]], title: str) -> str:
    """SVG of one kind of step; rows: what `breakdown` gives as phases."""
    parts = parts_of(rows)
    boxes = [_box(0.0, 1.0, 0, title, "#bbb")]
    left = 0.0
    for number, (part, share) in enumerate(parts.items()):
        colour = COLOURS[number % len(COLOURS)]
        boxes.append(_box(left, share, 1, PARTS[part], colour))
        at = left
        for row in rows:
            if row["part"] == part:
                boxes.append(_box(at, row["share"], 2, row["name"], colour, 0.55))
                at += row["share"]
        left += share
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {3 * ROW:g}" role="img">'
        f"{''.join(boxes)}</svg>"
    )


def _box(left: float, share: float, level: int, label: str, colour: str, opacity: float = 0.85) -> str:
    x, width, y = left * WIDTH, share * WIDTH, level * ROW
    room = int((width - 8) / LETTER)
    shown = label if len(label) <= room else label[: room - 1] + "…" if room > 2 else ""
    told = f"{label}: {share:.1%}"
    return (
        f'<g><title>{escape(told)}</title><rect x="{x:.2f}" y="{y:g}" width="{max(0.0, width - 0.6):.2f}" '
        f'height="{ROW - 2:g}" fill="{colour}" fill-opacity="{opacity}"/>'
        f'<text x="{x + 4:.2f}" y="{y + ROW / 2 + 3:g}">{escape(shown)}</text></g>'
    )


def page(result: Mapping[str, Any], title: str) -> str:
    """HTML of what `breakdown` gives."""
    sections = []
    for kind, told in (("decode", "one token"), ("prefill", "a prompt")):
        found = result[kind]
        micro = 1e6 * found["seconds_per_token"]
        name = f"{told}: {micro:,.1f} µs per token"
        lines = "".join(
            f"<tr><td>{escape(row['name'])}</td><td>{1e6 * row['seconds_per_token']:,.2f}</td>"
            f"<td>{row['share']:.1%}</td><td>{_percent(row['of_bound'])}</td></tr>"
            for row in found["phases"]
        )
        sections.append(
            f"<h2>{escape(name)}</h2>{flame(found['phases'], name)}<table><tr><th>phase</th>"
            f"<th>µs per token</th><th>share</th><th>of the bound</th></tr>{lines}</table>"
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1>{''.join(sections)}</html>\n"
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
