"""Which format each matrix takes: an integer program over all items at once.

    minimise   sum_i sum_f x_if v_if
    subject to sum_f x_if = count of item i;   sum x bytes <= room;   sum x seconds <= limit (decode, prompt);
               sum x nats <= limit

with v the objective: nats, bytes or seconds. Items that are alike in every number (the same matrices of all
    layers, where no sensitivity tells them apart) are one item with a count, so that 80 layers are as quick
    as one. Solved by SciPy's HiGHS. A limit that cannot be met is named together with what can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.formats import Format
from lowbit.quiet import without_output

GAP = 1e-6


@dataclass(frozen=True)
class Item:
    """Matrices that take one format together, `count` such alike. figures: name -> value for each format."""

    tensors: tuple[str, ...]
    formats: tuple[Format, ...]
    figures: Mapping[str, tuple[float, ...]]
    count: int = 1
    members: tuple[tuple[str, ...], ...] = ()  # tensors of each of the `count`


@dataclass(frozen=True)
class Chosen:
    """formats: for each item how many take each format; sums: of every figure; objective."""

    counts: tuple[tuple[int, ...], ...]
    sums: Mapping[str, float]


def choose(items: Sequence[Item], objective: str, limits: Mapping[str, float]) -> Chosen | None:
    """The least sum of `objective` within all `limits` (by the name of a figure); None if there is none."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise UnsupportedError(
            "plan: choosing formats needs SciPy; pip install 'lowbit[quantize]'"
        ) from error
    columns = [(i, f) for i, item in enumerate(items) for f in range(len(item.formats))]
    count = len(columns)

    def values(name: str) -> np.ndarray:
        return np.array([items[i].figures[name][f] for i, f in columns], np.float64)

    each = np.zeros((len(items), count))
    for column, (i, _) in enumerate(columns):
        each[i, column] = 1
    totals = np.array([item.count for item in items], np.float64)
    constraints = [LinearConstraint(each, totals, totals)]
    for name, limit in limits.items():
        if limit < 0:
            return None
        unit = max(abs(limit), 1e-30)
        constraints.append(LinearConstraint(values(name)[None] / unit, -np.inf, limit / unit * (1 - 1e-9)))
    cost = values(objective)
    largest = float(np.abs(cost).max()) or 1.0
    # A hair for what else is good: of equal choices the smaller and faster one.
    tie = sum(
        values(name) / (float(np.abs(values(name)).max()) or 1.0) for name in ("bytes", "decode", "nats")
    )
    with without_output():
        result = milp(
            cost / largest * 1e3 + 1e-6 * tie,
            integrality=np.ones(count),
            bounds=Bounds(0, totals[[i for i, _ in columns]]),
            constraints=constraints,
            options={"mip_rel_gap": GAP, "node_limit": 100_000},
        )
    if result.x is None:
        return None
    x = np.rint(result.x).astype(int)
    counts: list[list[int]] = [[0] * len(item.formats) for item in items]
    for column, (i, f) in enumerate(columns):
        counts[i][f] = int(x[column])
    names = items[0].figures.keys() if items else ()
    sums = {name: float((values(name) * x).sum()) for name in names}
    return Chosen(tuple(map(tuple, counts)), sums)


def least(items: Sequence[Item], name: str) -> float:
    """The least that the sum of a figure can be."""
    return sum(min(item.figures[name]) * item.count for item in items)


def merge(items: Sequence[Item]) -> list[Item]:
    """Items that are alike in every figure become one with a count, in order of first appearance."""
    alike: dict[object, list[Item]] = {}
    for item in items:
        key = (item.formats, tuple(sorted((k, v) for k, v in item.figures.items())))
        alike.setdefault(key, []).append(item)
    return [
        Item(
            group[0].tensors,
            group[0].formats,
            group[0].figures,
            sum(item.count for item in group),
            tuple(member for item in group for member in (item.members or (item.tensors,))),
        )
        for group in alike.values()
    ]


def spread(item: Item, counts: Sequence[int]) -> dict[str, Format]:
    """tensor -> format: of layers that are alike the earlier ones take the formats of more bits."""
    order = sorted(range(len(item.formats)), key=lambda f: -item.formats[f].bits_per_weight(4096))
    picked = [item.formats[f] for f in order for _ in range(counts[f])]
    return {tensor: fmt for member, fmt in zip(item.members or (item.tensors,), picked) for tensor in member}
