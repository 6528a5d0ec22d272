"""A GGUF file as a checkpoint: canonical names, transformers' row order, blocks as they are."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.arena import Arena
from lowbit.model.config import ModelConfig, from_transformers
from lowbit.model.gguf_config import (
    ROPE_FACTORS,
    architecture_of,
    canonical_name,
    transformers_config,
    unpermuted_rows,
)
from lowbit.model.gguf_file import GGUFFile, GGUFTensor
from lowbit.model.gguf_matrix import matrix_from_gguf
from lowbit.model.gguf_types import TENSOR_TYPES, TensorType, check_readable, decode
from lowbit.model.tokenizer import Tokenizer
from lowbit.packed import PackedMatrix

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
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
            self._permuted = architecture_of(self._file.metadata, str(path)).permuted
            self._tensors = self._canonical_tensors()
        except BaseException:
            self.close()
            raise

    @cached_property
    def config(self) -> ModelConfig:
        embedding = self._tensors.get(EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(
                f"open {self.path}: token_embd.weight is missing; this file holds no whole model"
            )
        fields = transformers_config(
            self._file.metadata,
            str(self.path),
            vocab_size=embedding.shape[0],
            tied=HEAD not in self._tensors,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in self._tensors,
            mlp_bias="model.layers.0.mlp.gate_proj.bias" in self._tensors,
            rope_factors=self._rope_factors(),
        )
        return from_transformers(fields, where=str(self.path))

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        return TENSOR_TYPES[self._tensor(name).type].name

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensor(name)
        values = decode(self._file.data(tensor.name), self._type(tensor)).reshape(tensor.shape)
        self._file.forget(tensor.name)
        order = self._row_order(name, tensor)
        return values if order is None else values[order]

    def matrix(self, name: str) -> PackedMatrix:
        tensor = self._tensor(name)
        if len(tensor.shape) != 2:
            raise CheckpointError(
                f"load {self.path}: {name} has shape {list(tensor.shape)}; a matrix has two dimensions"
            )
        rows, columns = tensor.shape
        raw, order = self._file.data(tensor.name), self._row_order(name, tensor)
        matrix = matrix_from_gguf(raw, self._type(tensor), rows, columns, order, self._arena)
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

    def _canonical_tensors(self) -> dict[str, GGUFTensor]:
        tensors: dict[str, GGUFTensor] = {}
        unknown = []
        for name, tensor in self._file.tensors.items():
            canonical = canonical_name(name)
            if canonical is not None:
                tensors[canonical] = tensor
            elif name != ROPE_FACTORS:
                unknown.append(name)
        if unknown:
            listed = ", ".join(unknown[:5])
            raise UnsupportedError(
                f"open {self.path}: {len(unknown)} tensors have no place in this network: {listed}; lowbit "
                "does not leave weights out silently"
            )
        return tensors

    def _tensor(self, name: str) -> GGUFTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(
                f"read {self.path}: no tensor {name!r}; it has {len(self._tensors)} tensors"
            )
        return tensor

    def _type(self, tensor: GGUFTensor) -> TensorType:
        kind = TENSOR_TYPES[tensor.type]
        check_readable(kind, f"read {self.path}: tensor {tensor.name!r}")
        return kind

    def _rope_factors(self) -> np.ndarray | None:
        tensor = self._file.tensors.get(ROPE_FACTORS)
        if tensor is None:
            return None
        if len(tensor.shape) != 1 or tensor.shape[0] > _MAX_ROPE_FACTORS:
            raise CheckpointError(
                f"open {self.path}: {ROPE_FACTORS} has shape {list(tensor.shape)}, not [head_dim / 2]"
            )
        return decode(self._file.data(ROPE_FACTORS), self._type(tensor))

    def _row_order(self, name: str, tensor: GGUFTensor) -> np.ndarray | None:
        """How to read the rows of a query or key projection, None for every other tensor."""
        if not self._permuted:
            return None
        stem = name.rpartition(".")[0]
        if stem.endswith("self_attn.q_proj"):
            heads = self.config.n_heads
        elif stem.endswith("self_attn.k_proj"):
            heads = self.config.n_kv_heads
        else:
            return None
        rows = tensor.shape[0]
        if rows % (2 * heads):
            raise CheckpointError(
                f"read {self.path}: {name} has {rows} rows, not a multiple of 2 x {heads}; it is damaged"
            )
        return unpermuted_rows(rows, heads)
