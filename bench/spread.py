"""The statistics of every figure: median and extremes, and the ratio of two interleaved series."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


def summary(values: Sequence[float]) -> dict[str, object]:
    """Median, lowest, highest and the values themselves, in the order they were measured."""
    if not values:
        raise ValueError("summary: no values; at least one measurement is needed")
    return {"median": median(values), "low": min(values), "high": max(values), "values": list(values)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, object]:
    """Ours over theirs, round by round: neighbours in time share what the machine was doing.

    The figure is the ratio of the medians; low and high are the extremes of the paired ratios.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"ratio: {len(ours)} and {len(theirs)} values; two series of one length are needed")
    pairs = [a / b for a, b in zip(ours, theirs)]
    return {"median": median(ours) / median(theirs), "low": min(pairs), "high": max(pairs)}
