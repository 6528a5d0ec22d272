"""The arrays that together store one matrix, each checked for its type and shape before it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lowbit.errors import CheckpointError
from lowbit.model.float_weights import widened

if TYPE_CHECKING:
    from lowbit.packed import TensorFile

FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
MAX_WEIGHTS = 1 << 36  # of one matrix


class Arrays:
    """The arrays `STEM.part` of a checkpoint; `part` is "qweight", "weight.absmax" or the like. A part that
    begins with "_" follows the stem at once."""

    def __init__(self, files: Mapping[str, TensorFile], stem: str):
        self.stem = stem
        self._files = files

    def name(self, part: str) -> str:
        return self.stem + part if part.startswith("_") else f"{self.stem}.{part}"

    def has(self, part: str) -> bool:
        return self.name(part) in self._files

    def dtype(self, part: str) -> str | None:
        """As safetensors names it; None where there is no such array."""
        name = self.name(part)
        return self._files[name].dtype(name) if name in self._files else None

    def shape(self, part: str) -> tuple[int, ...]:
        name = self.name(part)
        if name not in self._files:
            raise CheckpointError(
                f"load {self.stem}: array {part!r} is missing; the checkpoint is incomplete"
            )
        return self._files[name].shape(name)

    def take(self, part: str, types: tuple[str, ...], shape: tuple[int | None, ...]) -> np.ndarray:
        """The array, of one of these types and this shape (None: any size of at least 1); a view."""
        found = self.shape(part)
        name = self.name(part)
        dtype = self._files[name].dtype(name)
        fits = len(found) == len(shape) and all(
            size >= 1 if wanted is None else size == wanted for size, wanted in zip(found, shape)
        )
        if dtype not in types or not fits:
            wanted_shape = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(
                f"load {self.stem}: {part} is {dtype} {list(found)}; this matrix needs {' or '.join(types)} "
                f"[{wanted_shape}]; config and weights disagree, or the file is damaged"
            )
        return self._files[name].array(name)

    def floats(self, part: str, shape: tuple[int | None, ...]) -> np.ndarray:
        """An array of F32, F16 or BF16 numbers as float32, all finite."""
        values = widened(self.take(part, tuple(FLOATS), shape), FLOATS[str(self.dtype(part))])
        if not np.isfinite(values).all():
            raise self.damaged(f"{part} holds numbers that are not finite")
        return values

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"load {self.stem}: {what}; the checkpoint is damaged")

    def check_size(self, out_features: int, in_features: int) -> None:
        """Raise for shapes that only a hostile file has."""
        if not (out_features > 0 and in_features > 0 and out_features * in_features <= MAX_WEIGHTS):
            raise self.damaged(f"its shape would be {out_features} x {in_features}")
