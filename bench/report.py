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
    size = abs(value)
    digits = 0 if isinstance(value, int) or size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3
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
    heading = None
    for row in result["rows"]:
        if row["heading"] != heading:
            heading = row["heading"]
            targets.add_section()
            targets.add_row(f"[bold]{heading}[/]")
        shown = f"[{colours[row['passed']]}]{verdict(row['passed'])}[/]"
        targets.add_row(row["measure"], row["target"], figure(row["value"], row["unit"]), shown, row["note"])
    console.print(targets)
    for title, head, rows in (width_table(result), kernel_table(result)):
        if rows:
            shown = Table(*head, title=title)
            for cells in rows:
                shown.add_row(*cells)
            console.print(shown)
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
    for data in result["sections"].values():
        if not isinstance(data, list):
            continue
        for entry in data:
            for label, figures in entry["contestants"].items():
                bounds = [figures.get(f"{phase}_bound_fraction") for phase in ("prefill", "decode")]
                shown = ", ".join(f"{b['median']:.0%}" for b in bounds if b)
                megabytes = f"{entry['weight_bytes'][label] / 1e6:.1f}"
                speeds = [_with_spread(figures[phase]) for phase in ("prefill", "decode")]
                rows.append([entry["model"], str(entry["threads"]), label, megabytes, *speeds, shown or "-"])
    return rows


def _with_spread(found: Mapping[str, Any]) -> str:
    digits = 0 if found["median"] >= 1000 else 1
    median, low, high = (f"{found[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def caption(result: Mapping[str, Any]) -> str:
    """One paragraph: when, on what, with what."""
    machine = result["machine"]
    changed = " with uncommitted changes" if result["modified"] else ""
    text = f"Measured {result['date'][:10]} at commit {result['commit'][:12]}{changed} on {machine['cpu']} "
    text += f"({machine['cpu_model']}; {machine['cpus']} CPUs), {machine['system']}, {machine['compiler']}."
    others = [peer_name(peer) for peer in result["peers"]]
    text += f" Against {', '.join(others)}." if others else ""
    text += "".join(f" Without {name}: {why}." for name, why in result["missing"].items())
    text += f" Medians of {result['rounds']} interleaved rounds."
    if result["busy_cpus"] > BUSY:
        text += f" Not a valid measurement: other programs used {result['busy_cpus']:.1f} CPUs."
    return text


def peer_name(peer: Mapping[str, Any]) -> str:
    """`llama.cpp 0123abcd (native)`, `OpenVINO GenAI 2026.4.1.0`."""
    if "commit" in peer:
        return f"llama.cpp {peer['commit'][:12]} ({peer['variant']})"
    versions = dict(package.split("==") for package in peer["packages"])
    return f"{peer['name']} {versions['openvino-genai']}"


def width_table(result: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """The 1.1B shape by width: bytes, speeds and fractions. Title, head and rows."""
    head = ["bits", "weights", "MB", "decode tokens/s", "of the bound", "prefill tokens/s", "of the bound"]
    rows = []
    for data in result["sections"].values():
        for entry in data if isinstance(data, list) else []:
            for width, label in entry.get("by_width", {}).items():
                cells = [width, label.removeprefix("lowbit "), f"{entry['weight_bytes'][label] / 1e6:.0f}"]
                for phase in ("decode", "prefill"):
                    figures = entry["contestants"][label]
                    bound = figures.get(f"{phase}_bound_fraction")
                    cells += [f"{figures[phase]['median']:.0f}", f"{bound['median']:.0%}" if bound else "-"]
                rows.append(cells)
    return "The 1.1B shape by width", head, rows


def kernel_table(result: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Single products by format. Title, head and rows."""
    found = result["sections"].get("kernels")
    head = ["format", "bits per weight", "GB/s at 1 token", "of the bandwidth"]
    head += ["G multiply-adds/s at 512", "of the int8 peak", "kernels"]
    if not found:
        return "", head, []
    rows: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for entry in found["kernels"]:
        cells = rows.setdefault(entry["format"], [entry["format"], f"{entry['bits_per_weight']:.2f}"])
        if entry["batch"] == 1:
            cells += [f"{entry['bytes_per_second'] / 1e9:.1f}", f"{entry['bandwidth_fraction']:.0%}"]
        else:
            cells += [f"{entry['multiply_adds_per_second'] / 1e9:.0f}", f"{entry['peak_fraction']:.0%}"]
        names.setdefault(entry["format"], []).append(entry["kernel"])
    first_entry = found["kernels"][0]
    shape = f"{first_entry['out_features']} x {first_entry['in_features']}"
    return (
        f"Single products, {shape}, {first_entry['threads']} threads",
        head,
        [[*cells, ", ".join(names[name])] for name, cells in rows.items()],
    )


def markdown(result: Mapping[str, Any]) -> str:
    """The tables as Markdown, without the markers."""
    targets, heading = [["measure", "target", "measured", "reached", "note"]], None
    for row in result["rows"]:
        if row["heading"] != heading:
            heading = row["heading"]
            targets.append([f"**{heading}**", "", "", "", ""])
        value = figure(row["value"], row["unit"])
        targets.append([row["measure"], row["target"], value, verdict(row["passed"]), row["note"]])
    parts = [caption(result), table(targets)]
    for title, head, rows in (width_table(result), kernel_table(result)):
        if rows:
            parts += [f"{title}:", table([head, *rows])]
    rows = speed_rows(result)
    if rows:
        parts += [
            "<details><summary>Every speed: tokens per second, median (lowest to highest)</summary>",
            table([list(SPEED_COLUMNS), *rows]),
            "</details>",
        ]
    return "\n\n".join(parts)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
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
    """The result of a full run with the latest date inside it."""
    results = {path: json.loads(path.read_text()) for path in folder.glob("*.json")}
    found = sorted((p for p, r in results.items() if "rows" in r), key=lambda path: results[path]["date"])
    if not found:
        raise ReportError(f"render: there is no result in {folder}; run `make bench` first")
    return found[-1]
