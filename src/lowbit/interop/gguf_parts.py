"""The tensors of a GGUF file, and of which matrices each is put together.

llama.cpp's files fuse some matrices, stack experts and order the rows of queries and keys in their own way;
model/gguf_names.py says how, model/sources.py inverts it. Here each stored tensor becomes a list of parts in
the order of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lowbit.model.checkpoint import Checkpoint
from lowbit.model.config import ModelConfig
from lowbit.model.gguf_names import Architecture, is_shifted_norm
from lowbit.model.sources import Source, Stored, stored_tensors
from lowbit.packed import PackedMatrix

# Two-dimensional, but read as float32 by llama.cpp whatever the file's type.
_FLOAT32 = ("mlp.router.weight", "embed_positions.weight")


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
    """A tensor of the file. quantized: it may take the wanted type; else it is float32."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    quantized: bool


def planned_tensors(
    config: ModelConfig, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]
) -> list[Planned]:
    """Every tensor of the file. shapes: of the canonical tensors."""
    planned = []
    for name, stored in stored_tensors(config, shapes, architecture.names).items():
        matrices = all(len(shapes[part]) == 2 for part in stored.parts)
        float32 = any(part.endswith(_FLOAT32) for part in stored.parts)
        planned.append(Planned(name, stored.shape, _parts(stored, shapes), matrices and not float32))
    return planned


def float_values(planned: Planned, checkpoint: Checkpoint, architecture: Architecture) -> np.ndarray:
    """The float32 array of a tensor that is not quantized."""
    values = []
    for part in planned.parts:
        array = np.ascontiguousarray(checkpoint.read(part.name), np.float32)
        if architecture.norm_shift and is_shifted_norm(part.name):
            array = array + np.float32(architecture.norm_shift)
        values.append(array if part.order is None else array[part.order])
    return np.concatenate(values).reshape(planned.shape)


def _parts(stored: Stored, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Part, ...]:
    """The parts in the order of rows, experts first."""
    placed = []
    for name, source in stored.parts.items():
        start, order = _rows(source, shapes[name][0])
        placed.append(((source.expert or 0, start), Part(name, order)))
    return tuple(part for _, part in sorted(placed, key=lambda item: item[0]))


def _rows(source: Source, rows: int) -> tuple[int, np.ndarray | None]:
    """(the first row in the file, the order of rows there)."""
    assert not source.transposed, f"{source.stored}: GGUF has no transposed tensors"
    if source.rows is None:
        return 0, None
    if isinstance(source.rows, slice):
        return source.rows.start or 0, None
    first = int(source.rows.min())
    order = np.argsort(source.rows)
    assert np.array_equal(source.rows[order], np.arange(first, first + rows)), f"{source.stored}: rows apart"
    return first, order
