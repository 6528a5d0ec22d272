"""Write GGUF files byte by byte, well-formed or not; for tests only."""

from __future__ import annotations

import struct

import numpy as np

from lowbit.model.gguf_types import TENSOR_TYPES

NUMBERS = {"u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i")}
NUMBERS |= {"f32": (6, "f"), "bool": (7, "B"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d")}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def typed(kind: str, value) -> bytes:
    """A value with its type in front: kind "str", a number, or "[kind]" for an array."""
    if kind.startswith("["):
        inner = kind[1:-1]
        items = [typed(inner, item) for item in value]
        number = (
            items[0][:4]
            if items
            else typed(inner, [] if inner[0] == "[" else "" if inner == "str" else 0)[:4]
        )
        return (
            struct.pack("<I", 9)
            + number
            + struct.pack("<Q", len(items))
            + b"".join(item[4:] for item in items)
        )
    if kind == "str":
        return struct.pack("<I", 8) + string(value)
    number, code = NUMBERS[kind]
    return struct.pack("<I" + code, number, value)


def pair(key: str, kind: str, value) -> bytes:
    return string(key) + typed(kind, value)


def entry(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A row of the table of tensors; `dims` fastest first."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def assemble(
    pairs: list[bytes],
    entries: list[bytes] = (),
    data: bytes = b"",
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    """A whole file; `counts` (tensors, pairs) may lie."""
    n_tensors, n_pairs = counts or (len(entries), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_pairs) + b"".join(pairs) + b"".join(entries)
    return head + b"\0" * (-len(head) % alignment) + data


def model_bytes(pairs: list[bytes], tensors: dict[str, tuple[int, np.ndarray]]) -> bytes:
    """A file of whole tensors: name -> (ggml type number, array of float32 or raw uint8 [rows, bytes])."""
    blocks = {kind.number: (kind.block, kind.nbytes) for kind in TENSOR_TYPES.values()}
    entries, data = [], b""
    for name, (kind, array) in tensors.items():
        block, nbytes = blocks[kind]
        shape = (
            array.shape
            if kind == 0
            else (*array.shape[:-1], array.view(np.uint8).shape[-1] // nbytes * block)
        )
        entries.append(entry(name, shape[::-1], kind, len(data)))
        data += array.tobytes()
        data += b"\0" * (-len(data) % 32)
    return assemble(pairs, entries, data)
