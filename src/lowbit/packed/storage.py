"""Safetensors files: written one tensor at a time, read by mapping them into memory.

Source of the format: the safetensors README (8-byte little-endian header length, JSON header, data).
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError
from lowbit.packed.whole_file import WholeFile

ALIGNMENT = 64
_HEADER_LIMIT = 100_000_000  # the limit of the safetensors library
# BF16 and the 8-bit floats have no NumPy type: their bits are read as integers.
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8,
    "F8_E8M0": np.uint8,
}
_NAMES = {
    np.dtype(t): name for name, t in DTYPES.items() if name not in ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0")
}

# name -> (NumPy dtype, or a name of DTYPES such as "BF16", and shape)
Layout = Mapping[str, tuple[Any, tuple[int, ...]]]


class TensorWriter:
    """Writes a safetensors file whose tensors arrive one at a time, in any order.

    path: where the file appears when the `with` block ends well; until then it is a temporary file in the
        same folder, which is removed on any error, so nothing half-written is ever seen
    layout: name -> (dtype, shape) of every tensor; the header is written from it beforehand
    metadata: text entries of the header's `__metadata__`

    Arrays whose size is a multiple of 64 bytes come first, the largest before the smaller, so all of them
    start at multiples of 64. Raises CheckpointError when the disk is full or a tensor is missing.
    """

    def __init__(
        self, path: str | os.PathLike[str], layout: Layout, metadata: Mapping[str, str] | None = None
    ):
        self.path = Path(path)
        header, self._offsets, self.nbytes = _header(layout, metadata or {})
        self._layout = {name: (_stored(dtype), tuple(shape)) for name, (dtype, shape) in layout.items()}
        self._rows: dict[str, int] = {}  # of tensors that come in parts: how many have come
        self._missing = set(self._layout)
        self._file = WholeFile(self.path, self.nbytes)
        self._file.write(memoryview(header), 0)

    def write(self, name: str, array: np.ndarray) -> None:
        """Store one tensor. Its dtype and shape must be those of the layout."""
        if name not in self._missing:
            known = "was written already" if name in self._layout else "is not in the layout"
            raise CheckpointError(f"write {self.path}: tensor {name!r} {known}")
        dtype, shape = self._layout[name]
        if array.dtype != dtype or array.shape != shape:
            raise CheckpointError(
                f"write {self.path}: tensor {name!r} is {array.dtype} {list(array.shape)}, "
                f"but the layout announced {dtype} {list(shape)}"
            )
        self._write(self._offsets[name], array, dtype)
        self._missing.discard(name)

    def write_rows(self, name: str, rows: np.ndarray) -> None:
        """Store the next rows (of the first dimension) of a tensor that comes in parts."""
        if name not in self._missing:
            raise CheckpointError(f"write {self.path}: {name!r} is whole already or not in the layout")
        dtype, shape = self._layout[name]
        first = self._rows.get(name, 0)
        if rows.dtype != dtype or rows.shape[1:] != shape[1:] or first + len(rows) > shape[0]:
            raise CheckpointError(
                f"write {self.path}: rows {rows.dtype} {list(rows.shape)} of {name!r} after {first} do not "
                f"fit the announced {dtype} {list(shape)}"
            )
        self._write(self._offsets[name] + first * (rows.nbytes // max(len(rows), 1)), rows, dtype)
        self._rows[name] = first + len(rows)
        if self._rows[name] == shape[0]:
            self._missing.discard(name)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.discard()
            return
        if self._missing:
            self._file.discard()
            names = ", ".join(sorted(self._missing)[:5])
            raise CheckpointError(f"write {self.path}: {len(self._missing)} tensors never came: {names}")
        self._file.commit()

    def _write(self, offset: int, array: np.ndarray, dtype: np.dtype) -> None:
        little = array.astype(dtype.newbyteorder("<"), copy=False)
        self._file.write(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data, offset)


class TensorFile:
    """A safetensors file mapped into memory; tensors are views that stay valid after the object is gone.

    The safetensors library checks the header, the offsets and the sizes before anything is mapped.
    Raises CheckpointError for a file that it rejects or whose types are unknown here.
    """

    def __init__(self, path: str | os.PathLike[str]):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        try:
            with safe_open(self.path, framework="np") as checked:
                self.metadata: dict[str, str] = dict(checked.metadata() or {})
            with open(self.path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                entries = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError, RecursionError, struct.error) as error:
            raise CheckpointError(
                f"open {self.path}: not a whole safetensors file: {error}; fetch or write it again"
            ) from error
        entries.pop("__metadata__", None)
        self._start = 8 + length
        self._entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            self._entries[name] = (entry["dtype"], tuple(entry["shape"]), begin, end)
        if self.path.stat().st_size > self._start:
            # A plain view: slices of a memmap are memmaps with a dict each, of which a model has thousands.
            self._map: np.ndarray = np.memmap(self.path, np.uint8, "r").view(np.ndarray)
        else:
            self._map = np.empty(self._start, np.uint8)

    def names(self) -> list[str]:
        return list(self._entries)

    def dtype(self, name: str) -> str:
        """The type as safetensors names it: "F32", "BF16", "U8" .."""
        return self._entry(name)[0]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[1]

    def array(self, name: str) -> np.ndarray:
        """The tensor, read-only and not copied; BF16 as uint16, 8-bit floats as uint8."""
        dtype, shape, begin, end = self._entry(name)
        if dtype not in DTYPES:
            raise CheckpointError(
                f"read {self.path}: tensor {name!r} has type {dtype}; known: {', '.join(DTYPES)}"
            )
        raw = self._map[self._start + begin : self._start + end]
        return raw.view(np.dtype(DTYPES[dtype]).newbyteorder("<")).reshape(shape)

    def _entry(self, name: str) -> tuple[str, tuple[int, ...], int, int]:
        if name not in self._entries:
            raise CheckpointError(
                f"read {self.path}: no tensor {name!r}; it has {len(self._entries)} tensors"
            )
        return self._entries[name]


def _header(layout: Layout, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """(header bytes with the length prefix, name -> file offset, file size)."""
    sizes = {
        name: _stored(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
        for name, (dtype, shape) in layout.items()
    }
    order = sorted(sizes, key=lambda name: (sizes[name] % ALIGNMENT != 0, -sizes[name]))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name in order:
        dtype, shape = layout[name]
        end = begin + sizes[name]
        entries[name] = {
            "dtype": dtype if isinstance(dtype, str) and dtype in DTYPES else _NAMES[np.dtype(dtype)],
            "shape": [int(n) for n in shape],
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > _HEADER_LIMIT:
        raise CheckpointError(
            f"write safetensors: a header of {len(text)} bytes exceeds {_HEADER_LIMIT}; use several files"
        )
    start = 8 + len(text)
    offsets = {name: start + entries[name]["data_offsets"][0] for name in order}
    return struct.pack("<Q", len(text)) + text, offsets, start + begin


def _stored(dtype: Any) -> np.dtype:
    """What NumPy calls a type of the layout."""
    return np.dtype(DTYPES[dtype] if isinstance(dtype, str) and dtype in DTYPES else dtype)
