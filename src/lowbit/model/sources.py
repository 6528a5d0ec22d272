"""Where a checkpoint holds each tensor of a network, and how to write it there: canonical <-> stored names.

Checkpoints of some families fuse matrices (Phi-3), keep them transposed (GPT-2), mix their rows by head
(GPT-NeoX) or stack experts (gpt-oss); the names are in stored_names.py. A canonical tensor is

    stored[expert].T[rows]        without the steps that its Source does not ask for

Tensors of another quantizer go through the same table: its reader first turns the several arrays of a matrix
("X.qweight", "X.scales", ..) into the one name "X.weight" that a float checkpoint would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from lowbit.errors import CheckpointError
from lowbit.model.stored_names import AROUND, EXPERTS, INSIDE, NAMES, SINKS, Names, Row

if TYPE_CHECKING:
    from lowbit.model.config import ModelConfig


@dataclass(frozen=True, eq=False)
class Source:
    """Where one canonical tensor lies.

    stored: name in the checkpoint; of MXFP4 experts that of the blocks ("..gate_up_proj_blocks")
    rows: of the matrix [out, in], or of the vector; None: all
    transposed: stored [in, out]
    expert: index into the first dimension; None: there is no such dimension
    """

    stored: str
    rows: slice | np.ndarray | None = None
    transposed: bool = False
    expert: int | None = None

    @property
    def whole(self) -> bool:
        """Is the stored tensor this one and nothing else?"""
        return self.rows is None and not self.transposed and self.expert is None

    def view(self, stored: np.ndarray) -> np.ndarray:
        """The canonical tensor in the stored array; a view, except where rows are an index."""
        return self._rows_of(stored)[() if self.rows is None else self.rows]

    def put(self, stored: np.ndarray, values: np.ndarray) -> None:
        """Write the canonical tensor into its place in a stored array."""
        self._rows_of(stored)[... if self.rows is None else self.rows] = values

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The canonical shape, from the stored one; () where the dimensions do not allow it."""
        if self.expert is not None:
            if not stored or self.expert >= stored[0]:
                return ()
            stored = stored[1:]
        if self.transposed:
            stored = stored[::-1]
        if self.rows is None:
            return stored
        if not stored:
            return ()
        if isinstance(self.rows, slice):
            rows = len(range(*self.rows.indices(stored[0])))
        else:
            rows = int(np.count_nonzero(self.rows < stored[0]))
        return (rows, *stored[1:])

    def _rows_of(self, stored: np.ndarray) -> np.ndarray:
        if self.expert is not None:
            stored = stored[self.expert]
        return stored.T if self.transposed else stored


def sources(
    config: ModelConfig, stored_names: Iterable[str], names: Names | None = None
) -> dict[str, Source]:
    """Canonical name -> its Source, for every tensor of the network that is among `stored_names`.

    A stored tensor that no table knows keeps its name, so that whoever asks for coverage sees it; one that
    the description determines (old causal masks, rotation speeds) is left out.
    names: the tables of another container; None: those of transformers' files
    """
    names = names or NAMES.get(config.family, Names())
    have = dict.fromkeys(stored_names)
    root = next((root for root in names.roots if _embedding(names, root) in have), names.roots[0])
    found: dict[str, Source] = {}
    used: set[str] = set()
    for canonical, places in _places(config, names, root):
        source = next((source for source in places if source.stored in have), None)
        if source is not None:
            found[canonical] = source
            used.add(source.stored)
            if source.stored.endswith("_blocks"):
                used.add(source.stored.removesuffix("_blocks") + "_scales")
    for stored in have:
        if stored in used or any(fnmatchcase(stored, pattern) for pattern in names.ignored):
            continue
        if stored in found:
            raise CheckpointError(
                f"open: {stored!r} and {found[stored].stored!r} are the same tensor of a {config.family} "
                "network; the checkpoint mixes two conventions of names"
            )
        found[stored] = Source(stored)
    return found


@dataclass(frozen=True)
class Stored:
    """A tensor as a checkpoint of the family has it: its shape, and what it is put together from."""

    shape: tuple[int, ...]
    parts: Mapping[str, Source]  # by canonical name

    @property
    def whole(self) -> str | None:
        """The canonical tensor that is stored as it is; None where it is changed or others lie with it."""
        return next((name for name, source in self.parts.items() if source.whole), None)

    def assemble(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The stored array; read: canonical name -> array."""
        parts = {name: read(name) for name in self.parts}
        first = next(iter(parts.values()))
        array = np.empty(self.shape, first.dtype)
        for name, values in parts.items():
            self.parts[name].put(array, values)
        return array


def stored_tensors(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], names: Names | None = None
) -> dict[str, Stored]:
    """The inverse of `sources`: every tensor that a checkpoint of this family holds, by its stored name.

    shapes: of the canonical tensors, all of the network; names: see `sources`
    Raises CheckpointError for a name that the family has no place for, and where only some parts of a stored
    tensor are given.
    """
    names = names or NAMES.get(config.family, Names())
    places = {name: found[0] for name, found in _places(config, names, names.roots[0]) if found}
    unknown = [name for name in shapes if name not in places]
    if unknown:
        raise CheckpointError(
            f"write: {len(unknown)} tensors have no place in a {config.family} checkpoint: "
            f"{', '.join(unknown[:4])}"
        )
    parts: dict[str, dict[str, Source]] = {}
    for canonical in shapes:
        parts.setdefault(places[canonical].stored, {})[canonical] = places[canonical]
    result = {}
    for stored, held in parts.items():
        sizes = {canonical: shapes[canonical] for canonical in held}
        shape = _joined(config, held, sizes)
        if sum(int(np.prod(size)) for size in sizes.values()) != int(np.prod(shape)):
            raise CheckpointError(
                f"write: {stored} of a {config.family} checkpoint needs more than {', '.join(held)}"
            )
        result[stored] = Stored(shape, held)
    return result


def _joined(
    config: ModelConfig, parts: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """The shape of what holds all parts."""
    name, source = next(iter(parts.items()))
    shape = shapes[name]
    if source.rows is not None:
        per_expert = [n for n, s in parts.items() if s.expert == source.expert]
        shape = (sum(shapes[n][0] for n in per_expert), *shape[1:])
    if source.transposed:
        shape = shape[::-1]
    return shape if source.expert is None else (config.n_experts, *shape)


def _embedding(names: Names, root: str) -> str:
    return (
        names.around.get("model.embed_tokens", AROUND["model.embed_tokens"])[0].format(root=root) + ".weight"
    )


def _places(config: ModelConfig, names: Names, root: str) -> Iterable[tuple[str, list[Source]]]:
    """Every canonical name that the family may have, with the places where it may lie."""
    around = names.around if names.complete else {**AROUND, **names.around}
    for stem, stored in around.items():
        for suffix in ("weight", "bias"):
            yield f"{stem}.{suffix}", [Source(f"{place.format(root=root)}.{suffix}") for place in stored]
    for n in range(config.n_layers):
        layer = f"model.layers.{n}."
        at = root + names.layer.format(n=n)
        for stem in INSIDE:
            for suffix in ("weight", "bias"):
                rows = names.rows(stem)
                yield f"{layer}{stem}.{suffix}", [_source(config, row, at, suffix, None) for row in rows]
        yield layer + SINKS, [Source(at + names.sinks)]
        for expert in range(config.n_experts):
            for stem in EXPERTS:
                for suffix in ("weight", "bias"):
                    rows = names.rows(stem)
                    places = [_source(config, row, at, suffix, expert) for row in rows]
                    yield f"{layer}{stem.format(e=expert)}.{suffix}", places


def _source(config: ModelConfig, row: Row, at: str, suffix: str, expert: int | None) -> Source:
    stem = row.stem if expert is None else row.stem.replace("{e}", str(expert))
    return Source(
        at + stem + row.suffixes[suffix],
        PARTS[row.part](config, expert is not None),
        row.transposed and suffix == "weight",
        expert if row.stacked else None,
    )


def _by_head(which: int) -> Callable[[ModelConfig, bool], np.ndarray]:
    """Rows of q, k or v where those of a head follow each other: q0 k0 v0 q1 k1 v1 .."""

    def rows(config: ModelConfig, expert: bool) -> np.ndarray:
        head = np.arange(config.n_heads)[:, None] * 3 + which
        return (head * config.head_dim + np.arange(config.head_dim)).reshape(-1)

    return rows


def _split(config: ModelConfig) -> tuple[int, int, int]:
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return q, q + kv, q + 2 * kv


def unpermuted_rows(rows: int, heads: int) -> np.ndarray:
    """The row of a GGUF file that holds each row of the transformers order, int64 [rows].

    llama.cpp's converter stores the halves of a head interleaved: row 2 j + t of a head is row
    t * head_dim / 2 + j in transformers."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _unpermuted_keys(config: ModelConfig) -> np.ndarray:
    return unpermuted_rows(config.n_kv_heads * config.head_dim, config.n_kv_heads)


def _width(config: ModelConfig, expert: bool) -> int:
    return config.expert_size if expert else config.intermediate_size


# Part of a fused tensor -> its rows; (config, is it an expert's).
PARTS: dict[str, Callable[[ModelConfig, bool], slice | np.ndarray | None]] = {
    "all": lambda config, expert: None,
    "q of qkv": lambda config, expert: slice(0, _split(config)[0]),
    "k of qkv": lambda config, expert: slice(*_split(config)[:2]),
    "v of qkv": lambda config, expert: slice(*_split(config)[1:]),
    "q by pairs": lambda config, expert: unpermuted_rows(_split(config)[0], config.n_heads),
    "k by pairs": lambda config, expert: _unpermuted_keys(config),
    "q of qkv by pairs": lambda config, expert: unpermuted_rows(_split(config)[0], config.n_heads),
    "k of qkv by pairs": lambda config, expert: _split(config)[0] + _unpermuted_keys(config),
    "q by head": _by_head(0),
    "k by head": _by_head(1),
    "v by head": _by_head(2),
    "first half": lambda config, expert: slice(0, _width(config, expert)),
    "second half": lambda config, expert: slice(_width(config, expert), 2 * _width(config, expert)),
    "even": lambda config, expert: slice(0, 2 * _width(config, expert), 2),
    "odd": lambda config, expert: slice(1, 2 * _width(config, expert), 2),
}
