"""One self-contained HTML page about a run: of `lowbit quantize`, of `lowbit compare`, or of both.

The page needs no network, no script and no other file. What it shows depends on what the data has:

    layers       of quantize_checkpoint's report: error and bits of each matrix
    histograms   see `weight_histograms`
    models       of a comparison: divergence and perplexity against bits; `comparison` may hold one as well
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import RequestError
from lowbit.measure.pages import write_page
from lowbit.measure.svg import Point, Series, chart, histogram, pareto

SPAN, BINS = 5.0, 101  # weights are counted between plus and minus so many root mean squares
Data = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 800px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: 2px 10px 2px 0; text-align: right; }
td:first-child, th:first-child { text-align: left; overflow-wrap: anywhere; }
th { border-bottom: 1px solid; } .scroll { overflow-x: auto; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
.facts td { text-align: left; }
.grid { stroke: currentColor; stroke-opacity: 0.15; }
.legend span { margin-right: 1.2em; font-size: 13px; }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 5px; }
.many { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 1em; }
"""


def write_report(path: str | os.PathLike[str], data: Data) -> None:
    """Write the page about `data` to `path`; it appears whole or not at all.

    data: the report of a quantization, or the result of a comparison as `lowbit compare --json` prints it,
        or the first with the second under "comparison"; `title` is optional.
    Raises RequestError if the data has nothing to show or the page cannot be written.
    """
    write_page(path, html(data))


def html(data: Data) -> str:
    """The page as text."""
    comparison = data if "models" in data else data.get("comparison")
    sections: list[str] = []
    if "layers" in data:
        sections += _run(data)
    if comparison:
        sections += _comparison(comparison)
    if not sections:
        raise RequestError("report: the data has neither layers nor models; give a report or a comparison")
    title = str(data.get("title") or data.get("output") or "Comparison of models")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width"/>'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1>{''.join(sections)}</body></html>\n"
    )


def weight_histograms(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Weights before and after, one entry for each kind of matrix, in units of its root mean square.

    source, output: the checkpoint that was quantized and what became of it
    Returns [{"name", "low", "high", "original": [counts], "quantized": [counts]}], counts over all layers.
    """
    from lowbit.model.checkpoint import open_checkpoint

    found: dict[str, dict[str, np.ndarray]] = {}
    with open_checkpoint(source) as before, open_checkpoint(output) as after:
        known = set(after.names())
        for name in before.names():
            if len(before.shape(name)) != 2 or name not in known:
                continue
            original, quantized = before.read(name), after.read(name)
            size = float(np.sqrt(np.mean(np.square(original, dtype=np.float64)))) or 1.0
            counts = found.setdefault(
                _place(name)[1],
                {"original": np.zeros(BINS, np.int64), "quantized": np.zeros(BINS, np.int64)},
            )
            for key, values in (("original", original), ("quantized", quantized)):
                counts[key] += np.histogram(np.clip(values / size, -SPAN, SPAN), BINS, (-SPAN, SPAN))[0]
    return [
        {"name": kind, "low": -SPAN, "high": SPAN, **{key: c.tolist() for key, c in counts.items()}}
        for kind, counts in found.items()
    ]


def _run(data: Data) -> list[str]:
    layers: Sequence[Data] = data["layers"]
    facts = [
        ("method", data.get("method")),
        ("bits per weight, everything stored", _shown(data.get("bits_per_weight"), "{:.3f}")),
        ("time", _shown(data.get("seconds"), "{:.1f} s")),
        ("peak memory", _shown(data.get("peak_rss_bytes"), "{:.0f} MB", 1e-6)),
        ("size", _shown(data.get("size_bytes"), "{:.1f} MB", 1e-6)),
        ("matrices", str(len(layers))),
    ]
    sections = [_facts(facts)]
    sections.append(
        "<h2>Error of each matrix</h2><p>Squared error over the squared norm, by layer; "
        "embedding and head are in the table below.</p>"
    )
    sections.append(
        chart(_by_kind(layers, "relative_squared_error"), "layer", "relative squared error", log_y=True)
    )
    sections.append("<h2>Bits of each matrix</h2><p>Stored bits per weight, scales included.</p>")
    sections.append(chart(_by_kind(layers, "bits_per_weight"), "layer", "bits per weight"))
    if any("seconds" in layer for layer in layers):
        sections.append("<h2>Time</h2>")
        sections.append(chart(_by_kind(layers, "seconds"), "layer", "seconds"))
    if data.get("histograms"):
        sections.append("<h2>Weights</h2><p>Before and after, in units of the root mean square.</p>")
        sections.append(_many([_weights(entry) for entry in data["histograms"]]))
    inputs = _inputs(layers)
    if inputs:
        sections.append("<h2>Activations</h2><p>Root mean square of the input channels that were seen.</p>")
        sections.append(_many(inputs))
    rows = [
        (
            layer["name"],
            " x ".join(map(str, layer["shape"])),
            layer["format"],
            f"{layer['bits_per_weight']:.3f}",
            _shown(layer.get("relative_squared_error"), "{:.3g}"),
        )
        for layer in layers
    ]
    head = ("matrix", "shape", "format", "bits per weight", "relative squared error")
    sections.append(
        f"<h2>All matrices</h2><details><summary>{len(rows)} matrices</summary>{_table(head, rows)}</details>"
    )
    return sections


def _comparison(data: Data) -> list[str]:
    models: Sequence[Data] = data["models"]
    reference = data.get("reference", {})
    facts = [
        ("reference", reference.get("model")),
        ("its perplexity", _shown(reference.get("perplexity"), "{:.4f}")),
        ("text", data.get("text")),
        ("tokens", _shown(data.get("tokens"), "{:,}")),
        ("tokens in a window", _shown(data.get("context"), "{}")),
        ("time", _shown(data.get("seconds"), "{:.1f} s")),
    ]
    rows = [
        (
            str(model["model"]),
            f"{model['bits_per_weight']:.3f}",
            _shown(model.get("size_bytes"), "{:.1f} MB", 1e-6),
            _shown(model.get("kl_nats_per_token"), "{:.5f}")
            + _shown(model.get("kl_standard_error"), " ± {:.5f}"),
            _shown(model.get("top1_agreement"), "{:.2f}%", 100),
            _shown(model.get("perplexity"), "{:.4f}"),
        )
        for model in models
    ]
    names = [Path(str(model["model"])).name for model in models]
    short = names if len(set(names)) == len(names) else [str(model["model"]) for model in models]
    head = ("model", "bits per weight", "size", "KL, nats per token", "same top token", "perplexity")
    sections = ["<h2>Against the reference</h2>", _facts(facts), _table(head, rows)]
    for key, label in (("kl_nats_per_token", "KL, nats per token"), ("perplexity", "perplexity")):
        points = [
            Point(float(m["bits_per_weight"]), float(m[key]), name)
            for m, name in zip(models, short)
            if m.get(key) is not None and math.isfinite(m[key])
        ]
        series = [
            Series("models", points),
            Series("best at their bits (Pareto front)", pareto(points), line=True, mark=False),
        ]
        sections.append(f"<h2>{label[0].upper()}{label[1:]} against bits</h2>")
        sections.append(chart(series, "bits per weight, everything stored", label, log_y=True, names=True))
    return sections


def _place(name: str) -> tuple[float | None, str]:
    """(layer, kind) of a tensor: (3, "q_proj"); what lies outside the layers has None."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    kind = [part for part in name.split(".") if not part.isdigit() and part != "weight"]
    return (float(found.group(1)) if found else None), kind[-1] if kind else name


def _by_kind(layers: Sequence[Data], key: str) -> list[Series]:
    """One line for each kind of matrix of the layers; what lies outside them would set the scale for all."""
    lines: dict[str, list[Point]] = defaultdict(list)
    for layer in layers:
        at, kind = _place(layer["name"])
        value = layer.get(key)
        if at is not None and value is not None:
            lines[kind].append(Point(at, float(value), f"{layer['name']} ({layer['format']})"))
    return [Series(kind, sorted(points, key=lambda p: p.x), line=True) for kind, points in lines.items()]


def _weights(entry: Data) -> str:
    curves = [(key, entry[key]) for key in ("original", "quantized") if key in entry]
    return histogram(curves, entry["low"], entry["high"], str(entry["name"]))


def _inputs(layers: Sequence[Data]) -> list[str]:
    """Histograms of the layers' `input_histogram`, those of one kind added; log2 of the root mean square."""
    sums: dict[str, dict[str, Any]] = {}
    for layer in layers:
        seen = layer.get("input_histogram")
        if not seen:
            continue
        kind = _place(layer["name"])[1]
        if kind not in sums:
            sums[kind] = {**seen, "counts": list(seen["counts"])}
        else:
            sums[kind]["counts"] = [a + b for a, b in zip(sums[kind]["counts"], seen["counts"])]
    return [
        histogram([("channels", s["counts"])], s["low"], s["high"], f"log2, input of {kind}")
        for kind, s in sums.items()
    ]


def _many(charts: Sequence[str]) -> str:
    return '<div class="many">' + "".join(f"<div>{one}</div>" for one in charts) + "</div>"


def _shown(value: Any, form: str, factor: float = 1) -> str:
    """`value` in the given form; nothing for what is missing or not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return form.format(value * factor if factor != 1 else value)


def _facts(items: Sequence[tuple[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
        for name, value in items
        if value not in (None, "")
    )
    return f'<table class="facts">{rows}</table>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [line(head, "th"), *(line(row, "td") for row in rows)]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
