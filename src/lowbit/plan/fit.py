"""Seconds for each amount of work, from measured steps: non-negative least squares of relative errors.

    t(step) = sum over amounts a of n_a s_a  +  sum over products of weights * r_format(tokens)

with s_a >= 0 and r_format(tokens) >= 0 linear between the numbers of tokens that were measured. Rows are
divided by the measured time, so that short and long steps count alike.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.plan.work import AMOUNTS, Amounts

OUTLIER, REWEIGHTINGS = 0.08, 6  # relative error from which a point counts less; rounds

Rates = dict[
    tuple[str, int], tuple[list[float], list[float]]
]  # (format, activation bits) -> tokens, s/weight


@dataclass(frozen=True)
class Point:
    """A step that was measured: what it does and how long it took."""

    amounts: Amounts
    seconds: float


@dataclass(frozen=True)
class Fitted:
    """seconds: of each of AMOUNTS that was seen; rates: seconds per weight by format and tokens."""

    seconds: dict[str, float]
    rates: Rates


def fit(points: Sequence[Point], grids: dict[tuple[str, int], list[float]]) -> Fitted:
    """grids: for each format and activation bits the numbers of tokens at which its rate is fitted.

    A rate is a sum of non-negative steps along its grid: more tokens never take less. Points that the fit
    misses by more than OUTLIER count less, in a few rounds (iteratively reweighted): other programs disturb
    some.
    """
    columns: dict[object, int] = {}
    rows: list[dict[int, float]] = []
    for point in points:
        row: dict[int, float] = {}
        for name, amount in point.amounts.of.items():
            if amount:
                column = columns.setdefault(name, len(columns))
                row[column] = row.get(column, 0.0) + amount / point.seconds
        for (format, bits, tokens), weights in point.amounts.products.items():
            grid = grids[format.name, bits]
            for at, share in shares(grid, tokens):
                for step in grid[: grid.index(at) + 1]:
                    column = columns.setdefault((format.name, bits, step), len(columns))
                    row[column] = row.get(column, 0.0) + share * weights / point.seconds
        rows.append(row)
    matrix = np.zeros((len(rows), len(columns)))
    for i, row in enumerate(rows):
        for column, value in row.items():
            matrix[i, column] = value
    weight = np.ones(len(rows))
    for _ in range(REWEIGHTINGS):
        found = non_negative(matrix * weight[:, None], weight)
        missed = np.abs(1 - matrix @ found)
        weight = np.sqrt(np.minimum(1.0, OUTLIER / np.maximum(missed, 1e-12)))
    seconds = {name: float(found[columns[name]]) for name in AMOUNTS if name in columns}
    rates: Rates = {}
    for (name, bits), grid in grids.items():
        steps = [float(found[columns[name, bits, t]]) if (name, bits, t) in columns else 0.0 for t in grid]
        rates[name, bits] = (list(grid), [float(v) for v in np.cumsum(steps)])
    return Fitted(seconds, rates)


def shares(grid: Sequence[float], tokens: float) -> list[tuple[float, float]]:
    """[(number of the grid, weight)] of linear interpolation at `tokens`, held at the first and last."""
    if tokens <= grid[0]:
        return [(grid[0], 1.0)]
    if tokens >= grid[-1]:
        return [(grid[-1], 1.0)]
    right = bisect_right(grid, tokens)
    low, high = grid[right - 1], grid[right]
    part = (tokens - low) / (high - low)
    return [(low, 1 - part), (high, part)] if part else [(low, 1.0)]


def rate_at(tokens: Sequence[float], rates: Sequence[float], at: float) -> float:
    """Seconds per weight at `at` tokens; beyond the last along the line of the last two."""
    if at > tokens[-1] and len(tokens) > 1:
        slope = (rates[-1] - rates[-2]) / (tokens[-1] - tokens[-2])
        return rates[-1] + max(slope, 0.0) * (at - tokens[-1])
    table = dict(zip(tokens, rates))
    return sum(share * table[t] for t, share in shares(tokens, at))


def non_negative(matrix: np.ndarray, target: np.ndarray, rounds: int = 2000) -> np.ndarray:
    """The x >= 0 of least |matrix x - target|^2 (Lawson and Hanson, Solving Least Squares Problems, 1974)."""
    norms = np.linalg.norm(matrix, axis=0)
    norms[norms == 0] = 1.0
    a = matrix / norms
    gram, right = a.T @ a, a.T @ target
    n = a.shape[1]
    x = np.zeros(n)
    passive = np.zeros(n, bool)
    for _ in range(rounds):
        gradient = right - gram @ x
        gradient[passive] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-10 * len(target):
            break
        passive[best] = True
        while True:
            index = np.flatnonzero(passive)
            solved = np.zeros(n)
            part = gram[np.ix_(index, index)] + 1e-12 * np.eye(len(index))
            solved[index] = np.linalg.solve(part, right[index])
            bad = index[solved[index] <= 0]
            if not len(bad):
                x = solved
                break
            step = float(np.min(x[bad] / (x[bad] - solved[bad] + 1e-300)))
            x = x + step * (solved - x)
            passive &= x > 1e-15
            x[~passive] = 0.0
            if not passive.any():
                break
    return x / norms
