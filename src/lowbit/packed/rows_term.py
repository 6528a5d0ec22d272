"""More bits for a few output rows: codes of what the other terms lack there, as in MixLLM (arXiv:2412.14590),
whose salient output features have 8 bits among others of 4."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed.term import check_array, places_of
from lowbit.packed.terms import CodeTerm


@dataclass(frozen=True, eq=False)
class RowsTerm:
    """A term of codes [k, in_features] whose row j is added to row rows[j] of the matrix.

    rows: uint32 [k], ascending; which outputs
    codes: a term for a matrix of k rows
    """

    kind: ClassVar[str] = "rows"
    quantized: ClassVar[bool] = True
    rows: np.ndarray
    codes: CodeTerm

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from self.codes.arrays()
        yield "rows", self.rows

    def numbers(self) -> Iterator[tuple[str, str, np.ndarray]]:
        yield from self.codes.numbers()

    def meta(self) -> dict[str, Any]:
        return self.codes.meta()

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> "RowsTerm":
        rows = arrays.pop("rows")
        return cls(rows, CodeTerm.from_meta(meta, arrays))

    def check(self, out_features: int, in_features: int) -> None:
        """Raise FormatError unless the rows are ascending outputs of this matrix and the codes fit them."""
        check_array("rows", self.rows, (np.uint32,), (self.rows.size,))
        rows = self.rows.astype(np.int64)
        if not rows.size or int(rows.max()) >= out_features or (np.diff(rows) <= 0).any():
            raise FormatError(
                f"rows: {rows[:8].tolist()}{' ..' if rows.size > 8 else ''}; they must be one or more "
                f"different outputs below {out_features}, ascending"
            )
        self.codes.check(len(rows), in_features)

    def dequantize(self, out_features: int, in_features: int) -> np.ndarray:
        """float32 [out_features, in_features], zero outside the rows."""
        weights = np.zeros((out_features, in_features), np.float32)
        weights[self.rows] = self.codes.dequantize(len(self.rows), in_features)
        return weights

    def take_rows(self, index: np.ndarray, out_features: int, in_features: int) -> "RowsTerm | None":
        places = places_of(index, out_features)[self.rows]
        order = np.argsort(places)
        order = order[places[order] >= 0]
        if not order.size:
            return None
        codes = self.codes.take_rows(order, len(self.rows), in_features)
        return RowsTerm(places[order].astype(np.uint32), codes)

    def add_to(self, native: Any) -> None:
        from lowbit._native import Matrix

        part = Matrix(len(self.rows), native.shape[1])
        self.codes.add_to(part)
        native.add_rows_term(self.rows, part)
