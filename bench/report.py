"""Results for people: the table on the terminal, and the one that `--render` writes into the README."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# More CPUs in use than this while a run pauses between its parts: something else is using the machine.
BUSY = 0.25
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


class ReportError(ValueError):
    """A result or a page that cannot be rendered; the text says what is missing."""


def figure(value: float | None, unit: str) -> str:
    """Three to four significant digits and the unit: `1.43x`, `0.312 s`, `21.4 MB`, `99.9`."""
    if value is None:
        return "not measured"
    digits = 0 if abs(value) >= 1000 or isinstance(value, int) else 1 if abs(value) >= 100 else 2
    digits = 3 if abs(value) < 1 and not isinstance(value, int) else digits
    text = f"{value:.{digits}f}"
    return f"{text}{unit}" if unit in ("x", "%") else f"{text} {unit}".strip()


def verdict(passed: bool | None) -> str:
    return {True: "yes", False: "no", None: "-"}[passed]


def print_table(result: Mapping[str, Any]) -> None:
    """Print targets, measurements and verdicts, then every speed."""
    from rich.console import Console
    from rich.table import Table

    # Away from a terminal (a log) rich assumes 80 columns, too few for these tables.
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(caption(result))
    targets = Table("measure", "target", "measured", "reached", "note", title="Targets")
    colours = {True: "green", False: "red", None: "yellow"}
    for row in result["rows"]:
        shown = f"[{colours[row['passed']]}]{verdict(row['passed'])}[/]"
        targets.add_row(row["measure"], row["target"], figure(row["value"], row["unit"]), shown, row["note"])
    console.print(targets)
    rows = speed_rows(result)
    if rows:
        speeds = Table(*SPEED_COLUMNS, title="Tokens per second: median (lowest to highest)")
        for cells in rows:
            speeds.add_row(*cells)
        console.print(speeds)


SPEED_COLUMNS = (
    "model",
    "threads",
    "program and weights",
    "MB",
    "prefill 512",
    "decode 128",
    "of the bound (prefill, decode)",
)


def speed_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row per model, number of threads and contestant. The bound: int8 peak, memory bandwidth."""
    rows = []
    for name, data in result["sections"].items():
        if not isinstance(data, list):
            continue
        for entry in data:
            for label, figures in entry["contestants"].items():
                bounds = [figures.get(f"{phase}_bound_fraction") for phase in ("prefill", "decode")]
                shown = ", ".join(f"{b['median']:.0%}" for b in bounds if b)
                megabytes = f"{entry['weight_bytes'][label] / 1e6:.1f}"
                speeds = [_with_spread(figures[phase]) for phase in ("prefill", "decode")]
                rows.append([name, str(entry["threads"]), label, megabytes, *speeds, shown or "-"])
    return rows


def _with_spread(found: Mapping[str, Any]) -> str:
    digits = 0 if found["median"] >= 1000 else 1
    median, low, high = (f"{found[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def caption(result: Mapping[str, Any]) -> str:
    """One paragraph: when, on what, with what."""
    machine, peer = result["machine"], result["peer"]
    changed = " with uncommitted changes" if result["modified"] else ""
    text = f"Measured {result['date'][:10]} at commit {result['commit'][:12]}{changed} on {machine['cpu']} "
    text += f"({machine['cpu_model']}; {machine['cpus']} CPUs), {machine['system']}, {machine['compiler']}."
    if peer:
        text += f" Peer: llama.cpp {peer['commit'][:12]} from {peer['version']}, Release, native."
    else:
        text += f" No peer: {result['peer_missing']}."
    text += f" Medians of {result['rounds']} interleaved rounds."
    if result["busy_cpus"] > BUSY:
        text += f" Not a valid measurement: other programs used {result['busy_cpus']:.1f} CPUs."
    return text


def markdown(result: Mapping[str, Any]) -> str:
    """The tables as Markdown, without the markers."""
    targets = [["measure", "target", "measured", "reached"]]
    for row in result["rows"]:
        targets.append(
            [row["measure"], row["target"], figure(row["value"], row["unit"]), verdict(row["passed"])]
        )
    parts = [caption(result), _table(targets)]
    rows = speed_rows(result)
    if rows:
        parts += [
            "Tokens per second, median (lowest to highest):",
            _table([list(SPEED_COLUMNS), *rows]),
        ]
    return "\n\n".join(parts)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    return "\n".join(lines)


def render(page: str, result: Mapping[str, Any]) -> str:
    """`page` with everything between the two markers replaced by the result's tables."""
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ReportError(f"render: the page must hold {BEGIN} and, after it, {END}, each once")
    replacement = f"{BEGIN}\n{markdown(result)}\n{END}"
    return re.sub(f"{BEGIN}.*{END}", lambda _: replacement, page, flags=re.DOTALL)


def newest(folder: Path) -> Path:
    """The result file with the latest date inside it."""
    found = sorted(folder.glob("*.json"), key=lambda path: json.loads(path.read_text())["date"])
    if not found:
        raise ReportError(f"render: there is no result in {folder}; run `make bench` first")
    return found[-1]
