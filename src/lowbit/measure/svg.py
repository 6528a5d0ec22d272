"""Small charts as inline SVG: points, lines and histograms, without scripts and without a library.

Text and axes take the colour of the page around them, so a chart reads on light and on dark. A point tells
its label and numbers when the pointer rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from lowbit.measure.plot import COLOURS

WIDTH, HEIGHT = 760, 340
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 14, 46
LETTER = 6.2  # px that a letter of a label takes, about


@dataclass(frozen=True)
class Point:
    """label: what stands beside it, or in its tooltip."""

    x: float
    y: float
    label: str = ""


@dataclass(frozen=True)
class Series:
    """line: join the points. mark: draw them. name: "" stays out of the legend."""

    name: str
    points: Sequence[Point]
    line: bool = False
    mark: bool = True


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other equals or beats in both coordinates (less is better), by x."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not front or point.y < front[-1].y:
            front.append(point)
    return front


def chart(
    series: Sequence[Series], x_label: str, y_label: str, log_y: bool = False, names: bool = False
) -> str:
    """An SVG of all series. What is not finite is left out.

    log_y: logarithmic upwards; zeros lie on the bottom. names: labels stand beside the points.
    """
    kept = [
        Series(s.name, [p for p in s.points if math.isfinite(p.x) and math.isfinite(p.y)], s.line, s.mark)
        for s in series
    ]
    everything = [point for one in kept for point in one.points]
    if not everything:
        return "<p>Nothing to draw.</p>"
    positive = [p.y for p in everything if p.y > 0]
    log_y = log_y and bool(positive)
    across = _Axis([p.x for p in everything], LEFT, WIDTH - RIGHT, False)
    heights = [max(p.y, min(positive) / 2) for p in everything] if log_y else [p.y for p in everything]
    upwards = _Axis(heights, HEIGHT - BOTTOM, TOP, log_y)
    parts = [_frame(across, upwards, x_label, y_label)]
    taken: list[tuple[float, float, float]] = []
    for number, one in enumerate(kept):
        colour = COLOURS[number % len(COLOURS)]
        places = [(across(p.x), upwards(p.y)) for p in one.points]
        if one.line and len(places) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        if not one.mark:
            continue
        for (x, y), point in zip(places, one.points):
            told = f"{point.label or one.name}: {number_text(point.x)}, {number_text(point.y)}"
            tip = f"<title>{escape(told)}</title>"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">{tip}</circle>')
            if names and point.label:
                parts.append(_name(x, y, point.label, taken))
    legend = [(COLOURS[n % len(COLOURS)], one.name) for n, one in enumerate(kept) if one.name and one.points]
    return _svg(WIDTH, HEIGHT, parts) + (_legend(legend) if len(legend) > 1 else "")


def histogram(curves: Sequence[tuple[str, Sequence[float]]], low: float, high: float, x_label: str) -> str:
    """Step lines over equal bins from `low` to `high`, each scaled to a share of its own total."""
    width, height, bottom = 360, 150, 34
    shares = [(name, [value / max(sum(counts), 1e-300) for value in counts]) for name, counts in curves]
    top = max((max(values, default=0.0) for _, values in shares), default=0.0) or 1.0
    parts = []
    for number, (name, values) in enumerate(shares):
        step = (width - 20) / max(1, len(values))
        path = [f"M10,{height - bottom}"]
        for i, value in enumerate(values):
            y = height - bottom - (height - bottom - 8) * value / top
            path.append(f"V{y:.1f}H{10 + (i + 1) * step:.1f}")
        path.append(f"V{height - bottom}")
        colour = COLOURS[number % len(COLOURS)]
        parts.append(
            f'<path d="{"".join(path)}" fill="{colour}" fill-opacity="0.25" stroke="{colour}">'
            f"<title>{escape(name)}</title></path>"
        )
    for place, value in ((10, low), (width / 2, (low + high) / 2), (width - 10, high)):
        anchor = "start" if place == 10 else "end" if place > width / 2 else "middle"
        parts.append(_text(place, height - bottom + 14, number_text(value), anchor))
    parts.append(_text(width / 2, height - 4, x_label, "middle"))
    legend = [(COLOURS[n % len(COLOURS)], name) for n, (name, _) in enumerate(shares)]
    return _svg(width, height, parts) + (_legend(legend) if len(legend) > 1 else "")


def number_text(value: float) -> str:
    """Four significant digits at most."""
    return f"{value:.4g}"


class _Axis:
    """Values to pixels, with ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool) -> None:
        self.map: Callable[[float], float] = math.log10 if log else float
        self.floor = min(values)
        low, high = self.map(min(values)), self.map(max(values))
        margin = 0.06 * (high - low) or 0.5 * (1 if log else abs(high) or 1)
        self.low, self.high = low - margin, high + margin
        self.start, self.end, self.log = start, end, log

    def __call__(self, value: float) -> float:
        if self.log:
            value = max(value, self.floor)
        share = (self.map(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            first, last = max(math.floor(self.low), -300), min(math.ceil(self.high), 300)
            decades = self.high - self.low
            steps = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
            apart = max(1, (last - first) // 8)
            found = [float(m) * 10.0**e for e in range(first, last + 1, apart) for m in steps]
            return [t for t in found if self.low <= math.log10(t) <= self.high]
        rough = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
        first = math.ceil(self.low / step)
        return [n * step for n in range(first, math.floor(self.high / step) + 1)]


def _frame(across: _Axis, upwards: _Axis, x_label: str, y_label: str) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in upwards.ticks():
        y = upwards(tick)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(LEFT - 6, y + 4, number_text(tick), "end"))
    for tick in across.ticks():
        x = across(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>')
        parts.append(_text(x, bottom + 16, number_text(tick), "middle"))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 8, x_label, "middle"))
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _name(x: float, y: float, label: str, taken: list[tuple[float, float, float]]) -> str:
    """A label beside its point, moved down while it would cover another one."""
    length = LETTER * len(label)
    left = x + 7 if x + 7 + length < WIDTH else x - 7 - length
    at = y + 4
    while any(abs(at - other) < 11 and left < end and begin < left + length for begin, end, other in taken):
        at += 11
    taken.append((left, left + length, at))
    return _text(left, at, label, "start")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        f"{''.join(parts)}</svg>"
    )


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    shown = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for colour, name in entries
    )
    return f'<div class="legend">{shown}</div>'
