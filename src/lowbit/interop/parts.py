"""The tensors of a file that is written, and of which matrices each is put together.

Files of other tools fuse some matrices, stack experts and order the rows of queries and keys in their own
way; model/stored_names.py and model/gguf_names.py say how, model/sources.py inverts it. Here each stored
tensor becomes a list of parts in the order of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lowbit.model.checkpoint import Checkpoint
from lowbit.model.config import ModelConfig
from lowbit.model.sources import Source, Stored, stored_tensors
from lowbit.model.stored_names import Names
from lowbit.packed import PackedMatrix

# Two-dimensional, but kept as floats by everyone.
_FLOATS = ("mlp.router.weight", "embed_positions.weight")


@dataclass(frozen=True, eq=False)
class Part:
    """A canonical tensor; order: its rows as the file has them, None: as they are."""

    name: str
    order: np.ndarray | None = None

    def matrix(self, checkpoint: Checkpoint) -> PackedMatrix:
        matrix = checkpoint.matrix(self.name)
        return matrix if self.order is None else matrix.permute_rows(self.order)


@dataclass(frozen=True, eq=False)
class Planned:
    """A tensor of the file.

    parts: what it consists of, in the order of rows; () where that is no stack of rows
    matrix: are the parts matrices of weights, so that it may be quantized?
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    matrix: bool
    stored: Stored

    def read(self, checkpoint: Checkpoint) -> np.ndarray:
        """The tensor as float32, put together."""
        return self.stored.assemble(lambda name: np.ascontiguousarray(checkpoint.read(name), np.float32))


def planned_tensors(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], names: Names | None
) -> list[Planned]:
    """Every tensor of the file. shapes: of the canonical tensors; names: None: those of transformers."""
    planned = []
    for name, stored in stored_tensors(config, shapes, names).items():
        stacked = not any(source.transposed for source in stored.parts.values())
        weights = all(len(shapes[part]) == 2 and not part.endswith(_FLOATS) for part in stored.parts)
        parts = _parts(stored, shapes) if stacked else ()
        planned.append(Planned(name, stored.shape, parts, weights and stacked, stored))
    return planned


def _parts(stored: Stored, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Part, ...]:
    """The parts in the order of rows, experts first."""
    placed = []
    for name, source in stored.parts.items():
        start, order = _rows(source, shapes[name][0])
        placed.append(((source.expert or 0, start), Part(name, order)))
    return tuple(part for _, part in sorted(placed, key=lambda item: item[0]))


def _rows(source: Source, rows: int) -> tuple[int, np.ndarray | None]:
    """(the first row in the file, the order of rows there)."""
    if source.rows is None:
        return 0, None
    if isinstance(source.rows, slice):
        return source.rows.start or 0, None
    first = int(source.rows.min())
    order = np.argsort(source.rows)
    assert np.array_equal(source.rows[order], np.arange(first, first + rows)), f"{source.stored}: rows apart"
    return first, order
