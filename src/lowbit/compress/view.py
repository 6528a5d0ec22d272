"""A view: a checkpoint whose tensors are computed from those of another when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lowbit.model.float_weights import float_matrix
from lowbit.model.tensors import EMBEDDING, HEAD

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint
    from lowbit.model.config import ModelConfig
    from lowbit.model.tokenizer import Tokenizer
    from lowbit.packed import PackedMatrix


class View:
    """See checkpoint.Checkpoint. A subclass gives `read`; with an untied config it has a head of its own."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig):
        self._source = checkpoint
        self.path, self.kind, self.config = checkpoint.path, checkpoint.kind, config

    def names(self) -> list[str]:
        names = self._source.names()
        return [*names, HEAD] if not self.config.tied and HEAD not in names else names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._stored(name))

    def dtype(self, name: str) -> str:
        return "F32"

    def read(self, name: str) -> np.ndarray:
        raise AssertionError("a view says how its tensors are read")

    def matrix(self, name: str) -> PackedMatrix:
        return float_matrix(self.read(name), "fp32")

    def tokenizer(self) -> Tokenizer | None:
        return self._source.tokenizer()

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> View:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _stored(self, name: str) -> str:
        """Where the source has it: a head of one's own may be made of a tied embedding."""
        return EMBEDDING if name == HEAD and self._source.config.tied else name


def split(name: str) -> tuple[str, str]:
    """("model.layers.3.", "mlp.up_proj.weight"); ("", name) of tensors outside the layers."""
    if not name.startswith("model.layers."):
        return "", name
    part = name.split(".", 3)[3]
    return name.removesuffix(part), part
