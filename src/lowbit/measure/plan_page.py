"""Plans as one HTML page: the front of loss against time per token, and the table of figures."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from lowbit.measure.svg import Point, Series, chart, pareto

COLUMNS = ("formats", "KV", "users", "first token", "per token", "tokens/s", "memory", "loss", "J/token")
_FIGURES = (  # name in a plan, factor to the unit shown, unit
    ("time_to_first_token_seconds", 1e3, "ms"),
    ("time_per_token_seconds", 1e3, "ms"),
    ("tokens_per_second", 1.0, ""),
    ("memory_bytes", 1e-6, "MB"),
    ("loss", 100.0, "%"),
)
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#222}
svg{width:100%;height:auto}svg text{font:12px system-ui,sans-serif;fill:currentColor}.grid{stroke:#8884}
table{border-collapse:collapse;width:100%;margin:1rem 0}
td,th{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #8884}
td:first-child,th:first-child{text-align:left}code{font:13px ui-monospace,monospace}
pre{white-space:pre-wrap}small{opacity:.7}.legend span{margin-right:1rem}
.legend i{display:inline-block;width:.8em;height:.8em;margin-right:.3em}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}}
"""


def plan_page(result: Mapping[str, Any]) -> str:
    """result: the object that `lowbit plan --json` prints."""
    plans = result["plans"]
    points = [Point(100 * plan["loss"], 1e3 * plan["time_per_token_seconds"], label(plan)) for plan in plans]
    drawing = chart(
        [Series("plans", points), Series("front", pareto(points), line=True, mark=False)],
        "loss: increase of perplexity, %",
        "time per token, ms",
    )
    head = f"{escape(str(result['model']))} on {escape(str(result['machine']))}"
    rows = "".join(_row(plan) for plan in plans)
    header = "".join(f"<th>{name}" for name in COLUMNS)
    notes = "".join(f"<p>{escape(note)}</p>" for note in result.get("notes", ()))
    commands = "".join(
        f"<pre><code>{escape(line)}</code></pre>" for line in (plans[0]["commands"] if plans else ())
    )
    sources = _sources(plans[0]) if plans else ""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Plans: "
        f"{head}</title><style>{_STYLE}</style>"
        f"<h1>Plans: {head}</h1>{notes}{drawing}<table><tr>{header}</tr>{rows}</table>"
        f"<h2>Carry out the first</h2>{commands or '<p>lowbit does not run this plan itself.</p>'}"
        f"<h2>Where the figures come from</h2>{sources}</html>"
    )


def label(plan: Mapping[str, Any]) -> str:
    """The formats of a plan, the most frequent first."""
    return ", ".join(
        f"{share:.0%} {name}" if share < 0.995 else name for name, share in plan["formats"].items()
    )


def cells(plan: Mapping[str, Any]) -> list[tuple[str, tuple[str, str] | None]]:
    """For each of COLUMNS the figure, and the ends of its interval where there is one."""
    joules = plan["joules_per_token"]
    return [
        (label(plan), None),
        (str(plan["kv_bits"]), None),
        (str(plan["batch"]), None),
        *(_figure(plan, *column) for column in _FIGURES),
        ("unknown" if joules is None else f"{joules:.3g}", None),
    ]


def _figure(plan: Mapping[str, Any], name: str, unit: float, suffix: str) -> tuple[str, Any]:
    value, bounds = plan[name] * unit, plan[f"{name}_interval"]
    ends = None if bounds is None else tuple(_number(end * unit) for end in bounds)
    return f"{_number(value)} {suffix}".strip(), ends


def _number(value: float) -> str:
    """Three digits, and no power of ten for a thousand."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _row(plan: Mapping[str, Any]) -> str:
    told = (
        escape(text) + ("" if ends is None else f"<br><small>{ends[0]} to {ends[1]}</small>")
        for text, ends in cells(plan)
    )
    return "<tr>" + "".join(f"<td>{cell}" for cell in told) + "</tr>"


def _sources(plan: Mapping[str, Any]) -> str:
    lines = [
        f"<li>{escape(key.removesuffix('_source'))}: {escape(str(plan[key]))}"
        for key in plan
        if key.endswith("_source")
    ]
    return f"<ul>{''.join(lines)}</ul>"
