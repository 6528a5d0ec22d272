"""bfloat16 weights with entropy-coded exponents, lossless in about 11.2 bits; see entropy.py."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed.entropy import EXPONENTS, INPUTS, TAIL, Arrays, codes_shape, decode, encode
from lowbit.packed.layout import BLOCK_ROWS, block_count
from lowbit.packed.term import check_array

_NOT_FINITE = 255  # exponent of infinities and NaN


@dataclass(frozen=True, eq=False)
class EntropyTerm:
    """Weights of bfloat16, coded.

    codes: uint8 [blocks, records, 176], a record being 4 inputs of 32 rows
    escapes: uint8 [n], the codes of rarer exponents, block after block; 64 zero bytes end them
    offsets: uint32 [2 * blocks + 1], where in `escapes` the nibbles and the bytes of each block begin
    exponents: uint8 [22], the most frequent ones
    """

    kind: ClassVar[str] = "entropy"
    quantized: ClassVar[bool] = False
    codes: np.ndarray
    escapes: np.ndarray
    offsets: np.ndarray
    exponents: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "EntropyTerm":
        """The term of bfloat16 weights given as bits, uint16 [out_features, in_features]."""
        return cls(*encode(values))

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield "codes", self.codes
        yield "escapes", self.escapes
        yield "offsets", self.offsets
        yield "exponents", self.exponents

    def numbers(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """The weights, decoded, if one of them is infinite or NaN; otherwise nothing."""
        begin, end = self.offsets[1::2].astype(np.int64), self.offsets[2::2].astype(np.int64)
        rare = [self.escapes[begin[b] : end[b]] for b in np.flatnonzero(end > begin)]
        if any((part == _NOT_FINITE).any() for part in (self.exponents, *rare)):
            blocks, records, _ = self.codes.shape
            yield "weights", "bf16", self.values(blocks * BLOCK_ROWS, records * INPUTS).reshape(blocks, -1)

    def meta(self) -> dict[str, Any]:
        return {"type": "bf16"}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> "EntropyTerm":
        if meta["type"] != "bf16":
            raise ValueError(f"entropy term of type {meta['type']!r}; known: bf16")
        return cls(*(arrays.pop(name) for name in ("codes", "escapes", "offsets", "exponents")))

    def check(self, out_features: int, in_features: int) -> None:
        """Raise FormatError unless the arrays have the dtypes and shapes of this matrix.

        That the codes and escapes agree is checked where they are first read: `dequantize` and `add_to`.
        """
        check_array("codes", self.codes, (np.uint8,), codes_shape(out_features, in_features))
        check_array("offsets", self.offsets, (np.uint32,), (2 * block_count(out_features) + 1,))
        check_array("exponents", self.exponents, (np.uint8,), (EXPONENTS,))
        if self.escapes.dtype != np.uint8 or self.escapes.ndim != 1 or len(self.escapes) < TAIL:
            raise FormatError(
                f"entropy term: escapes are {self.escapes.dtype} {list(self.escapes.shape)}; "
                f"needs uint8 [{TAIL} or more]"
            )

    def values(self, out_features: int, in_features: int) -> np.ndarray:
        """The bits of bfloat16, uint16 [out_features, in_features]."""
        arrays: Arrays = (self.codes, self.escapes, self.offsets, self.exponents)
        return decode(arrays, out_features, in_features)

    def dequantize(self, out_features: int, in_features: int) -> np.ndarray:
        """float32 [out_features, in_features], exact."""
        return (self.values(out_features, in_features).astype(np.uint32) << 16).view(np.float32)

    def take_rows(self, index: np.ndarray, out_features: int, in_features: int) -> "EntropyTerm":
        return EntropyTerm.of(self.values(out_features, in_features)[index])

    def add_to(self, native: Any) -> None:
        try:
            native.add_entropy_term(self.codes, self.escapes, self.offsets, self.exponents)
        except ValueError as error:
            raise FormatError(f"entropy term: {error}; the file is damaged") from error
