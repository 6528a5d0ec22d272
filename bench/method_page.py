"""The table of methods: on the terminal, and with its plot between the markers of docs/methods.md."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import method_findings
from method_rounded import markdown as rounded
from report import ReportError

PAGE, PICTURE = "methods.md", "methods.png"
BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
HEAD = ("method", "format", "bits", "file", "KL", "same top token", "perplexity", "time", "memory")
OTHERS = 5  # where the divergence on further texts stands
WIDTHS = ("8", "4", "3", "2", "1.6")
Row = Mapping[str, Any]


def main_text(found: Mapping[str, Any]) -> str:
    """The text that decides: the first of a model's texts."""
    return next(iter(found["texts"]))


def ranked(found: Mapping[str, Any], width: str) -> list[Row]:
    """Measured rows of one width, the least divergence first."""
    text = main_text(found)
    rows = [row for row in found["rows"] if row["width"] == width and text in row]
    return sorted(rows, key=lambda row: _kl(row, text))


def head(found: Mapping[str, Any]) -> list[str]:
    """Titles of the columns: HEAD, and KL on every text but the one that decides."""
    return [*HEAD[:OTHERS], *(f"KL, {text}" for text in list(found["texts"])[1:]), *HEAD[OTHERS:]]


def cells(row: Row, found: Mapping[str, Any]) -> list[str]:
    text, *others = found["texts"]
    told = row[text]
    name = f"{row['peer']}: {row['method']}" if "peer" in row else row["method"]
    peak = row.get("peak_rss_bytes")
    line = [
        name,
        row["format"],
        f"{row['bits_per_weight']:.2f}",
        f"{row['size_bytes'] / 1e6:.1f} MB" if "size_bytes" in row else "-",
        f"{_kl(row, text):.4f} ± {told['kl_standard_error'] or 0:.4f}",
        f"{told['top1_agreement']:.1%}",
        f"{told['perplexity']:.3f}" if told["perplexity"] is not None else "-",
        f"{row['seconds']:.1f} s" if row["seconds"] is not None else "-",
        f"{peak / 1e6:.0f} MB" if peak else "-",
    ]
    line[OTHERS:OTHERS] = [f"{_kl(row, other):.3f}" if other in row else "-" for other in others]
    return line


def print_tables(result: Mapping[str, Any]) -> None:
    """Every model and width, then what was refused."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 130)
    for name, found in result["models"].items():
        for width in WIDTHS:
            rows = ranked(found, width)
            if rows:
                table = Table(*head(found), title=f"{name}, {width} bits")
                for row in rows:
                    table.add_row(*cells(row, found))
                console.print(table)
        for row in found["rows"]:
            if "refused" in row:
                console.print(f"{row['key']}: {row['refused']}", markup=False)
    for name, why in result["missing"].items():
        console.print(f"without {name}: {why}", markup=False)


def markdown(result: Mapping[str, Any]) -> str:
    """What stands between the markers."""
    parts = [caption(result), f"![KL divergence against bits per weight]({PICTURE})"]
    for name, found in result["models"].items():
        text = main_text(found)
        file, tokens, window = found["texts"][text]
        calibrating, windows, length = found["calibration"]
        reference = next((r[text]["reference_perplexity"] for r in found["rows"] if text in r), None)
        parts.append(f"### {name}")
        parts.append(
            f"{tokens:,} tokens of {text} text (`{file}`) in windows of {window}; the reference has a "
            f"perplexity of {reference:.4f}. Calibrated on {windows} windows of {length} tokens of "
            f"`{calibrating}`. Embedding and head in {found['embedding']} unless the format says otherwise; "
            "bits are those of the layers' matrices, all scales and tables counted."
        )
        parts.append("\n".join(method_findings.findings(found, text)))
        for width in WIDTHS:
            rows = ranked(found, width)
            if rows:
                activations = ", activations in 8 bits as well" if width == "8" else ""
                parts.append(f"**{width} bits**{activations}")
                parts.append(_table([head(found), *(cells(row, found) for row in rows)]))
        refused = [row for row in found["rows"] if "refused" in row]
        if refused:
            listed = [f"- `{row['key']}`: {row['refused']}" for row in refused]
            parts.append("<details><summary>Combinations that were refused or failed</summary>\n")
            parts += ["\n".join(listed), "</details>"]
        if "rounded" in found:
            parts += [f"### Activations and caches of {name}", rounded(found["rounded"])]
    return "\n\n".join(parts)


def caption(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    changed = " with uncommitted changes" if result["modified"] else ""
    text = f"Measured {result['date'][:10]} at commit {result['commit'][:12]}{changed} on {machine['cpu']} "
    text += f"({machine['cpus']} CPUs), {machine['compiler']}."
    text += " A quarter of the tokens." if result["quick"] else ""
    return text + "".join(f" Without {name}: {why}." for name, why in result["missing"].items())


def render(result: Mapping[str, Any], folder: Path, say: Callable[[str], None]) -> int:
    """Rewrite the page between its markers, and the plot."""
    page = folder / PAGE
    try:
        page.write_text(insert(page.read_text(encoding="utf-8"), markdown(result)), encoding="utf-8")
    except (ReportError, OSError) as error:
        say(str(error))
        return 1
    say(f"docs/{PAGE}")
    try:
        draw(result, folder / PICTURE)
    except ImportError:
        say(f"{PICTURE}: matplotlib is not installed; the old plot stays")
    else:
        say(f"docs/{PICTURE}")
    return 0


def insert(page: str, text: str) -> str:
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ReportError(f"docs/{PAGE}: it needs {BEGIN} and {END}, once each and in this order")
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """KL against stored bits, one panel for each model; the line joins what nothing beats in both."""
    import matplotlib

    matplotlib.use("Agg")  # no display, no window
    from matplotlib import pyplot

    from lowbit.measure.svg import Point, pareto

    models = result["models"]
    figure, panels = pyplot.subplots(1, len(models), figsize=(7 * len(models), 6), squeeze=False)
    for axes, (name, found) in zip(panels[0], models.items()):
        text = main_text(found)
        points = [
            (Point(row["bits_per_weight"], _kl(row, text), label(row)), row)
            for row in found["rows"]
            if text in row and 0 < _kl(row, text) < math.inf
        ]
        groups = {
            "round to nearest": [p for p, row in points if "peer" not in row and row["method"] == "rtn"],
            "lowbit's other methods": [
                p for p, row in points if "peer" not in row and row["method"] != "rtn"
            ],
            "other toolkits": [p for p, row in points if "peer" in row],
        }
        for (group, some), mark, colour in zip(groups.items(), "oDx", ("#787774", "#0b6e99", "#d9730d")):
            axes.scatter([p.x for p in some], [p.y for p in some], marker=mark, c=colour, s=22, label=group)
        front = pareto([p for p, _ in points])
        axes.plot([p.x for p in front], [p.y for p in front], linewidth=1, color="#448361", zorder=0)
        for point in front:
            axes.annotate(
                point.label, (point.x, point.y), xytext=(4, 4), textcoords="offset points", fontsize=6.5
            )
        axes.set(yscale="log", xlabel="stored bits per weight of the layers", ylabel="KL, nats per token")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def label(row: Row) -> str:
    name = row["method"] if row["method"] != "rtn" else ""
    peer = f"{row['peer']} " if "peer" in row else ""
    return f"{peer}{name} {row['format']}".strip()


def _kl(row: Row, text: str) -> float:
    value = row[text]["kl_nats_per_token"]
    return math.inf if value is None else float(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    align = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, align, *body))
