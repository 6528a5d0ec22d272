"""The layout of llama2.c files: which weights lie where. A header of sizes, then numbers without names.

version 0 (no magic)   28 bytes: dim, hidden, layers, heads, kv heads, vocabulary (negative: the head is
                       stored), positions; float32: embedding, attention norms, wq, wk, wv, wo, ffn norms, w1,
                       w2, w3, final norm, two tables of rotations that nobody reads, head
version 1 ("ak42")     256 bytes: magic, version, the same sizes, a byte: is the head shared; float32:
                       attention norms, ffn norms, final norm, embedding, wq, wk, wv, wo, w1, w2, w3, head
version 2              a group size after that byte; float32 norms as before; then embedding, wq .. w3, head,
                       each matrix as int8 [n] and float32 scales [n / group] over the flat numbers (Q8_0)
version 1, ternary     bitllama2.c: final norm and embedding in float32, then wq .. w3, each matrix as one
                       float32 scale and 2-bit codes, first weight in the top bits: 0, 1, 3 are 0, +1, -1

What the header does not say, the size of the file does: it must be that of one of them.
Sources: export.py and run.c of karpathy/llama2.c; runbit.c and export_bitmodel.py of bitllama2.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from lowbit.errors import CheckpointError, UnsupportedError

MAGIC = 0x616B3432
HEADER = 256
_LEGACY = struct.Struct("<7i")
_LIMITS = (1 << 18, 1 << 20, 1 << 12, 1 << 12, 1 << 12, 1 << 22, 1 << 28)
_MATRICES: tuple[tuple[str, str, str], ...] = (
    ("self_attn.q_proj", "q", "dim"),
    ("self_attn.k_proj", "kv", "dim"),
    ("self_attn.v_proj", "kv", "dim"),
    ("self_attn.o_proj", "dim", "q"),
    ("mlp.gate_proj", "hidden", "dim"),
    ("mlp.down_proj", "dim", "hidden"),
    ("mlp.up_proj", "hidden", "dim"),
)
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@dataclass(frozen=True)
class Sizes:
    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int

    def of(self, name: str) -> int:
        head = self.dim // self.heads
        return {"dim": self.dim, "hidden": self.hidden, "q": self.dim, "kv": self.kv_heads * head}[name]


@dataclass(frozen=True)
class Place:
    offset: int
    shape: tuple[int, ...]
    kind: str  # "F32" | "Q8_0" | "ternary"


@dataclass(frozen=True)
class Layout:
    sizes: Sizes
    tied: bool
    kind: str  # of the matrices
    group: int  # of Q8_0
    places: dict[str, Place]


def read_layout(data: bytes, file_size: int, where: str) -> Layout:
    """The layout of a file that begins with `data` (256 bytes, or all there are).

    Raises CheckpointError for a file that is none of those above, UnsupportedError for a version beyond them.
    """
    if len(data) < _LEGACY.size:
        raise CheckpointError(f"open {where}: {len(data)} bytes hold no llama2.c header; the file is cut off")
    if struct.unpack_from("<I", data)[0] != MAGIC:
        numbers = list(_LEGACY.unpack_from(data))
        tied = numbers[5] > 0
        numbers[5] = abs(numbers[5])
        sizes = _sizes(numbers, where)
        return _fitting([_legacy(sizes, tied)], file_size, where)
    if len(data) < HEADER:
        raise CheckpointError(
            f"open {where}: {len(data)} bytes, the header has {HEADER}; the file is cut off"
        )
    version, *numbers = struct.unpack_from("<8i", data, 4)
    shared, group = struct.unpack_from("<Bi", data, 36)
    if version not in (1, 2):
        raise UnsupportedError(f"open {where}: llama2.c version {version}; lowbit reads 0, 1 and 2")
    sizes = _sizes(numbers, where)
    if shared not in (0, 1):
        raise CheckpointError(
            f"open {where}: the flag of a shared head is {shared}, not 0 or 1; it is damaged"
        )
    if version == 1:
        return _fitting([_plain(sizes, bool(shared)), _ternary(sizes)], file_size, where)
    if not 1 <= group <= 1 << 20:
        raise CheckpointError(f"open {where}: groups of {group} numbers; the file is damaged")
    return _fitting([_grouped(sizes, bool(shared), group)], file_size, where)


def _sizes(numbers: list[int], where: str) -> Sizes:
    sizes = Sizes(*numbers)
    fits = all(1 <= n <= limit for n, limit in zip(numbers, _LIMITS))
    if not fits or sizes.dim % sizes.heads or sizes.heads % sizes.kv_heads or sizes.dim // sizes.heads % 2:
        raise CheckpointError(
            f"open {where}: the header says {', '.join(str(n) for n in numbers)}, no sizes of a llama2.c "
            "network (dim, hidden, layers, heads, kv heads, vocabulary, positions); it is no such file, or "
            "damaged"
        )
    return sizes


class _Filler:
    """Gives out places one after the other. Nothing is made of a size before the file was seen to hold it."""

    def __init__(self, start: int):
        self.end = start
        self.places: dict[str, Place] = {}

    def add(self, name: str, shape: tuple[int, ...], kind: str = "F32", group: int = 1) -> None:
        self.places[name] = Place(self.end, shape, kind)
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        if kind == "F32":
            self.end += 4 * count
        elif kind == "ternary":
            self.end += 4 + count // 4
        else:
            self.end += count + 4 * (count // group)

    def norms(self, sizes: Sizes, name: str) -> None:
        for layer in range(sizes.layers):
            self.add(f"model.layers.{layer}.{name}", (sizes.dim,))

    def matrices(self, sizes: Sizes, kind: str = "F32", group: int = 1, names: slice = slice(None)) -> None:
        for name, rows, columns in _MATRICES[names]:
            for layer in range(sizes.layers):
                shape = (sizes.of(rows), sizes.of(columns))
                self.add(f"model.layers.{layer}.{name}.weight", shape, kind, group)


def _legacy(sizes: Sizes, tied: bool) -> tuple[Layout, int]:
    fill = _Filler(_LEGACY.size)
    fill.add(_EMBEDDING, (sizes.vocabulary, sizes.dim))
    fill.norms(sizes, _NORMS[0])
    fill.matrices(sizes, names=slice(0, 4))
    fill.norms(sizes, _NORMS[1])
    fill.matrices(sizes, names=slice(4, None))
    fill.add(_NORM, (sizes.dim,))
    fill.end += 4 * sizes.positions * (sizes.dim // sizes.heads)  # cosines and sines
    if not tied:
        fill.add(_HEAD, (sizes.vocabulary, sizes.dim))
    return Layout(sizes, tied, "F32", 0, fill.places), fill.end


def _plain(sizes: Sizes, tied: bool) -> tuple[Layout, int]:
    fill = _Filler(HEADER)
    for name in _NORMS:
        fill.norms(sizes, name)
    fill.add(_NORM, (sizes.dim,))
    fill.add(_EMBEDDING, (sizes.vocabulary, sizes.dim))
    fill.matrices(sizes)
    if not tied:
        fill.add(_HEAD, (sizes.vocabulary, sizes.dim))
    return Layout(sizes, tied, "F32", 0, fill.places), fill.end


def _grouped(sizes: Sizes, tied: bool, group: int) -> tuple[Layout, int]:
    fill = _Filler(HEADER)
    for name in _NORMS:
        fill.norms(sizes, name)
    fill.add(_NORM, (sizes.dim,))
    fill.add(_EMBEDDING, (sizes.vocabulary, sizes.dim), "Q8_0", group)
    fill.matrices(sizes, "Q8_0", group)
    if not tied:
        fill.add(_HEAD, (sizes.vocabulary, sizes.dim), "Q8_0", group)
    return Layout(sizes, tied, "Q8_0", group, fill.places), fill.end


def _ternary(sizes: Sizes) -> tuple[Layout, int]:
    fill = _Filler(HEADER)
    fill.add(_NORM, (sizes.dim,))
    fill.add(_EMBEDDING, (sizes.vocabulary, sizes.dim))
    fill.matrices(sizes, "ternary")
    return Layout(sizes, True, "ternary", 0, fill.places), fill.end


def _fitting(candidates: list[tuple[Layout, int]], file_size: int, where: str) -> Layout:
    for layout, size in candidates:
        if size == file_size:
            return layout
    wanted = " or ".join(f"{size} ({layout.kind})" for layout, size in candidates)
    raise CheckpointError(
        f"open {where}: {file_size} bytes, but a llama2.c file of these sizes has {wanted}; it is cut off, "
        "damaged, or of another kind"
    )
