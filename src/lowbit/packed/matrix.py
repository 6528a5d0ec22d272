"""A quantized matrix: a sum of terms over one [out_features, in_features] shape."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit.errors import CheckpointError, FormatError
from lowbit.packed.columns_term import ColumnsTerm
from lowbit.packed.entries_term import EntriesTerm
from lowbit.packed.entropy_term import EntropyTerm
from lowbit.packed.float_term import FloatTerm
from lowbit.packed.gathered_term import GatheredTerm
from lowbit.packed.low_rank_term import LowRankTerm
from lowbit.packed.rows_term import RowsTerm
from lowbit.packed.sparse_term import SparseTerm
from lowbit.packed.term import Term, integer
from lowbit.packed.terms import CodeTerm

# Kind, as files name it -> its class.
KINDS: dict[str, type[Term]] = {
    "codes": CodeTerm,
    "floats": FloatTerm,
    "sparse_codes": SparseTerm,
    "outlier_columns": ColumnsTerm,
    "outlier_entries": EntriesTerm,
    "low_rank": LowRankTerm,
    "entropy": EntropyTerm,
    "rows": RowsTerm,
    "gathered": GatheredTerm,
}
MAX_FEATURES = 1 << 28  # of either dimension: far above any model, small enough that sizes cannot overflow


class PackedMatrix:
    """Weights [out_features, in_features] as a sum of terms in kernel order.

    terms: of the kinds in KINDS, at least one; arrays are not copied and must not change afterwards
    format_name: the name of the format it was quantized to, for people; None if it has none
    """

    def __init__(
        self, out_features: int, in_features: int, terms: tuple[Term, ...], format_name: str | None = None
    ):
        if not (0 < out_features <= MAX_FEATURES and 0 < in_features <= MAX_FEATURES):
            raise FormatError(
                f"PackedMatrix: shape {out_features} x {in_features}; both must be 1 to {MAX_FEATURES}"
            )
        if not terms:
            raise FormatError("PackedMatrix: no terms; give at least one CodeTerm or FloatTerm")
        for term in terms:
            term.check(out_features, in_features)
        excluding = [t.columns for t in terms if isinstance(t, ColumnsTerm) and t.exclude]
        if len(excluding) > 1:
            raise FormatError(
                f"PackedMatrix: {len(excluding)} terms exclude columns from the codes; join them into one"
            )
        beside = [t.kind for t in terms if t.quantized or isinstance(t, (FloatTerm, EntropyTerm))]
        if "gathered" in beside and (len(beside) > 1 or excluding):
            raise FormatError(
                f"PackedMatrix: terms {', '.join(t.kind for t in terms)}; a gathered term has no other codes "
                "or floats beside it, and nothing excludes columns from it"
            )
        self.out_features = out_features
        self.in_features = in_features
        self.terms = tuple(terms)
        self.format_name = format_name
        # Inputs that terms of codes leave out (ColumnsTerm.exclude), ascending; None: they read all.
        self.excluded: np.ndarray | None = excluding[0] if excluding else None
        self._native: Any = None

    def __repr__(self) -> str:
        name = self.format_name or "unnamed"
        return (
            f"PackedMatrix({self.out_features} x {self.in_features}, {name}, {self.bits_per_weight:.2f} bits)"
        )

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)

    @property
    def nbytes(self) -> int:
        """All stored bytes: codes, scales, tables, padding."""
        return sum(array.nbytes for term in self.terms for _, array in term.arrays())

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight: every stored bit over the number of weights."""
        return 8 * self.nbytes / (self.out_features * self.in_features)

    def dequantize(self) -> np.ndarray:
        """float32 [out_features, in_features]: the terms decoded and added in float32, in their order."""
        total = self._decoded(self.terms[0])
        for term in self.terms[1:]:
            total += self._decoded(term)
        return total

    def _decoded(self, term: Term) -> np.ndarray:
        weights = term.dequantize(self.out_features, self.in_features)
        if term.quantized and self.excluded is not None:
            weights[:, self.excluded] = 0
        return weights

    def native(self) -> Any:
        """The `_native.Matrix` over the same memory, made on first use."""
        if self._native is None:
            from lowbit._native import Matrix

            matrix = Matrix(self.out_features, self.in_features)
            for term in self.terms:
                term.add_to(matrix)
            self._native = matrix
        return self._native

    def permute_rows(self, index: np.ndarray) -> "PackedMatrix":
        """The matrix whose row r is row index[r] of this one, exactly; `index` is a permutation."""
        if np.shape(index) != (self.out_features,):
            raise FormatError(f"permute_rows: index is not a permutation of {self.out_features} rows")
        return self.take_rows(index)

    def take_rows(self, index: "np.ndarray | slice") -> "PackedMatrix":
        """The matrix whose row r is row index[r] of this one, exactly; `index` names each row once at most.

        For matrices that a checkpoint stores fused: queries, keys and values, or gate and up.
        Raises FormatError for an index that is empty, out of range or has a row twice.
        """
        if isinstance(index, slice):
            index = np.arange(self.out_features)[index]
        index = np.asarray(index)
        if index.ndim != 1 or not index.size or index.dtype.kind not in "iu":
            raise FormatError(
                f"take_rows: index is {index.dtype} {list(index.shape)}; give integers, one or more"
            )
        if (
            int(index.min()) < 0
            or int(index.max()) >= self.out_features
            or len(np.unique(index)) < len(index)
        ):
            raise FormatError(
                f"take_rows: index has rows outside 0 to {self.out_features - 1}, or one of them twice"
            )
        taken = (term.take_rows(index, self.out_features, self.in_features) for term in self.terms)
        terms = tuple(term for term in taken if term is not None)
        return PackedMatrix(len(index), self.in_features, terms, self.format_name)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(meta, arrays): what a file stores. `meta` fits JSON; arrays are named "0.codes", "0.scales" .."""
        terms: list[dict[str, Any]] = []
        arrays: dict[str, np.ndarray] = {}
        for number, term in enumerate(self.terms):
            terms.append({"kind": term.kind} | term.meta())
            arrays.update({f"{number}.{name}": array for name, array in term.arrays()})
        shape = [self.out_features, self.in_features]
        return {"shape": shape, "format": self.format_name, "terms": terms}, arrays

    @classmethod
    def from_state(cls, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> "PackedMatrix":
        """The matrix that `state` described, over the given arrays without copying them.

        Raises CheckpointError if the description is malformed or an array is missing, left over or wrong.
        """
        try:
            out_features, in_features = (integer(n) for n in meta["shape"])
            left = dict(arrays)
            terms = tuple(_term(number, entry, left) for number, entry in enumerate(meta["terms"]))
            if left:
                raise ValueError(f"arrays that no term names: {', '.join(sorted(left))}")
            name = meta.get("format")
            if name is not None and not isinstance(name, str):
                raise ValueError(f"format name {name!r} is not text")
            return cls(out_features, in_features, terms, name)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"from_state: {_explain(error)}; the file is damaged or of another version"
            ) from error


def _explain(error: Exception) -> str:
    return f"missing entry {error}" if isinstance(error, KeyError) else str(error)


def _term(number: int, entry: Mapping[str, Any], left: dict[str, np.ndarray]) -> Term:
    """Build term `number` from its description, taking its arrays out of `left`."""
    kind = entry["kind"]
    if kind not in KINDS:
        raise ValueError(f"term kind {kind!r}; known: {', '.join(KINDS)}")
    prefix = f"{number}."
    own = {name[len(prefix) :]: left.pop(name) for name in list(left) if name.startswith(prefix)}
    term = KINDS[kind].from_meta(entry, own)
    left.update({prefix + name: array for name, array in own.items()})
    return term
