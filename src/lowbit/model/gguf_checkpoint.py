"""A GGUF file as a checkpoint: canonical names, transformers' row order, blocks as they are."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.arena import Arena
from lowbit.model.config import ModelConfig, from_transformers
from lowbit.model.gguf_config import architecture_of, transformers_config
from lowbit.model.gguf_file import GGUFFile, GGUFTensor
from lowbit.model.gguf_matrix import matrix_from_gguf
from lowbit.model.gguf_names import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS, is_shifted_norm
from lowbit.model.gguf_scales import TensorScales
from lowbit.model.gguf_types import TENSOR_TYPES, TensorType, check_readable, decode
from lowbit.model.sources import Source, sources
from lowbit.model.tokenizer import Tokenizer
from lowbit.packed import PackedMatrix

_EMBEDDING = "token_embd.weight"
_MAX_ROPE_FACTORS = 1 << 11


class GGUFCheckpoint:
    """See checkpoint.Checkpoint. The file stays mapped until `close`; what `read` and `matrix` return does
    not depend on it."""

    kind = "gguf"

    def __init__(self, path: Path):
        self.path = path
        self._file = GGUFFile(path)
        self._arena = Arena()
        try:
            self._architecture = architecture_of(self._file.metadata, str(path))
            self._scales = TensorScales(self._file)
        except BaseException:
            self.close()
            raise

    @cached_property
    def config(self) -> ModelConfig:
        embedding = self._file.tensors.get(_EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(
                f"open {self.path}: {_EMBEDDING} is missing; this file holds no whole model"
            )
        fields = transformers_config(
            self._file.metadata,
            str(self.path),
            vocab_size=embedding.shape[0],
            tensors=self._file.tensors.keys() - self._scales.names,
            vectors=self._rope_factors(),
        )
        return from_transformers(fields, where=str(self.path))

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file says, key by key."""
        return self._file.metadata

    def stored_name(self, name: str) -> str:
        """What the file calls a tensor, or that in which it lies."""
        return self._tensor(name)[0].name

    def names(self) -> list[str]:
        return list(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        tensor, source = self._tensor(name)
        return source.shape(tensor.shape)

    def dtype(self, name: str) -> str:
        return TENSOR_TYPES[self._tensor(name)[0].type].name

    def read(self, name: str) -> np.ndarray:
        tensor, source = self._tensor(name)
        raw, shape, order = self._part(name, tensor, source)
        values = decode(raw, self._type(tensor)).reshape(shape)
        self._file.forget(tensor.name)
        if self._architecture.norm_shift and is_shifted_norm(name):
            values = values - np.float32(self._architecture.norm_shift)
        if (scale := self._scales.of(tensor.name, source.expert)) != 1:
            values = values * np.float32(scale)
        return values if order is None else values[order]

    def matrix(self, name: str) -> PackedMatrix:
        tensor, source = self._tensor(name)
        raw, shape, order = self._part(name, tensor, source)
        if len(shape) != 2:
            raise CheckpointError(
                f"load {self.path}: {name} has shape {list(shape)}; a matrix has two dimensions"
            )
        scale = self._scales.of(tensor.name, source.expert)
        matrix = matrix_from_gguf(raw, self._type(tensor), *shape, order, self._arena, scale)
        self._file.forget(tensor.name)
        return matrix

    def tokenizer(self) -> Tokenizer | None:
        if "tokenizer.ggml.model" not in self._file.metadata:
            return None
        from lowbit.model.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(self._file.metadata, str(self.path))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> GGUFCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @cached_property
    def _sources(self) -> dict[str, Source]:
        weights = [name for name in self._file.tensors if name not in self._scales.names]
        found = sources(self.config, weights, self._architecture.names)
        unknown = [name for name, source in found.items() if name == source.stored]
        if unknown:
            listed = ", ".join(unknown[:5])
            raise UnsupportedError(
                f"open {self.path}: {len(unknown)} tensors have no place in this network: {listed}; lowbit "
                "does not leave weights out silently"
            )
        return found

    def _tensor(self, name: str) -> tuple[GGUFTensor, Source]:
        source = self._sources.get(name)
        if source is None:
            raise CheckpointError(
                f"read {self.path}: no tensor {name!r}; it has {len(self._sources)} tensors"
            )
        return self._file.tensors[source.stored], source

    def _part(
        self, name: str, tensor: GGUFTensor, source: Source
    ) -> tuple[np.ndarray, tuple[int, ...], np.ndarray | None]:
        """(its bytes in the file, its shape, the order in which its rows are read or None).

        Blocks lie within rows, so an expert, or some rows, of a tensor are a piece of its bytes."""
        raw, shape = self._file.data(tensor.name), tensor.shape
        if source.whole:
            return raw, shape, None
        wanted = source.shape(shape)
        rows = int(np.prod(shape[: 2 if source.expert is not None else 1]))
        if not wanted or 0 in wanted or len(wanted) > 2 or not rows or raw.nbytes % rows:
            raise CheckpointError(
                f"read {self.path}: {name} is a part of {tensor.name}, whose shape {list(shape)} has no such "
                "part; it is damaged"
            )
        lines = raw.reshape(rows, -1)
        if source.expert is not None:
            lines = lines.reshape(shape[0], -1, lines.shape[1])[source.expert]
        if isinstance(source.rows, slice):
            return lines[source.rows].reshape(-1), wanted, None
        if source.rows is not None and (len(source.rows) != wanted[0] or source.rows.max() >= len(lines)):
            raise CheckpointError(
                f"read {self.path}: {name} has {len(lines)} rows, not the {len(source.rows)} of its heads; "
                "it is damaged"
            )
        if source.rows is None or len(source.rows) == len(lines):
            return lines.reshape(-1), wanted, source.rows
        first = int(source.rows.min())
        return lines[first : first + wanted[0]].reshape(-1), wanted, source.rows - first

    def _type(self, tensor: GGUFTensor) -> TensorType:
        kind = TENSOR_TYPES[tensor.type]
        check_readable(kind, f"read {self.path}: tensor {tensor.name!r}")
        return kind

    def _rope_factors(self) -> dict[str, np.ndarray]:
        """The vectors by which rotation speeds are divided, by name."""
        found = {}
        for name in (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS):
            tensor = self._file.tensors.get(name)
            if tensor is None:
                continue
            if len(tensor.shape) != 1 or tensor.shape[0] > _MAX_ROPE_FACTORS:
                raise CheckpointError(
                    f"open {self.path}: {name} has shape {list(tensor.shape)}, not [head_dim / 2]"
                )
            found[name] = decode(self._file.data(name), self._type(tensor))
        return found
