"""A directory as transformers writes it: config.json, safetensors in one file or shards, tokenizer.json."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.arena import Arena
from lowbit.model.config import ModelConfig, from_transformers
from lowbit.model.float_weights import float_matrix, widened
from lowbit.model.json_file import read_json
from lowbit.model.tokenizer import Tokenizer, load_tokenizer
from lowbit.packed import PackedMatrix, TensorFile

MAX_SHARDS = 4096
FLOAT_TYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class TransformersCheckpoint:
    """See checkpoint.Checkpoint."""

    kind = "transformers"

    def __init__(self, path: Path):
        self.path = path
        self._fields = read_json(path / "config.json")
        self._where = self._locate()
        self._arena = Arena()

    @cached_property
    def config(self) -> ModelConfig:
        return directory_config(self.path, self._fields)

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self._tensor(name)
        return file.shape(stored)

    def dtype(self, name: str) -> str:
        file, stored = self._tensor(name)
        return file.dtype(stored)

    def read(self, name: str) -> np.ndarray:
        file, stored = self._tensor(name)
        return float_values(file, stored)

    def matrix(self, name: str) -> PackedMatrix:
        file, stored = self._tensor(name)
        shape, kind = file.shape(stored), float_type(file, stored)
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(
                f"load {self.path}: {name} has shape {list(shape)}; a matrix has two dimensions"
            )
        return float_matrix(file.array(stored), kind, arena=self._arena)

    def tokenizer(self) -> Tokenizer | None:
        return directory_tokenizer(self.path, self.config)

    def close(self) -> None:
        self._where = {}

    def __enter__(self) -> TransformersCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _tensor(self, name: str) -> tuple[TensorFile, str]:
        if name not in self._where:
            raise CheckpointError(f"read {self.path}: no tensor {name!r}; it has {len(self._where)} tensors")
        return self._where[name]

    def _locate(self) -> dict[str, tuple[TensorFile, str]]:
        """Canonical name -> (file, name in the file)."""
        if (self.path / _INDEX).is_file():
            stored = self._sharded()
        elif (self.path / _SINGLE).is_file():
            file = TensorFile(self.path / _SINGLE)
            stored = {name: file for name in file.names()}
        else:
            raise CheckpointError(self._no_weights())
        # A bare LlamaModel was saved without the prefix of the model with a head.
        bare = "embed_tokens.weight" in stored
        return {
            f"model.{name}" if bare and name != "lm_head.weight" else name: (file, name)
            for name, file in stored.items()
        }

    def _sharded(self) -> dict[str, TensorFile]:
        path = self.path / _INDEX
        places = read_json(path).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise CheckpointError(f"open {path}: weight_map is missing or empty; fetch the file again")
        names: set[Any] = set()
        for tensor, name in places.items():
            if not _is_plain_name(name):
                raise CheckpointError(
                    f"open {path}: tensor {tensor!r} lies in {str(name)[:100]!r}, not the plain name of a "
                    ".safetensors file beside the index; the index is damaged or hostile"
                )
            names.add(name)
        if len(names) > MAX_SHARDS:
            raise CheckpointError(
                f"open {path}: {len(names)} shards, {MAX_SHARDS} are allowed; the index is damaged"
            )
        missing = sorted(name for name in names if not (self.path / name).is_file())
        if missing:
            raise CheckpointError(
                f"open {self.path}: {len(missing)} of {len(names)} shards are missing: "
                f"{', '.join(missing[:3])}; fetch them"
            )
        shards = {name: TensorFile(self.path / name) for name in sorted(names)}
        holds = {name: set(shard.names()) for name, shard in shards.items()}
        for tensor, name in places.items():
            if tensor not in holds[name]:
                raise CheckpointError(
                    f"open {path}: {name} does not hold {tensor!r}; index and shards differ"
                )
        listed = set(places)
        unlisted = sorted(tensor for held in holds.values() for tensor in held if tensor not in listed)
        if unlisted:
            raise CheckpointError(
                f"open {path}: the shards hold {len(unlisted)} tensors that the index does not list: "
                f"{', '.join(unlisted[:3])}; index and shards differ"
            )
        return {tensor: shards[name] for tensor, name in places.items()}

    def _no_weights(self) -> str:
        pickles = sorted(file.name for pattern in _PICKLES for file in self.path.glob(pattern))
        if pickles:
            return (
                f"open {self.path}: the weights are pickled ({', '.join(pickles[:3])}), and a pickle may "
                "run code when opened; convert them with transformers: "
                "AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)"
            )
        return f"open {self.path}: neither {_SINGLE} nor {_INDEX} is there; the directory is incomplete"


def directory_config(path: Path, fields: dict[str, Any]) -> ModelConfig:
    """The description in config.json and generation_config.json."""
    generation = read_json(path / "generation_config.json", missing={})
    return from_transformers(fields, generation, where=str(path / "config.json"))


def directory_tokenizer(path: Path, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer beside the weights; None where there is no file of one."""
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return load_tokenizer(path, config.eos_ids, config.bos_ids[0] if config.bos_ids else None)


def float_type(file: TensorFile, name: str) -> str:
    """ "fp32" | "fp16" | "bf16"; UnsupportedError for any other type."""
    kind = FLOAT_TYPES.get(file.dtype(name))
    if kind is None:
        raise UnsupportedError(
            f"read {file.path}: tensor {name!r} has type {file.dtype(name)}; lowbit reads "
            f"{', '.join(FLOAT_TYPES)}"
        )
    return kind


def float_values(file: TensorFile, name: str) -> np.ndarray:
    """A tensor as a fresh float32 array."""
    return widened(file.array(name), float_type(file, name))


def _is_plain_name(name: Any) -> bool:
    """A .safetensors file in the directory itself: no path leads elsewhere."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not any(character in name for character in "/\\:\0")
        and not name.startswith(".")
    )
