"""The table of views: the same function in other weights, made from a checkpoint without calibration.

A view is a function (checkpoint, *, options) -> checkpoint and a line here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowbit.compress.hadamard import Rotated
from lowbit.compress.ksort import Sorted

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class View:
    """apply: the function; source: where it was published."""

    apply: Callable[..., Checkpoint]
    summary: str
    source: str

    def options(self) -> dict[str, str | int | float | bool]:
        """Names and defaults of its options."""
        parameters = inspect.signature(self.apply).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _hadamard(checkpoint: Checkpoint, *, seed: int = 0) -> Checkpoint:
    return Rotated(checkpoint, seed)


def _ksort(checkpoint: Checkpoint) -> Checkpoint:
    return Sorted(checkpoint)


VIEWS: dict[str, View] = {
    "hadamard": View(_hadamard, "residual stream and values rotated: outliers spread", "arXiv:2404.00456"),
    "ksort": View(_ksort, "channels of the keys in the order of magnitude", "arXiv:2403.20137"),
}
