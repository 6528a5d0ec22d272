"""Read the structure of a GGUF file: metadata and the table of tensors, every number checked before use.

A GGUF file of version 2 or 3 is little endian:

    "GGUF"  version u32  tensor_count u64  pair_count u64
    pair_count   x {key string, type u32, value}
    tensor_count x {name string, n_dims u32, dims u64[n_dims] (fastest first), type u32, offset u64}
    zero padding to a multiple of `general.alignment` (default 32), then the tensor data

A string is a u64 length and that many UTF-8 bytes; an array is {type u32, count u64, values}. A large model
may be split in files NAME-00001-of-00003.gguf and so on; the first holds the metadata.
Source: the GGUF specification, docs/gguf.md of the ggml project, and its gguf-split for the parts.

The files are memory-mapped, so opening costs only the metadata.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.gguf_cursor import MAX_KEY_BYTES, Cursor
from lowbit.model.gguf_types import TENSOR_TYPES, tensor_type

MAX_DIMENSIONS = 4  # of a tensor, by the specification
MAX_ALIGNMENT = 1 << 20
MIN_PAIR_BYTES = 8 + 4 + 1
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies: `shape` is slowest first ([out_features, in_features]), `start` counts from the
    beginning of file number `part`, `type` is the number of its block type. nbytes is 0 where the type is
    unknown."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    nbytes: int
    part: int = 0


class GGUFFile:
    """A checked, memory-mapped GGUF file, or all files of a split one, whichever of them `path` names.

    metadata: dict of key -> bool, int, float, str, list of str, NumPy array of numbers, or list of arrays.
    tensors: dict of name -> GGUFTensor, in file order.
    unknown_types: take tensors of types that lowbit does not know into the table instead of refusing them;
        they have no data.
    Raises CheckpointError for a damaged or hostile file and UnsupportedError for a version, byte order
    or tensor type that lowbit cannot read.
    """

    def __init__(self, path: str | os.PathLike, unknown_types: bool = False):
        self.path = Path(path)
        self._parts = [_Part(self.path, unknown_types)]
        try:
            if int_or(self._parts[0].metadata.get("split.count"), 1) > 1:
                self._parts = _all_parts(self._parts[0], unknown_types)
            self.metadata = self._parts[0].metadata
            self.tensors: dict[str, GGUFTensor] = {}
            for number, part in enumerate(self._parts):
                for name, tensor in part.tensors.items():
                    if name in self.tensors:
                        raise CheckpointError(
                            f"open {part.path}: tensor {name!r} is in another part, too; names must be unique"
                        )
                    self.tensors[name] = replace(tensor, part=number)
            self._check_split()
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> list[Path]:
        """The files, in order."""
        return [part.path for part in self._parts]

    def data(self, name: str) -> np.ndarray:
        """The bytes of tensor `name` as they lie in the file: a read-only uint8 view of the mapping."""
        tensor = self.tensors[name]
        return np.frombuffer(self._parts[tensor.part].map, np.uint8, tensor.nbytes, tensor.start)

    def forget(self, name: str) -> None:
        """Let the pages of tensor `name` go from this process; they come back from the file when read again.

        Pages of a mapped file count as memory of the process for as long as they are mapped, so a model
        that is converted tensor by tensor would otherwise be counted twice."""
        tensor = self.tensors[name]
        first = -(-tensor.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._parts[tensor.part].map.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Release the mappings; views given out by `data` keep them alive until they go."""
        for part in self._parts:
            part.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _check_split(self) -> None:
        told = int_or(self.metadata.get("split.tensors.count"), len(self.tensors))
        if len(self._parts) > 1 and told != len(self.tensors):
            raise CheckpointError(
                f"open {self.path}: the {len(self._parts)} parts hold {len(self.tensors)} tensors, "
                f"split.tensors.count says {told}; parts of different models are mixed: fetch them again"
            )


def _all_parts(found: _Part, unknown_types: bool) -> list[_Part]:
    """Every part of a split file of which one is open; that one is closed and opened again in its place."""
    count, path = int_or(found.metadata.get("split.count"), 0), found.path
    found.close()
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise UnsupportedError(
            f"open {path}: this is one of {count} parts of a split GGUF, and by its name the others cannot "
            f"be found: call them NAME-00001-of-{count:05}.gguf and so on, or join them with "
            "`llama-gguf-split --merge`"
        )
    paths = [path.with_name(f"{match[1]}-{number + 1:05}-of-{count:05}.gguf") for number in range(count)]
    missing = next((part for part in paths if not part.is_file()), None)
    if missing is not None:
        raise CheckpointError(
            f"open {path}: this is one of {count} parts of a split GGUF, and {missing.name} is not beside "
            "it: fetch it"
        )
    parts: list[_Part] = []
    try:
        for number, part in enumerate(paths):
            parts.append(_Part(part, unknown_types))
            said = [int_or(parts[-1].metadata.get(key), -1) for key in ("split.no", "split.count")]
            if said != [number, count]:
                raise CheckpointError(
                    f"open {part}: it says that it is part {said[0] + 1} of {said[1]}, its name says "
                    f"{number + 1} of {count}: fetch it again"
                )
    except BaseException:
        for opened in parts:
            opened.close()
        raise
    return parts


class _Part:
    """One file: its mapping, metadata and tensors."""

    def __init__(self, path: Path, unknown_types: bool):
        self.path = path
        self.unknown_types = unknown_types
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 24:
                    raise CheckpointError(
                        f"open {self.path}: {size} bytes, less than the 24 of a GGUF header; fetch it again"
                    )
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"open {self.path}: {error.strerror or error}; check the path") from error
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._parse(Cursor(self.map, self.path))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # a view is in use: the last one to go frees the mapping
            self.map.close()

    def _parse(self, cursor: Cursor) -> None:
        n_tensors, n_pairs = self._header(cursor)
        for _ in range(n_pairs):
            key = cursor.string("a metadata key", MAX_KEY_BYTES)
            if not key or key in self.metadata:
                cursor.fail(
                    f"metadata key {key[:80]!r} is {'repeated' if key else 'empty'}; keys must be unique"
                )
            self.metadata[key] = cursor.value(cursor.u32(f"the type of {key!r}"), key, 0)
        raw = [self._tensor_entry(cursor) for _ in range(n_tensors)]
        self._place(raw, cursor)

    def _header(self, cursor: Cursor) -> tuple[int, int]:
        """Check magic and version, and hold both counts against the size of the file."""
        magic = cursor.take(4, "the magic")
        if magic != b"GGUF":
            cursor.fail(f"it begins with {magic!r}, not b'GGUF'; this is no GGUF file")
        version = cursor.u32("the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = f"big-endian (version {swapped})" if swapped in (2, 3) else f"version {version}"
            raise UnsupportedError(
                f"open {self.path}: GGUF {what}; supported are little-endian versions 2 and 3: convert it"
            )
        n_tensors, n_pairs = cursor.u64("the tensor count"), cursor.u64("the metadata count")
        cursor.reserve(n_pairs, MIN_PAIR_BYTES, "metadata pairs")
        cursor.reserve(n_tensors, MIN_TENSOR_BYTES, "tensors")
        return n_tensors, n_pairs

    def _tensor_entry(self, cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string("a tensor name", MAX_KEY_BYTES)
        n_dims = cursor.u32(f"the dimensions of tensor {name!r}")
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            cursor.fail(f"tensor {name!r} has {n_dims} dimensions, 1 to {MAX_DIMENSIONS} are allowed")
        dims = tuple(cursor.u64(f"the shape of tensor {name!r}") for _ in range(n_dims))
        return name, dims[::-1], cursor.u32(f"the type of {name!r}"), cursor.u64(f"the offset of {name!r}")

    def _place(self, raw: list[tuple[str, tuple[int, ...], int, int]], cursor: Cursor) -> None:
        """Turn relative offsets into checked, non-overlapping ranges of the file."""
        alignment = int_or(self.metadata.get("general.alignment"), 32)
        if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            cursor.fail(f"general.alignment is {alignment}, not a power of two from 8 to {MAX_ALIGNMENT}")
        base = -(-cursor.position // alignment) * alignment
        for name, shape, number, offset in raw:
            if name in self.tensors:
                cursor.fail(f"tensor {name!r} is listed twice; names must be unique")
            if self.unknown_types and number not in TENSOR_TYPES:
                self.tensors[name] = GGUFTensor(name, shape, number, base + offset, 0)
                continue
            kind = tensor_type(number, f"open {self.path}: tensor {name!r}")
            elements = 1
            for dim in shape:
                elements *= dim
            if elements == 0 or shape[-1] % kind.block:
                cursor.fail(
                    f"tensor {name!r} has shape {list(shape)}; {kind.name} needs rows of a multiple of "
                    f"{kind.block} weights and no empty dimension"
                )
            nbytes = elements // kind.block * kind.nbytes
            start = base + offset
            if offset % alignment:
                cursor.fail(
                    f"tensor {name!r} lies at offset {offset}, not a multiple of the alignment {alignment}"
                )
            if start + nbytes > cursor.size:
                cursor.fail(
                    f"tensor {name!r} ({nbytes} bytes at {start}) ends beyond the {cursor.size} bytes of the "
                    "file, which is truncated or damaged: fetch it again"
                )
            self.tensors[name] = GGUFTensor(name, shape, number, start, nbytes)
        ordered = sorted(self.tensors.values(), key=lambda tensor: tensor.start)
        for before, after in itertools.pairwise(ordered):
            if before.start + before.nbytes > after.start:
                cursor.fail(
                    f"tensors {before.name!r} and {after.name!r} overlap; the file is damaged or hostile"
                )


def int_or(value: Any, default: int) -> int:
    """`value` where it is an integer (not a bool), else `default`."""
    return value if isinstance(value, int) and not isinstance(value, bool) else default
