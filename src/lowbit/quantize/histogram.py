"""Counts over fixed bins, so that those of many matrices can be added."""

from __future__ import annotations

import numpy as np

LOW, HIGH, BINS = -16.0, 16.0, 64


def channel_histogram(magnitudes: np.ndarray) -> dict[str, object]:
    """How the channels of an input differ in size: counts of log2 of `magnitudes`, in half octaves.

    magnitudes: float [channels], not negative, such as Statistics.magnitudes
    Returns {"low", "high", "counts"}; what lies outside, zero included, is counted in the outermost bins.
    """
    with np.errstate(divide="ignore"):
        values = np.clip(np.log2(magnitudes.astype(np.float64)), LOW, HIGH)
    return {"low": LOW, "high": HIGH, "counts": np.histogram(values, BINS, (LOW, HIGH))[0].tolist()}
