"""Numbers, strings and arrays of GGUF metadata, read with every count held against the bytes that are left.

Nothing is allocated from a count that the file merely claims, and metadata of many small items, which take
more memory as objects of Python than as bytes, is bounded.
Source: the GGUF specification, docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from lowbit.errors import CheckpointError

MAX_NESTING = 4  # arrays of arrays
MAX_NESTED = 1 << 16  # arrays within arrays in all: each is an object of a hundred bytes, from 12 in the file
MAX_STRING_BYTES = 1 << 24
MAX_KEY_BYTES = (1 << 16) - 1  # by the specification
MAX_ARRAY_BYTES = 1 << 28  # of one array of numbers
MAX_ITEMS = 1 << 22  # strings, keys, tensors and inner arrays in all: bounds the time that opening can take

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


class Cursor:
    """A position in the mapped file; each read is checked against its end."""

    def __init__(self, buffer: mmap.mmap, path: Path):
        self.buffer, self.path = buffer, path
        self.size = len(buffer)
        self.position = 0
        self.items = 0
        self.nested = 0

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
            self.nested += count
            if self.nested > MAX_NESTED:
                self.fail(
                    f"metadata {key!r} holds more than {MAX_NESTED} arrays in arrays; the file is damaged or "
                    "hostile"
                )
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
