"""The table of refinements: more bits for a few rows of matrices that a method has rounded.

A refinement is a function (checkpoint, tokens, formats, *, options) -> rows by tensor name, and a line here.
What those rows lack after rounding is stored in codes of the matrix's own format (quantize/rows.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lowbit.errors import RequestError
from lowbit.formats import Format
from lowbit.packed import PackedMatrix
from lowbit.quantize.round_to_nearest import round_to_nearest

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint

Rows = dict[str, np.ndarray]


@dataclass(frozen=True)
class Refinement:
    """apply: the function; source: where it was published."""

    apply: Callable[..., Rows]
    summary: str
    source: str

    def options(self) -> dict[str, str | int | float | bool]:
        """Names and defaults of its options."""
        parameters = inspect.signature(self.apply).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _mixllm(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    formats: Mapping[str, Format | None],
    *,
    fraction: float = 0.1,
    samples: int = 16,
) -> Rows:
    """The `fraction` of the rows of all layers that matter most, judged on `samples` windows."""
    from lowbit.compress.salience import salience, salient_rows

    if not 0 <= fraction <= 1 or samples < 1:
        raise RequestError(f"mixllm: fraction={fraction}, samples={samples}; give 0 to 1, and at least 1")

    def coarse(tensor: str, weight: np.ndarray) -> PackedMatrix | None:
        format = formats[tensor]
        return None if format is None or format.float_type else round_to_nearest(weight, format)

    return salient_rows(salience(checkpoint, tokens[:samples], coarse), fraction)


REFINEMENTS: dict[str, Refinement] = {
    "mixllm": Refinement(_mixllm, "twice the bits for the outputs that matter most", "arXiv:2412.14590"),
}
