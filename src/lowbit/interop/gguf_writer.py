"""A GGUF file, written from front to back, some rows of a tensor at a time.

Version 3, little endian, as model/gguf_file.py reads it. Until everything is written the file has a temporary
name beside the final one; its space is claimed first, so a full disk is noticed before the work.
Source of the format: the GGUF specification, docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError
from lowbit.model.gguf_types import TENSOR_TYPES
from lowbit.packed.whole_file import WholeFile

ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    "u8": (0, "<u1"),
    "i8": (1, "<i1"),
    "u16": (2, "<u2"),
    "i16": (3, "<i2"),
    "u32": (4, "<u4"),
    "i32": (5, "<i4"),
    "f32": (6, "<f4"),
    "bool": (7, "<u1"),
    "u64": (10, "<u8"),
    "i64": (11, "<i8"),
    "f64": (12, "<f8"),
}


@dataclass(frozen=True)
class Entry:
    """One tensor: shape slowest first, type: ggml's number."""

    name: str
    shape: tuple[int, ...]
    type: int

    @property
    def nbytes(self) -> int:
        kind = TENSOR_TYPES[self.type]
        return int(np.prod(self.shape, dtype=np.int64)) // kind.block * kind.nbytes


Pair = tuple[str, str, Any]  # key, kind ("u32", "str", "[f32]" ..), value


class GGUFWriter:
    """Writes metadata and tensors; the tensors' bytes come in the order of `entries`, in pieces.

    Use in a `with` block: an error leaves nothing behind and what was at `path` as it was.
    """

    def __init__(self, path: Path, pairs: Sequence[Pair], entries: Sequence[Entry]):
        self.path = path
        head = _head(pairs, entries)
        self.nbytes = len(head) + sum(_padded(entry.nbytes) for entry in entries)
        self._left = [(entry.name, entry.nbytes) for entry in entries][::-1]
        self._room = 0  # bytes of the current tensor that are to come
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"write {path}: {error.strerror or error}; choose another folder"
            ) from error
        self._file = WholeFile(path, self.nbytes)
        self._file.write(memoryview(head))

    def write(self, name: str, raw: np.ndarray) -> None:
        """Append bytes (uint8) of tensor `name`, the one that is due."""
        if not self._room:
            due, self._room = self._left.pop()
            assert due == name, f"{name} was written when {due} was due"
        assert raw.dtype == np.uint8 and raw.nbytes <= self._room, (
            f"{name}: {raw.nbytes} of {self._room} bytes"
        )
        self._room -= raw.nbytes
        self._file.write(np.ascontiguousarray(raw).reshape(-1).data)
        if not self._room:
            self._file.write(memoryview(b"\0" * (-self._file.tell() % ALIGNMENT)))

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._file.discard()
            return
        assert not self._left and not self._room, f"{len(self._left)} tensors never came"
        self._file.commit()


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _head(pairs: Sequence[Pair], entries: Sequence[Entry]) -> bytes:
    """Everything before the data of the tensors, padding included."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(pairs))]
    for key, kind, value in pairs:
        parts += [_string(key), _typed(kind, value)]
    offset = 0
    for entry in entries:
        dims = entry.shape[::-1]
        parts.append(_string(entry.name))
        parts.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.type, offset))
        offset += _padded(entry.nbytes)
    head = b"".join(parts)
    return head + b"\0" * (-len(head) % ALIGNMENT)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _typed(kind: str, value: Any) -> bytes:
    """A value behind the number of its kind."""
    if kind == "str":
        return struct.pack("<I", _STRING) + _string(value)
    if not kind.startswith("["):
        number, dtype = _NUMBERS[kind]
        return struct.pack("<I", number) + np.array(value, dtype).tobytes()
    inner = kind[1:-1]
    if inner == "str":
        items = b"".join(_string(item) for item in value)
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + items
    number, dtype = _NUMBERS[inner]
    return struct.pack("<IIQ", _ARRAY, number, len(value)) + np.asarray(value, dtype).tobytes()
