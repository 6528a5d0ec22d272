"""A few input columns in 16 bit beside the codes: LLM.int8() (arXiv:2208.07339), and every format whose
outliers lie in few inputs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed.layout import BLOCK_ROWS, block_count, unpack_groups
from lowbit.packed.term import check_array, take_groups


@dataclass(frozen=True, eq=False)
class ColumnsTerm:
    """Columns of the matrix that multiply activations as they are, in float32.

    columns: uint32 [k], ascending; which inputs
    values: float16 [blocks, k, 32]; padded rows hold 0
    exclude: the columns are these values alone: terms of codes count as 0 there, and activations are rounded
        as if they were 0 there, so that outliers do not widen the steps of their neighbours. If False, the
        values are added to the other terms.
    """

    kind: ClassVar[str] = "outlier_columns"
    quantized: ClassVar[bool] = False
    columns: np.ndarray
    values: np.ndarray
    exclude: bool = True

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield "values", self.values
        yield "columns", self.columns

    def numbers(self) -> Iterator[tuple[str, str, np.ndarray]]:
        yield "values", "fp16", self.values

    def meta(self) -> dict[str, Any]:
        return {"exclude": self.exclude}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> "ColumnsTerm":
        if not isinstance(meta["exclude"], bool):
            raise ValueError(f"exclude is {meta['exclude']!r}; it must be true or false")
        return cls(arrays.pop("columns"), arrays.pop("values"), meta["exclude"])

    def check(self, out_features: int, in_features: int) -> None:
        """Raise FormatError unless the columns are ascending inputs of this matrix and the values fit."""
        check_array("columns", self.columns, (np.uint32,), (self.columns.size,))
        columns = self.columns.astype(np.int64)
        if not columns.size or int(columns.max()) >= in_features or (np.diff(columns) <= 0).any():
            raise FormatError(
                f"outlier columns: {columns[:8].tolist()}{' ..' if columns.size > 8 else ''}; they must be "
                f"one or more different inputs below {in_features}, ascending"
            )
        check_array(
            "values", self.values, (np.float16,), (block_count(out_features), len(columns), BLOCK_ROWS)
        )

    def dequantize(self, out_features: int, in_features: int) -> np.ndarray:
        """float32 [out_features, in_features], zero outside the columns."""
        weights = np.zeros((out_features, in_features), np.float32)
        weights[:, self.columns] = unpack_groups(self.values, out_features)
        return weights

    def take_rows(self, index: np.ndarray, out_features: int, in_features: int) -> "ColumnsTerm":
        return replace(self, values=take_groups(self.values, index, out_features))

    def add_to(self, native: Any) -> None:
        native.add_columns_term(self.columns, self.values, self.exclude)
