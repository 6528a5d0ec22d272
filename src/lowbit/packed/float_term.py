"""Weights kept as plain floats: fp32, fp16 or bf16."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed.layout import BLOCK_ROWS, block_count, unpack_groups
from lowbit.packed.term import check_array, take_groups

FLOAT_DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}  # bf16: the bits


@dataclass(frozen=True, eq=False)
class FloatTerm:
    """Weights kept as plain floats.

    type: "fp32" | "fp16" | "bf16"
    values: float32 | float16 | uint16 (the bits of bf16) [blocks, in_features, 32]; padded rows hold 0
    """

    kind: ClassVar[str] = "floats"
    quantized: ClassVar[bool] = False
    type: str
    values: np.ndarray

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield "values", self.values

    def numbers(self) -> Iterator[tuple[str, str, np.ndarray]]:
        yield "values", self.type, self.values

    def meta(self) -> dict[str, Any]:
        return {"type": self.type}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> "FloatTerm":
        return cls(meta["type"], arrays.pop("values"))

    def check(self, out_features: int, in_features: int) -> None:
        """Raise FormatError unless the values have the dtype and shape of this matrix."""
        if self.type not in FLOAT_DTYPES:
            raise FormatError(f"float term: type {self.type!r}; use one of {', '.join(FLOAT_DTYPES)}")
        shape = (block_count(out_features), in_features, BLOCK_ROWS)
        check_array("values", self.values, (FLOAT_DTYPES[self.type],), shape)

    def dequantize(self, out_features: int, in_features: int) -> np.ndarray:
        """float32 [out_features, in_features], exact."""
        values = unpack_groups(self.values, out_features)
        if self.type == "bf16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)

    def take_rows(self, index: np.ndarray, out_features: int, in_features: int) -> "FloatTerm":
        return replace(self, values=take_groups(self.values, index, out_features))

    def add_to(self, native: Any) -> None:
        native.add_float_term(self.type, self.values)
