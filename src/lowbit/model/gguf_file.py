"""Read the structure of a GGUF file: metadata and the table of tensors, every number checked before use.

A GGUF file of version 2 or 3 is little endian:

    "GGUF"  version u32  tensor_count u64  pair_count u64
    pair_count   x {key string, type u32, value}
    tensor_count x {name string, n_dims u32, dims u64[n_dims] (fastest first), type u32, offset u64}
    zero padding to a multiple of `general.alignment` (default 32), then the tensor data

A string is a u64 length and that many UTF-8 bytes; an array is {type u32, count u64, values}.
Source: the GGUF specification, docs/gguf.md of the ggml project.

The file is memory-mapped, so opening costs only the metadata. Nothing is allocated from a count that the
file merely claims: a count is first held against the bytes that are left.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.gguf_types import tensor_type

MAX_DIMENSIONS = 4  # of a tensor, by the specification
MAX_NESTING = 4  # arrays of arrays
MAX_STRING_BYTES = 1 << 24
MAX_KEY_BYTES = (1 << 16) - 1  # by the specification
MAX_ARRAY_BYTES = 1 << 28  # of one array of numbers
MAX_ALIGNMENT = 1 << 20
MAX_ITEMS = 1 << 22  # strings, keys, tensors and inner arrays in all: bounds the time that opening can take
MIN_PAIR_BYTES = 8 + 4 + 1
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: dict[int, np.dtype] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies: `shape` is slowest first ([out_features, in_features]), `start` counts from the
    beginning of the file, `type` is the number of its block type."""

    name: str
    shape: tuple[int, ...]
    type: int
    start: int
    nbytes: int


class GGUFFile:
    """A checked, memory-mapped GGUF file.

    metadata: dict of key -> bool, int, float, str, list of str, NumPy array of numbers, or list of arrays.
    tensors: dict of name -> GGUFTensor, in file order.
    Raises CheckpointError for a damaged or hostile file and UnsupportedError for a version, byte order,
    split or tensor type that lowbit cannot read.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 24:
                    raise CheckpointError(
                        f"open {self.path}: {size} bytes, less than the 24 of a GGUF header; fetch it again"
                    )
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"open {self.path}: {error.strerror or error}; check the path") from error
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._parse(_Cursor(self._map, self.path))
        except BaseException:
            self.close()
            raise

    def data(self, name: str) -> np.ndarray:
        """The bytes of tensor `name` as they lie in the file: a read-only uint8 view of the mapping."""
        tensor = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.start)

    def forget(self, name: str) -> None:
        """Let the pages of tensor `name` go from this process; they come back from the file when read again.

        Pages of a mapped file count as memory of the process for as long as they are mapped, so a model
        that is converted tensor by tensor would otherwise be counted twice."""
        tensor = self.tensors[name]
        first = -(-tensor.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Release the mapping; views given out by `data` keep it alive until they go."""
        with contextlib.suppress(BufferError):  # a view is in use: the last one to go frees the mapping
            self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _parse(self, cursor: _Cursor) -> None:
        n_tensors, n_pairs = self._header(cursor)
        for _ in range(n_pairs):
            key = cursor.string("a metadata key", MAX_KEY_BYTES)
            if not key or key in self.metadata:
                cursor.fail(
                    f"metadata key {key[:80]!r} is {'repeated' if key else 'empty'}; keys must be unique"
                )
            self.metadata[key] = cursor.value(cursor.u32(f"the type of {key!r}"), key, 0)
        if int_or(self.metadata.get("split.count"), 1) > 1:
            raise UnsupportedError(
                f"open {self.path}: this is one of {self.metadata['split.count']} parts of a split GGUF; "
                "join them with `llama-gguf-split --merge` first"
            )
        raw = [self._tensor_entry(cursor) for _ in range(n_tensors)]
        self._place(raw, cursor)

    def _header(self, cursor: _Cursor) -> tuple[int, int]:
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

    def _tensor_entry(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = cursor.string("a tensor name", MAX_KEY_BYTES)
        n_dims = cursor.u32(f"the dimensions of tensor {name!r}")
        if not 1 <= n_dims <= MAX_DIMENSIONS:
            cursor.fail(f"tensor {name!r} has {n_dims} dimensions, 1 to {MAX_DIMENSIONS} are allowed")
        dims = tuple(cursor.u64(f"the shape of tensor {name!r}") for _ in range(n_dims))
        return name, dims[::-1], cursor.u32(f"the type of {name!r}"), cursor.u64(f"the offset of {name!r}")

    def _place(self, raw: list[tuple[str, tuple[int, ...], int, int]], cursor: _Cursor) -> None:
        """Turn relative offsets into checked, non-overlapping ranges of the file."""
        alignment = int_or(self.metadata.get("general.alignment"), 32)
        if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            cursor.fail(f"general.alignment is {alignment}, not a power of two from 8 to {MAX_ALIGNMENT}")
        base = -(-cursor.position // alignment) * alignment
        for name, shape, number, offset in raw:
            if name in self.tensors:
                cursor.fail(f"tensor {name!r} is listed twice; names must be unique")
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


class _Cursor:
    """A position in the mapped file; each read is checked against its end."""

    def __init__(self, buffer: mmap.mmap, path: Path):
        self.buffer, self.path = buffer, path
        self.size = len(buffer)
        self.position = 0
        self.items = 0

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"open {self.path}: {problem}")

    def reserve(self, count: int, least_bytes: int, what: str, objects: bool = True) -> None:
        """Refuse a count that the rest of the file cannot hold, or that would take unreasonable time."""
        left = self.size - self.position
        if count * least_bytes > left:
            self.fail(
                f"{count} {what} need at least {count * least_bytes} bytes, {left} are left; "
                "the file is truncated or damaged: fetch it again"
            )
        if objects:
            self.items += count
            if self.items > MAX_ITEMS:
                self.fail(
                    f"{count} {what}: more than {MAX_ITEMS} items of metadata; the file is damaged or hostile"
                )

    def take(self, count: int, what: str) -> bytes:
        start, end = self.position, self.position + count
        if end > self.size:
            self.fail(
                f"{what} takes {count} bytes at {start}, the file has {self.size}: truncated, fetch it again"
            )
        self.position = end
        return self.buffer[start:end]

    def u32(self, what: str) -> int:
        return _U32.unpack(self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack(self.take(8, what))[0]

    def string(self, what: str, limit: int) -> str:
        length = self.u64(what)
        if length > limit:
            self.fail(f"{what} is {length} bytes long, {limit} are allowed; the file is damaged")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"{what} at byte {self.position - length} is not UTF-8 ({error.reason})")

    def value(self, kind: int, key: str, depth: int) -> Any:
        if kind == _STRING:
            return self.string(f"metadata {key!r}", MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self.array(key, depth + 1)
        number = self.numbers(kind, 1, key)[0].item()
        return bool(number) if kind == _BOOL else number

    def array(self, key: str, depth: int) -> Any:
        if depth > MAX_NESTING:
            self.fail(
                f"metadata {key!r} nests arrays deeper than {MAX_NESTING}; the file is damaged or hostile"
            )
        kind, count = self.u32(f"metadata {key!r}"), self.u64(f"metadata {key!r}")
        if kind == _STRING:
            self.reserve(count, 8, f"strings of {key!r}")
            return self.strings(count, key)
        if kind == _ARRAY:
            self.reserve(count, 12, f"arrays of {key!r}")
            return [self.array(key, depth + 1) for _ in range(count)]
        values = self.numbers(kind, count, key)
        return values.astype(bool) if kind == _BOOL else values

    def numbers(self, kind: int, count: int, key: str) -> np.ndarray:
        """`count` numbers as a fresh array; booleans must be 0 or 1."""
        dtype = _NUMBERS.get(kind)
        if dtype is None:
            self.fail(f"metadata {key!r} has value type {kind}, 0 to 12 are defined; the file is damaged")
        self.reserve(count, dtype.itemsize, f"values of {key!r}", objects=False)
        if count * dtype.itemsize > MAX_ARRAY_BYTES:
            self.fail(f"metadata {key!r} takes {count * dtype.itemsize} bytes, {MAX_ARRAY_BYTES} are allowed")
        values = np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        if kind == _BOOL and values.size and values.max() > 1:
            self.fail(f"metadata {key!r} holds the byte {values.max()} as a truth value, 0 and 1 are defined")
        return values

    def strings(self, count: int, key: str) -> list[str]:
        """`count` strings. A vocabulary has 50,000 or more, so this loop does the least that is safe: a
        length is checked before its use, the end of the file once, behind the last string."""
        buffer, position, unpack = self.buffer, self.position, _U64.unpack_from
        parts: list[bytes] = []
        append = parts.append
        try:
            for _ in range(count):
                (length,) = unpack(buffer, position)
                if length > MAX_STRING_BYTES:
                    self.fail(f"a string of {key!r} is {length} bytes long, {MAX_STRING_BYTES} are allowed")
                position += 8
                end = position + length
                append(buffer[position:end])
                position = end
        except struct.error:
            position = self.size + 1
        if position > self.size:
            self.fail(f"the strings of {key!r} run beyond the {self.size} bytes: truncated, fetch it again")
        self.position = position
        try:
            return [part.decode() for part in parts]
        except UnicodeDecodeError as error:
            self.fail(f"a string of {key!r} is not UTF-8 ({error.reason})")
