"""The pictures in docs/: fractions of the bounds by width, and the curve over the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError
from lowbit.measure import plot

NAMES = {"kernels": "kernels-by-width.png", "curve": "batch-curve.png"}


def draw(result: Mapping[str, Any], folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Draw what the result has and return the files; without matplotlib say so and draw nothing."""
    written = []
    for section, name in NAMES.items():
        found = result["sections"].get(section)
        if not found:
            continue
        path = folder / name
        try:
            plot.check(str(path))
            plot.draw_kernels(found, str(path))
        except LowbitError as error:
            say(f"{name}: {error}")
            continue
        written.append(path)
    return written
