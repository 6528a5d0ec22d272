"""What every kind of term has in common: a quantized matrix is a sum of terms over one shape.

A new kind is one file with a frozen dataclass that has these members, and one line in `KINDS` of matrix.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed.layout import BLOCK_ROWS, pack_groups, unpack_groups


class Term(Protocol):
    """One summand of a PackedMatrix. Arrays are in kernel order (layout.py) and never copied."""

    kind: ClassVar[str]  # its name in files
    quantized: ClassVar[bool]  # multiplies integer activations, not floats

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """The stored arrays by name, large ones first."""

    def numbers(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """(name, "fp32" | "fp16" | "bf16" | "e8m0" | "e4m3", array) of the arrays that must be finite."""

    def meta(self) -> dict[str, Any]:
        """What a file's JSON says about the term besides its kind."""

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> "Term":
        """The term that `meta` describes. It takes its arrays out of `arrays`; what is left is an error."""

    def check(self, out_features: int, in_features: int) -> None:
        """Raise FormatError unless kernels can read the term as part of a matrix of this shape."""

    def dequantize(self, out_features: int, in_features: int) -> np.ndarray:
        """float32 [out_features, in_features]."""

    def take_rows(self, index: np.ndarray, out_features: int, in_features: int) -> "Term | None":
        """The term whose row r is row index[r] of this one; `index` names no row twice. None where a sparse
        kind of term has nothing in these rows."""

    def add_to(self, native: Any) -> None:
        """Add the term to a `_native.Matrix` over the same memory."""


def integer(value: Any) -> int:
    """`value` from a file's JSON, which must be an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} where an integer is required")
    return value


def check_array(name: str, array: np.ndarray, dtypes: tuple, shape: tuple[int, ...]) -> None:
    """Raise FormatError unless `array` has one of the dtypes, and the shape."""
    if array.dtype not in dtypes or array.shape != shape:
        wanted = " or ".join(np.dtype(d).name for d in dtypes)
        raise FormatError(
            f"term: {name} are {array.dtype} {list(array.shape)}; this matrix needs {wanted} {list(shape)}"
        )


def take_groups(packed: np.ndarray, index: np.ndarray, out_features: int) -> np.ndarray:
    """[blocks, n, 32] of `out_features` rows to the rows that `index` names, in its order."""
    assert packed.shape[2] == BLOCK_ROWS
    return pack_groups(unpack_groups(packed, out_features)[index])


def places_of(index: np.ndarray, out_features: int) -> np.ndarray:
    """int64 [out_features]: where `index` puts each row, -1 for rows that it leaves out."""
    places = np.full(out_features, -1, np.int64)
    places[index] = np.arange(len(index))
    return places
