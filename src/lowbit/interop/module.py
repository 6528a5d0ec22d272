"""How a directory target stores one linear layer: the interface of compressed_tensors.py, gptq.py, awq.py ..

A target first looks at every matrix (`look`), then settles what all of them take (`settle`), which gives a
Packing for each, or None where only rounding to the format of that name brings it in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from lowbit.formats import parse_format
from lowbit.packed import PackedMatrix
from lowbit.quantize.round_to_nearest import quantize_with_error

Layout = dict[str, tuple[Any, tuple[int, ...]]]  # suffix -> (type, shape)


class Packing(Protocol):
    """How one layer is stored. `format` names the numbers in our words, also for rounding floats to them."""

    @property
    def format(self) -> str: ...

    @property
    def bits_per_weight(self) -> float: ...

    def layout(self, rows: int, columns: int) -> Layout: ...

    def arrays(self, matrices: Sequence[PackedMatrix]) -> dict[str, np.ndarray] | None:
        """What is stored of the rows of the matrices, exactly; None: they do not fit."""
        ...


@dataclass(frozen=True)
class Seen:
    """A layer before anything is settled: its matrices' shapes, and what they are.

    floats: plain floats, which are rounded; matrices: () for floats, else those that are stored
    """

    shape: tuple[int, int]
    floats: bool
    matrices: tuple[PackedMatrix, ...]


def rounded(weight: np.ndarray, packing: Packing, what: str) -> PackedMatrix:
    """float32 [rows, inputs] rounded to the packing's format. `what` opens errors."""
    own = getattr(packing, "rounded", None)
    if own is not None:
        return own(weight)
    format = parse_format(packing.format)
    # `largest` of one step keeps the scale of the tensor, which no target has, at 1.
    return quantize_with_error(weight, format, what=what, largest=format.max_level)[0]


class Target(Protocol):
    """One kind of directory."""

    def settle(self, layers: Mapping[str, Seen], format: str | None) -> dict[str, Packing]:
        """The packing of each layer, by the name of its module; format: what the user asked for."""
        ...

    def quantization_config(self, packings: Mapping[str, Packing], kept: Sequence[str]) -> dict[str, Any]:
        """What config.json says; kept: modules whose weights stay floats."""
        ...


def default_format(layers: Mapping[str, Seen], bits: int = 4) -> str:
    """Symmetric integers in the largest usual groups that divide every layer."""
    columns = [layer.shape[1] for layer in layers.values()]
    group = next((g for g in (128, 64, 32, 16) if all(n % g == 0 for n in columns)), 0)
    return f"int{bits}-g{group}" if group else f"int{bits}-row"
