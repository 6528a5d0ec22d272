"""Single weights in 16 bit beside the codes, wherever they lie: SpQR (arXiv:2306.03078), SqueezeLLM."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed.layout import BLOCK_ROWS, block_count
from lowbit.packed.term import check_array, places_of


@dataclass(frozen=True, eq=False)
class EntriesTerm:
    """Weights at single places, added to the other terms. Within a block of 32 rows they are ordered by
    column, then by row.

    starts: uint32 [blocks + 1]; the entries of block b are starts[b] .. starts[b + 1] - 1
    columns: uint32 [n]
    rows: uint8 [n], 0 .. 31 within the block
    values: float16 [n]
    """

    kind: ClassVar[str] = "outlier_entries"
    quantized: ClassVar[bool] = False
    starts: np.ndarray
    columns: np.ndarray
    rows: np.ndarray
    values: np.ndarray

    @classmethod
    def from_places(
        cls, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, out_features: int
    ) -> "EntriesTerm":
        """The term with `values[j]` at row rows[j] of the matrix and column columns[j], in any order."""
        rows = np.asarray(rows, np.int64)
        order = np.lexsort((rows, columns, rows // BLOCK_ROWS))
        rows, columns = rows[order], np.asarray(columns)[order]
        counts = np.bincount(rows // BLOCK_ROWS, minlength=block_count(out_features))
        return cls(
            np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32),
            columns.astype(np.uint32),
            (rows % BLOCK_ROWS).astype(np.uint8),
            np.asarray(values)[order].astype(np.float16),
        )

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for name in ("columns", "values", "rows", "starts"):
            yield name, getattr(self, name)

    def numbers(self) -> Iterator[tuple[str, str, np.ndarray]]:
        yield "values", "fp16", self.values

    def meta(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> "EntriesTerm":
        return cls(*(arrays.pop(name) for name in ("starts", "columns", "rows", "values")))

    def check(self, out_features: int, in_features: int) -> None:
        """Raise FormatError unless all entries lie in this matrix, in their order."""
        blocks, count = block_count(out_features), self.columns.size
        check_array("starts", self.starts, (np.uint32,), (blocks + 1,))
        for name, dtype in (("columns", np.uint32), ("rows", np.uint8), ("values", np.float16)):
            check_array(name, getattr(self, name), (dtype,), (count,))
        starts = self.starts.astype(np.int64)
        if starts[0] != 0 or starts[-1] != count or (np.diff(starts) < 0).any() or not count:
            raise FormatError(
                f"outlier entries: starts {starts[:4].tolist()} .. {int(starts[-1])} of {count} entries; "
                "they must rise from 0 to the number of entries, which is at least 1"
            )
        row, column = self.places()
        if int(self.rows.max()) >= BLOCK_ROWS or int(row.max()) >= out_features:
            raise FormatError(f"outlier entries: a row is not below {out_features}, or not within its block")
        order = (row // BLOCK_ROWS * in_features + column) * BLOCK_ROWS + self.rows
        if int(column.max()) >= in_features or (np.diff(order) <= 0).any():
            raise FormatError(
                f"outlier entries: columns must be below {in_features}; entries of a block must be different "
                "and ordered by column, then row"
            )

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows of the matrix, columns), int64."""
        starts = self.starts.astype(np.int64)
        counts = starts[1:] - starts[:-1]
        block = np.repeat(np.arange(len(counts)), counts)
        return block * BLOCK_ROWS + self.rows, self.columns.astype(np.int64)

    def dequantize(self, out_features: int, in_features: int) -> np.ndarray:
        """float32 [out_features, in_features], zero elsewhere."""
        weights = np.zeros((out_features, in_features), np.float32)
        weights[self.places()] = self.values
        return weights

    def take_rows(self, index: np.ndarray, out_features: int, in_features: int) -> "EntriesTerm | None":
        rows, columns = self.places()
        rows = places_of(index, out_features)[rows]
        kept = rows >= 0
        if not kept.any():
            return None
        return self.from_places(rows[kept], columns[kept], self.values[kept], len(index))

    def add_to(self, native: Any) -> None:
        native.add_entries_term(self.starts, self.columns, self.rows, self.values)
