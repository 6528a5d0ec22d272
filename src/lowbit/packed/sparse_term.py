"""Codes of a part of the weights, with a bit for each weight that says whether it has one; the others are 0.

Unstructured sparsity and 2:4 alike: a weight takes 1 + density * bits bits and its share of a scale.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed.layout import (
    BLOCK_ROWS,
    CHUNK,
    PLANES,
    STEPS,
    TILE_ROWS,
    block_count,
    check_group_size,
    chunk_count,
    group_count,
    pack_codes,
    unpack_codes,
)
from lowbit.packed.term import check_array, integer, take_groups
from lowbit.packed.terms import SCALE_DTYPES, CodeTerm

TAIL = 64  # bytes of 0 behind the codes, so that a kernel may load a whole vector anywhere
_ONES = np.array([bin(i).count("1") for i in range(1 << 8)], np.uint8)


@dataclass(frozen=True, eq=False)
class SparseTerm:
    """w[o, i] = tensor_scale * scales[o, i / g] * levels[code] where the mask has a bit, else 0.

    bits, levels, scales, scale_type, group_size, tensor_scale: as in CodeTerm, with one table of levels
    mask: uint8 [blocks, chunks, 2, 64]; bit 4 * row + j of the 64-bit word of step s is the weight in that
        row of the tile and input 4 * s + j of the chunk
    codes: uint8 [n]; of each block the codes of its set bits, in the order of the mask and `bits` wide,
        lowest bits first, filled up to whole bytes; 64 bytes of 0 follow the last block
    """

    kind: ClassVar[str] = "sparse_codes"
    quantized: ClassVar[bool] = True
    bits: int
    levels: np.ndarray
    mask: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    scale_type: str
    group_size: int
    tensor_scale: float = 1.0

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for name in ("codes", "mask", "scales", "levels"):
            yield name, getattr(self, name)

    def numbers(self) -> Iterator[tuple[str, str, np.ndarray]]:
        yield "scales", self.scale_type, self.scales

    def meta(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("bits", "scale_type", "group_size", "tensor_scale")}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> "SparseTerm":
        return cls(
            bits=integer(meta["bits"]),
            levels=arrays.pop("levels"),
            mask=arrays.pop("mask"),
            codes=arrays.pop("codes"),
            scales=arrays.pop("scales"),
            scale_type=meta["scale_type"],
            group_size=integer(meta["group_size"]),
            tensor_scale=float(meta["tensor_scale"]),
        )

    def check(self, out_features: int, in_features: int) -> None:
        """Raise FormatError unless arrays, levels and the number of codes fit this matrix."""
        if self.bits not in PLANES:
            raise FormatError(f"sparse term: bits={self.bits}, but stored codes have 1 to 8 bits")
        if self.scale_type not in SCALE_DTYPES:
            raise FormatError(
                f"sparse term: scale type {self.scale_type!r}; use one of {', '.join(SCALE_DTYPES)}"
            )
        check_group_size(in_features, self.group_size, "sparse term")
        blocks = block_count(out_features)
        groups = (blocks, group_count(in_features, self.group_size), BLOCK_ROWS)
        check_array("scales", self.scales, (SCALE_DTYPES[self.scale_type],), groups)
        check_array("mask", self.mask, (np.uint8,), (blocks, chunk_count(in_features), 2, 8 * STEPS))
        check_array("codes", self.codes, (np.uint8,), (self.codes.size,))
        expected = int(self.block_starts[-1]) + TAIL
        if self.codes.size != expected:
            raise FormatError(
                f"sparse term: codes have {self.codes.size} bytes, the set bits of the mask need {expected}; "
                "mask or codes are damaged"
            )
        if self.levels.ndim != 2 or self.levels.dtype != np.float32:
            raise FormatError(f"sparse term: levels are {self.levels.dtype} {list(self.levels.shape)}")
        if self.levels.shape[0] != 1 or not 1 <= self.levels.shape[1] <= 1 << self.bits:
            raise FormatError(
                f"sparse term: levels are {list(self.levels.shape)}; a {self.bits}-bit term has one table of "
                f"up to {1 << self.bits}"
            )
        if not np.isfinite(self.levels).all() or not self.levels.any():
            raise FormatError("sparse term: levels must be finite and not all 0")
        if self.levels.size == 256 and not (self.levels == 0).any():
            raise FormatError("sparse term: of 256 levels one must be 0; drop the least useful level")
        if not np.isfinite(self.tensor_scale):
            raise FormatError(f"sparse term: tensor_scale={self.tensor_scale}; it must be finite")

    @cached_property
    def block_starts(self) -> np.ndarray:
        """int64 [blocks + 1]: the byte where the codes of each block begin, and where the last one ends."""
        if hasattr(np, "bitwise_count"):
            kept = np.bitwise_count(self.mask.view(np.uint64)).sum(axis=(1, 2, 3), dtype=np.int64)
        else:
            kept = np.array([_ONES[block.view(np.uint8)].sum(dtype=np.int64) for block in self.mask])
        return np.concatenate([[0], np.cumsum((kept * self.bits + 7) // 8)])

    @property
    def zero(self) -> tuple[np.ndarray, int, int]:
        """(levels float32 [1, n] with a 0 among them, code of the 0, bits of such codes)."""
        found = np.flatnonzero(self.levels[0] == 0)
        if found.size:
            return self.levels, int(found[0]), self.bits
        levels = np.append(self.levels, np.zeros((1, 1), np.float32), axis=1)
        return levels, levels.size - 1, max(self.bits, (levels.size - 1).bit_length())

    @classmethod
    def from_codes(
        cls,
        codes: np.ndarray,
        kept: np.ndarray,
        bits: int,
        levels: np.ndarray,
        scales: np.ndarray,
        scale_type: str,
        group_size: int,
        tensor_scale: float = 1.0,
    ) -> "SparseTerm":
        """The term of `codes` uint8 [out_features, in_features] where `kept` (bool, same shape) is true."""
        words, set_bits = _tiles(kept.astype(np.uint8)), []
        for block, of_block in zip(_tiles(codes), words):
            wide = block[of_block != 0][:, None] >> np.arange(bits, dtype=np.uint8) & 1
            set_bits.append(np.packbits(wide.reshape(-1), bitorder="little"))
        set_bits.append(np.zeros(TAIL, np.uint8))
        mask = np.packbits(words, axis=-1, bitorder="little").reshape(*words.shape[:3], 8 * STEPS)
        packed = np.concatenate(set_bits)
        return cls(bits, levels, mask, packed, scales, scale_type, group_size, tensor_scale)

    def dense(self, out_features: int, in_features: int) -> CodeTerm:
        """The same weights as a CodeTerm: what machines without a kernel for masks multiply with."""
        levels, zero, bits = self.zero
        words = np.unpackbits(self.mask, axis=-1, bitorder="little").reshape(
            *self.mask.shape[:3], STEPS, 4 * TILE_ROWS
        )
        place_values = (1 << np.arange(self.bits)).astype(np.uint8)
        tiles = np.full(words.shape, zero, np.uint8)
        for block, of_block, start, end in zip(tiles, words, self.block_starts, self.block_starts[1:]):
            kept = int(of_block.sum(dtype=np.int64))
            ones = np.unpackbits(self.codes[start:end], bitorder="little")[: kept * self.bits]
            block[of_block != 0] = ones.reshape(kept, self.bits) @ place_values
        codes = _rows(tiles, out_features, in_features)
        if codes.size and int(codes.max()) >= levels.shape[1]:
            raise FormatError(
                f"sparse term: code {int(codes.max())}, but the table has {levels.shape[1]} levels; "
                "the codes are damaged"
            )
        return CodeTerm(
            bits,
            levels,
            pack_codes(codes, bits),
            self.scales,
            self.scale_type,
            self.group_size,
            tensor_scale=self.tensor_scale,
        )

    def dequantize(self, out_features: int, in_features: int) -> np.ndarray:
        """float32 [out_features, in_features]: (scale * tensor_scale) * level, or 0."""
        return self.dense(out_features, in_features).dequantize(out_features, in_features)

    def take_rows(self, index: np.ndarray, out_features: int, in_features: int) -> "SparseTerm":
        dense = self.dense(out_features, in_features)
        kept = np.unpackbits(self.mask, axis=-1, bitorder="little").reshape(
            *self.mask.shape[:3], STEPS, 4 * TILE_ROWS
        )
        codes = unpack_codes(dense.codes, out_features, in_features, dense.bits)[index]
        return self.from_codes(
            codes,
            _rows(kept, out_features, in_features)[index] != 0,
            self.bits,
            self.levels,
            take_groups(self.scales, index, out_features),
            self.scale_type,
            self.group_size,
            self.tensor_scale,
        )

    def add_to(self, native: Any) -> None:
        levels, zero, dense_bits = self.zero
        native.add_sparse_term(
            self.bits,
            self.mask,
            self.codes,
            self.scale_type,
            self.scales,
            self.group_size,
            levels,
            zero,
            dense_bits,
            tensor_scale=self.tensor_scale,
        )


def _tiles(values: np.ndarray) -> np.ndarray:
    """uint8 [out_features, in_features] to [blocks, chunks, 2, 8 steps, 4 * row + input], padded with 0."""
    blocks, chunks = block_count(values.shape[0]), chunk_count(values.shape[1])
    padded = np.zeros((blocks * BLOCK_ROWS, chunks * CHUNK), np.uint8)
    padded[: values.shape[0], : values.shape[1]] = values
    tiles = padded.reshape(blocks, 2, TILE_ROWS, chunks, STEPS, 4).transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(tiles).reshape(blocks, chunks, 2, STEPS, 4 * TILE_ROWS)


def _rows(tiles: np.ndarray, out_features: int, in_features: int) -> np.ndarray:
    """The inverse of `_tiles`."""
    blocks, chunks = tiles.shape[:2]
    rows = tiles.reshape(blocks, chunks, 2, STEPS, TILE_ROWS, 4).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(
        rows.reshape(blocks * BLOCK_ROWS, chunks * CHUNK)[:out_features, :in_features]
    )
