"""A directory as transformers writes it: config.json, safetensors in one file or shards, tokenizer.json."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.arena import Arena
from lowbit.model.config import ModelConfig, from_transformers
from lowbit.model.float_weights import float_matrix, widened
from lowbit.model.json_file import read_json
from lowbit.model.sources import Source, sources
from lowbit.model.stored.tensors import StoredTensors
from lowbit.model.tensors import expected_tensors
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
        self._fields = {**quantization_beside(path), **read_json(path / "config.json")}
        self._files = self._locate()
        self._stored = StoredTensors(self._files, self._fields, str(path / "config.json"))
        self._arena = Arena()

    @cached_property
    def config(self) -> ModelConfig:
        return directory_config(self.path, self._fields)

    def names(self) -> list[str]:
        return list(self._sources)

    def notes(self) -> list[str]:
        """What of a quantized checkpoint runs in another way here than where it was made."""
        return self._stored.notes()

    def shape(self, name: str) -> tuple[int, ...]:
        source = self._source(name)
        if self._stored.packed(source.stored):  # quantizers store all matrices [out, in]
            return replace(source, transposed=False).shape(self._stored.shape(source.stored))
        return source.shape(self._files[source.stored].shape(source.stored))

    def dtype(self, name: str) -> str:
        return self._stored.dtype(self._source(name).stored)

    def read(self, name: str) -> np.ndarray:
        source = self._source(name)
        if self._stored.packed(source.stored):
            return self._stored.matrix(source).dequantize()
        file = self._files[source.stored]
        kind = float_type(file, source.stored)
        return widened(self._part(file, source, name), kind)

    def matrix(self, name: str) -> PackedMatrix:
        source = self._source(name)
        if self._stored.packed(source.stored):
            return self._stored.matrix(source)
        file = self._files[source.stored]
        kind, part = float_type(file, source.stored), self._part(file, source, name)
        if part.ndim != 2 or 0 in part.shape:
            raise CheckpointError(
                f"load {self.path}: {name} has shape {list(part.shape)}; a matrix has two dimensions"
            )
        return float_matrix(part, kind, arena=self._arena)

    def tokenizer(self) -> Tokenizer | None:
        return directory_tokenizer(self.path, self.config)

    def close(self) -> None:
        self._files = {}
        self.__dict__.pop("_sources", None)

    def __enter__(self) -> TransformersCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @cached_property
    def _sources(self) -> dict[str, Source]:
        found = sources(self.config, self._stored.names())
        wanted = {tensor.name for tensor in expected_tensors(self.config)}
        return {
            name: source
            for name, source in found.items()
            if name in wanted or not self._stored.zeros(source.stored)
        }

    def _source(self, name: str) -> Source:
        source = self._sources.get(name)
        if source is None:
            raise CheckpointError(
                f"read {self.path}: no tensor {name!r}; it has {len(self._sources)} tensors"
            )
        return source

    def _part(self, file: TensorFile, source: Source, name: str) -> np.ndarray:
        """The stored bits of a tensor, a view where that is possible."""
        try:
            return source.view(file.array(source.stored))
        except IndexError as error:
            raise CheckpointError(
                f"read {self.path}: {name} is a part of {source.stored!r}, whose shape is "
                f"{list(file.shape(source.stored))}: {error}; config and weights belong to different models"
            ) from error

    def _locate(self) -> dict[str, TensorFile]:
        """Stored name -> the file that holds it."""
        if (self.path / _INDEX).is_file():
            return self._sharded()
        if (self.path / _SINGLE).is_file():
            file = TensorFile(self.path / _SINGLE)
            return dict.fromkeys(file.names(), file)
        raise CheckpointError(self._no_weights())

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


def quantization_beside(path: Path) -> dict[str, Any]:
    """The quantization_config that first versions of AutoGPTQ and AutoAWQ kept in a file of its own."""
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (path / name).is_file():
            return {"quantization_config": {"quant_method": method, **read_json(path / name)}}
    return {}


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
