"""Pictures of measured products: bars of the fraction of the bound, or curves over the batch.

matplotlib is imported only when something is drawn; it comes with lowbit[plot].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.errors import RequestError, UnsupportedError

SUFFIXES = (".png", ".svg", ".pdf")
CURVE_BATCHES = 3  # from so many batches on, a curve says more than bars
COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#cb912f", "#c14c8a", "#787774", "#337ea9")


def check(path: str) -> None:
    """Raise if `path` cannot be drawn to: matplotlib missing, unknown suffix, no such folder."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise RequestError(f"plot {path!r}: must end in one of {', '.join(SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        raise RequestError(f"plot {path!r}: there is no such folder")
    _pyplot()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UnsupportedError("plot: matplotlib is not installed; `pip install lowbit[plot]`") from None
    matplotlib.use("Agg")  # no display, no window
    from matplotlib import pyplot

    return pyplot


def draw_kernels(result: Mapping[str, Any], path: str) -> None:
    """Draw what `bench_kernels` returned: a curve over many batches, otherwise bars for each batch."""
    batches = sorted({entry["batch"] for entry in result["kernels"]})
    if not batches:
        raise RequestError(f"plot {path!r}: nothing was measured")
    if len(batches) >= CURVE_BATCHES:
        _curves(result, path)
    else:
        _bars(result, batches, path)


def _label(entry: Mapping[str, Any], several: Mapping[str, bool]) -> str:
    parts = [entry["format"]]
    if several["shape"]:
        parts.append(f"{entry['out_features']}x{entry['in_features']}")
    if several["threads"]:
        parts.append(f"{entry['threads']} threads" if entry["threads"] > 1 else "1 thread")
    return ", ".join(parts)


def _several(kernels: list[Mapping[str, Any]]) -> dict[str, bool]:
    """What has to stand in a label because it is not the same everywhere."""
    shapes = {(e["out_features"], e["in_features"]) for e in kernels}
    return {"shape": len(shapes) > 1, "threads": len({e["threads"] for e in kernels}) > 1}


def _title(result: Mapping[str, Any], several: Mapping[str, bool]) -> str:
    first = result["kernels"][0]
    parts = [result["cpu"], result["isa"]]
    if not several["shape"]:
        parts.append(f"{first['out_features']}x{first['in_features']}")
    if not several["threads"]:
        parts.append(f"{first['threads']} threads" if first["threads"] > 1 else "1 thread")
    return ", ".join(parts)


def _curves(result: Mapping[str, Any], path: str) -> None:
    plt = _pyplot()
    from matplotlib import ticker

    kernels = result["kernels"]
    several = _several(kernels)
    series: dict[str, list[tuple[int, float, float]]] = {}
    for entry in sorted(kernels, key=lambda e: e["batch"]):
        point = (
            entry["batch"],
            entry["tokens_per_second"],
            entry["tokens_per_second"] / entry["bound_fraction"],
        )
        series.setdefault(_label(entry, several), []).append(point)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, (label, points) in enumerate(series.items()):
        batch, rate, limit = zip(*points)
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(batch, rate, marker="o", markersize=4, color=colour, label=label)
        axes.plot(batch, limit, linestyle=":", linewidth=1, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="tokens in one product", ylabel="tokens per second")
    ticks = sorted({entry["batch"] for entry in kernels})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_title(f"{_title(result, several)}\nsolid: measured; dotted: bound", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(result: Mapping[str, Any], batches: list[int], path: str) -> None:
    plt = _pyplot()
    kernels = result["kernels"]
    several = _several(kernels)
    labels = list(dict.fromkeys(_label(entry, several) for entry in kernels))
    height = 1.6 + 0.26 * len(labels) * max(1, len(batches) / 1.5)
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    thickness = 0.8 / len(batches)
    for number, batch in enumerate(batches):
        found = {_label(e, several): e["bound_fraction"] for e in kernels if e["batch"] == batch}
        places = [labels.index(label) + (number - (len(batches) - 1) / 2) * thickness for label in found]
        name = "1 token, of the bandwidth" if batch == 1 else f"{batch} tokens, of the bound"
        bars = axes.barh(
            places, [100 * f for f in found.values()], thickness * 0.9, color=COLOURS[number], label=name
        )
        axes.bar_label(bars, fmt="%.0f%%", fontsize=7, padding=2)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set(xlim=(0, 118), xlabel="% of the least time that bandwidth and peak allow")
    axes.set_title(_title(result, several), fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.9 / height), ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
