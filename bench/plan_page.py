"""Verdicts on predictions, and the measured part of docs/planning.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
COVERAGE = (0.85, 0.95)
REGRET = 0.05
PARTS = {
    "operators": ("one operation", 0.10),
    "token": ("time per token", 0.10),
    "first": ("time to first token", 0.15),
    "memory": ("memory", 0.03),
}


def errors(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [abs(row["error"]) for row in rows]


def verdicts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One for each gate: what, measured, gate, met (None: not measured)."""
    found: list[dict[str, Any]] = []
    for part, (name, gate) in PARTS.items():
        rows = result.get(part, [])
        value = statistics.median(errors(rows)) if rows else None
        found.append(
            {
                "what": f"{name}: median error",
                "value": value,
                "gate": f"<= {gate:.0%}",
                "met": None if value is None else value <= gate,
            }
        )
    known = [row["inside"] for part in ("operators", "token", "first") for row in result.get(part, [])]
    known = [inside for inside in known if inside is not None]
    share = sum(known) / len(known) if known else None
    met = None if share is None else COVERAGE[0] <= share <= COVERAGE[1]
    found.append({"what": "90% intervals: share inside", "value": share, "gate": "85% to 95%", "met": met})
    regrets = [row["regret"] for row in result.get("regret", [])]
    worst = max(regrets, default=None)
    met = None if worst is None else worst <= REGRET
    found.append({"what": "decision regret, worst", "value": worst, "gate": "<= 5%", "met": met})
    return found


def passed(result: Mapping[str, Any]) -> bool:
    return all(verdict["met"] is not False for verdict in result["verdicts"])


def summary(result: Mapping[str, Any]) -> str:
    """Gates and their verdicts, for the terminal."""
    lines = []
    for verdict in result["verdicts"]:
        value = "not measured" if verdict["value"] is None else f"{verdict['value']:.1%}"
        lines.append(f"{verdict['what']:<40} {value:>14}  {verdict['gate']:<12} {_word(verdict['met'])}")
    return "\n".join(lines)


def _word(met: bool | None) -> str:
    return {None: "-", True: "met", False: "not met"}[met]


def insert(page: str, result: Mapping[str, Any]) -> str:
    """The page with its measured part replaced."""
    before, rest = page.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{render(result)}\n{END}{after}"


def render(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"Measured {result['date'][:10]} at commit {str(result['commit'])[:12]} on {machine['cpu']} "
        f"({machine['cpus']} CPUs). "
        f"The profile took {result['profile_seconds']:.0f} s.",
        "",
        "| what | measured | gate | |",
        "|---|---:|---|---|",
    ]
    for verdict in result["verdicts"]:
        value = "-" if verdict["value"] is None else f"{verdict['value']:.1%}"
        lines.append(f"| {verdict['what']} | {value} | {verdict['gate']} | {_word(verdict['met'])} |")
    for part, (name, _) in PARTS.items():
        rows = result.get(part, [])
        if rows:
            lines += [
                "",
                f"**{name}**, by kind",
                "",
                "| kind | figures | median error | 90th percentile | bias | inside |",
            ]
            lines += ["|---|---:|---:|---:|---:|---:|", *_kinds(rows)]
    if result.get("regret"):
        lines += [
            "",
            "**decisions**",
            "",
            "| budget | chosen | measured | best measured | regret |",
            "|---|---|---:|---:|---:|",
        ]
        for row in result["regret"]:
            lines.append(
                f"| {row['name']} | {row['chosen']} | {1e3 * row['measured']:.2f} ms | "
                f"{1e3 * row['best_measured']:.2f} ms | {row['regret']:.1%} |"
            )
    return "\n".join(lines)


def _kinds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    lines = []
    for kind, group in kinds.items():
        sizes = sorted(errors(group))
        bias = statistics.mean(row["error"] for row in group)
        known = [row["inside"] for row in group if row["inside"] is not None]
        inside = f"{sum(known)} of {len(known)}" if known else "no interval"
        ninth = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
        lines.append(
            f"| {kind} | {len(group)} | {statistics.median(sizes):.1%} | {ninth:.1%} | {bias:+.1%} | "
            f"{inside} |"
        )
    return lines
