"""Files of llama2.c, and of its ternary relative bitllama2.c, with a tokenizer.bin beside them.

bitllama2.c norms the input of every matrix, without weights, to a mean square of 1 / n^2: that is the bitnet
family with constant norms of 1 / n. It adds nothing to the mean square, for which 1e-12 stands here.
Rotations pair neighbours there and halves of a head here: rows of queries and keys change places.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError
from lowbit.model.arena import Arena
from lowbit.model.config import ModelConfig, from_transformers
from lowbit.model.float_weights import float_matrix
from lowbit.model.llama2c_file import HEADER, MAGIC, Layout, Place, read_layout
from lowbit.model.llama2c_tokenizer import find_tokenizer
from lowbit.model.sources import unpermuted_rows
from lowbit.model.stored.grouping import UNIT, Grouping, grouping
from lowbit.model.stored.packing import code_matrix
from lowbit.model.tokenizer import Tokenizer
from lowbit.packed import PackedMatrix

# bitllama2.c: norms that the file does not hold -> how many numbers they norm
_CONSTANT_NORMS = {
    "input_layernorm": "dim",
    "self_attn.attn_sub_norm": "dim",
    "post_attention_layernorm": "dim",
    "mlp.ffn_sub_norm": "hidden",
}


def is_llama2c(head: bytes, file_size: int) -> bool:
    """Do these first bytes look like a llama2.c file? Of version 0, which has no magic, the size decides."""
    if len(head) >= 4 and int.from_bytes(head[:4], "little") == MAGIC:
        return True
    try:
        read_layout(head, file_size, "")
    except CheckpointError:
        return False
    return True


class Llama2cCheckpoint:
    """See checkpoint.Checkpoint."""

    kind = "llama2c"

    def __init__(self, path: Path):
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                head = file.read(HEADER)
            self._layout: Layout = read_layout(head, size, str(path))
            self._data: np.ndarray = np.memmap(path, np.uint8, "r").view(np.ndarray)
        except OSError as error:
            raise CheckpointError(f"open {path}: {error.strerror or error}; check the path") from error
        self._arena = Arena()
        self._constant = self._constant_norms()

    @cached_property
    def config(self) -> ModelConfig:
        sizes, ternary = self._layout.sizes, self._layout.kind == "ternary"
        fields: dict[str, Any] = {
            "model_type": "bitnet" if ternary else "llama",
            "hidden_act": "silu",
            "hidden_size": sizes.dim,
            "intermediate_size": sizes.hidden,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "vocab_size": sizes.vocabulary,
            "max_position_embeddings": sizes.positions,
            "rms_norm_eps": 1e-12 if ternary else 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self._layout.tied,
        }
        if sizes.vocabulary > 2:
            fields |= {"bos_token_id": 1, "eos_token_id": [1, 2]}  # a new text begins where one ends
        return from_transformers(fields, where=str(self.path))

    def names(self) -> list[str]:
        return [*self._layout.places, *self._constant]

    def shape(self, name: str) -> tuple[int, ...]:
        return (len(self._constant[name]),) if name in self._constant else self._place(name).shape

    def dtype(self, name: str) -> str:
        if name in self._constant:
            return "F32"
        place = self._place(name)
        return f"Q8_0-g{self._layout.group}" if place.kind == "Q8_0" else place.kind

    def read(self, name: str) -> np.ndarray:
        if name in self._constant:
            return self._constant[name].copy()
        if len(self._place(name).shape) == 1:
            return self._floats(self._place(name)).astype(np.float32)
        return self.matrix(name).dequantize()

    def matrix(self, name: str) -> PackedMatrix:
        place = self._place(name)
        if len(place.shape) != 2:
            raise CheckpointError(
                f"load {self.path}: {name} has shape {list(place.shape)}; a matrix has two dimensions"
            )
        order = self._row_order(name, place.shape[0])
        if place.kind == "F32":
            return float_matrix(self._floats(place), "fp32", order, self._arena)
        if place.kind == "ternary":
            return self._ternary(name, place, order)
        return self._grouped(place, order)

    def tokenizer(self) -> Tokenizer | None:
        return find_tokenizer(self.path, self._layout.sizes.vocabulary)

    def close(self) -> None:
        """Nothing to release: the arrays given out keep the mapping."""

    def __enter__(self) -> Llama2cCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _constant_norms(self) -> dict[str, np.ndarray]:
        sizes = self._layout.sizes
        if self._layout.kind != "ternary":
            return {}
        return {
            f"model.layers.{layer}.{name}.weight": np.full(sizes.of(size), 1 / sizes.of(size), np.float32)
            for layer in range(sizes.layers)
            for name, size in _CONSTANT_NORMS.items()
        }

    def _place(self, name: str) -> Place:
        place = self._layout.places.get(name)
        if place is None:
            raise CheckpointError(f"read {self.path}: no tensor {name!r}; it has {len(self.names())} tensors")
        return place

    def _floats(self, place: Place) -> np.ndarray:
        count = math.prod(place.shape)
        return self._data[place.offset : place.offset + 4 * count].view("<f4").reshape(place.shape)

    def _row_order(self, name: str, rows: int) -> np.ndarray | None:
        sizes = self._layout.sizes
        heads = {"q_proj": sizes.heads, "k_proj": sizes.kv_heads}.get(name.split(".")[-2])
        return None if heads is None else unpermuted_rows(rows, heads)

    def _ternary(self, name: str, place: Place, order: np.ndarray | None) -> PackedMatrix:
        count = math.prod(place.shape)
        scale = self._data[place.offset : place.offset + 4].view("<f4")
        packed = self._data[place.offset + 4 : place.offset + 4 + count // 4]
        stored = packed[:, None] >> np.array([6, 4, 2, 0], np.uint8) & np.uint8(3)
        if (stored == 2).any():
            raise CheckpointError(
                f"load {self.path}: {name} holds a code of 2, which no weight has; it is damaged"
            )
        codes = np.array([1, 2, 0, 0], np.uint8)[stored].reshape(place.shape)
        codes = codes if order is None else codes[order]
        levels = np.array([-1, 0, 1], np.float32)
        return code_matrix(codes, 2, levels, scale.reshape(1, 1), Grouping(0), "ternary-row", base3=True)

    def _grouped(self, place: Place, order: np.ndarray | None) -> PackedMatrix:
        """Groups run on from row to row: where they do not fit into rows, the weights become float32."""
        rows, columns = place.shape
        count, group = rows * columns, self._layout.group
        codes = self._data[place.offset : place.offset + count].view(np.int8).reshape(place.shape)
        scales = self._data[place.offset + count : place.offset + count + 4 * (count // group)].view("<f4")
        piece = math.gcd(columns, group)
        if count % group or piece % UNIT:
            wide = codes.reshape(-1)[: len(scales) * group].reshape(-1, group) * scales[:, None]
            return float_matrix(wide.reshape(place.shape), "fp32", order, self._arena)
        grouped = scales[np.arange(0, count, piece) // group].reshape(rows, columns // piece)
        unsigned = codes.view(np.uint8) ^ np.uint8(128)
        if order is not None:
            unsigned, grouped = unsigned[order], grouped[order]
        levels = np.arange(-128, 128, dtype=np.float32)
        return code_matrix(unsigned, 8, levels, grouped, grouping(columns, piece), f"int8-g{piece}")
