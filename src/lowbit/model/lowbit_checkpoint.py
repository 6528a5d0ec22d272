"""A directory that lowbit wrote: packed matrices in kernel order, mapped into memory as they are.

lowbit.json describes each packed tensor; model.safetensors holds its arrays as `NAME.TERM.FIELD`, and norms
and biases as plain float32 `NAME`. docs/formats.md is normative.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError, FormatError, UnsupportedError
from lowbit.formats.activations import ACTIVATIONS, KV_BITS
from lowbit.model.config import ModelConfig
from lowbit.model.json_file import read_json
from lowbit.model.tokenizer import Tokenizer
from lowbit.model.transformers_checkpoint import directory_config, directory_tokenizer, float_values
from lowbit.packed import PackedMatrix, TensorFile

VERSION = 1
# Of the safetensors file. transformers 4 refuses files that do not name one of four frameworks here.
FILE_METADATA = {"format": "pt"}


class LowbitCheckpoint:
    """See checkpoint.Checkpoint. `details` is lowbit.json: source, scheme and method of the quantization."""

    kind = "lowbit"

    def __init__(self, path: Path):
        self.path = path
        self.details = read_json(path / "lowbit.json")
        if self.details.get("format") != "lowbit":
            raise CheckpointError(
                f"open {path / 'lowbit.json'}: format is {str(self.details.get('format'))[:60]!r}, not lowbit"
            )
        version = self.details.get("version")
        if version != VERSION or isinstance(version, bool):
            raise UnsupportedError(
                f"open {path}: written in version {str(version)[:60]} of the format, this program reads "
                f"{VERSION}; quantize again or update lowbit"
            )
        metas = self.details.get("tensors")
        if not isinstance(metas, dict) or not all(isinstance(meta, Mapping) for meta in metas.values()):
            raise CheckpointError(
                f"open {path / 'lowbit.json'}: tensors is not an object of objects; it is damaged"
            )
        self._metas: dict[str, Mapping[str, Any]] = metas
        self._file = TensorFile(path / "model.safetensors")
        self._arrays, self._plain = self._sort()

    def numbers(self) -> tuple[str, int] | None:
        """(activations, KV bits) of the scheme that it was made with; None where it does not say."""
        scheme = self.details.get("scheme")
        if scheme is None:
            return None
        fields = scheme if isinstance(scheme, Mapping) else {}
        activations, kv_bits = fields.get("activations"), fields.get("kv_bits")
        if activations not in ACTIVATIONS or kv_bits not in KV_BITS:
            raise CheckpointError(
                f"open {self.path / 'lowbit.json'}: the scheme has activations={activations!r:.40} and "
                f"kv_bits={kv_bits!r:.40}; known are {', '.join(ACTIVATIONS)} and 2, 4, 8, 16; it is damaged"
            )
        return activations, kv_bits

    @cached_property
    def config(self) -> ModelConfig:
        return directory_config(self.path, read_json(self.path / "config.json"))

    def names(self) -> list[str]:
        return [*self._metas, *self._plain]

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._metas:
            return self._file.shape(self._checked(name))
        # A mixture has thousands: none is made for its shape, which `matrix` holds against its arrays.
        stated = self._metas[name].get("shape")
        if isinstance(stated, list) and len(stated) == 2 and all(type(n) is int and n > 0 for n in stated):
            return stated[0], stated[1]
        return self.matrix(name).shape

    def dtype(self, name: str) -> str:
        if name in self._metas:
            return str(self._metas[name].get("format") or "packed")
        return self._file.dtype(self._checked(name))

    def read(self, name: str) -> np.ndarray:
        if name in self._metas:
            return self.matrix(name).dequantize()
        return float_values(self._file, self._checked(name))

    def matrix(self, name: str) -> PackedMatrix:
        if name not in self._metas:
            raise CheckpointError(
                f"load {self.path}: {self._checked(name)!r} is stored as a plain tensor, not a matrix"
            )
        arrays = {entry: self._file.array(f"{name}.{entry}") for entry in self._arrays[name]}
        try:
            return PackedMatrix.from_state(self._metas[name], arrays)
        except (CheckpointError, FormatError, OverflowError) as error:
            raise CheckpointError(f"load {self.path}: tensor {name!r}: {error}") from error

    def tokenizer(self) -> Tokenizer | None:
        return directory_tokenizer(self.path, self.config)

    def close(self) -> None:
        """Nothing to release: the arrays given out keep the mapping."""

    def __enter__(self) -> LowbitCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _checked(self, name: str) -> str:
        if name not in self._plain:
            raise CheckpointError(f"read {self.path}: no tensor {name!r}; it has {len(self.names())} tensors")
        return name

    def _sort(self) -> tuple[dict[str, list[str]], list[str]]:
        """Which stored arrays belong to which packed tensor ("TERM.FIELD"), and the plain tensors."""
        arrays: dict[str, list[str]] = {name: [] for name in self._metas}
        plain = []
        for stored in self._file.names():
            name, term, field = (["", *stored.rsplit(".", 2)])[-3:]
            if name in arrays and term.isdigit():
                arrays[name].append(f"{term}.{field}")
            else:
                plain.append(stored)
        both = [name for name in plain if name in arrays]
        if both:
            raise CheckpointError(
                f"open {self.path}: {both[0]!r} is stored both packed and plain; it is damaged"
            )
        return arrays, plain
