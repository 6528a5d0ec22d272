"""A product of two thin matrices in 16 bit beside the codes: LoRC (ZeroQuant-V2, arXiv:2303.08302)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed.layout import BLOCK_ROWS, block_count, unpack_groups
from lowbit.packed.term import check_array, take_groups

MAX_RANK = 1024


@dataclass(frozen=True, eq=False)
class LowRankTerm:
    """u @ v, which multiplies activations as they are: y += u @ (v @ x) in float32.

    u: float16 [blocks, rank, 32]; padded rows hold 0
    v: float16 [rank, in_features]
    """

    kind: ClassVar[str] = "low_rank"
    quantized: ClassVar[bool] = False
    u: np.ndarray
    v: np.ndarray

    @property
    def rank(self) -> int:
        return len(self.v)

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        yield "u", self.u
        yield "v", self.v

    def numbers(self) -> Iterator[tuple[str, str, np.ndarray]]:
        yield "u", "fp16", self.u
        yield "v", "fp16", self.v

    def meta(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> "LowRankTerm":
        return cls(arrays.pop("u"), arrays.pop("v"))

    def check(self, out_features: int, in_features: int) -> None:
        """Raise FormatError unless u and v have the dtype and shape of this matrix."""
        rank = self.v.shape[0] if self.v.ndim == 2 else 0
        if not 1 <= rank <= MAX_RANK:
            raise FormatError(f"low rank: v is {list(self.v.shape)}; it must have 1 to {MAX_RANK} rows")
        check_array("v", self.v, (np.float16,), (rank, in_features))
        check_array("u", self.u, (np.float16,), (block_count(out_features), rank, BLOCK_ROWS))

    def dequantize(self, out_features: int, in_features: int) -> np.ndarray:
        """float32 [out_features, in_features]: u[:, 0] v[0] + u[:, 1] v[1] + .., each step rounded."""
        u = unpack_groups(self.u, out_features).astype(np.float32)
        weights = np.zeros((out_features, in_features), np.float32)
        for r, row in enumerate(self.v.astype(np.float32)):
            weights += u[:, r, None] * row
        return weights

    def take_rows(self, index: np.ndarray, out_features: int, in_features: int) -> "LowRankTerm":
        return replace(self, u=take_groups(self.u, index, out_features))

    def add_to(self, native: Any) -> None:
        native.add_low_rank_term(self.u, self.v)
