"""A matrix of code terms taken apart, so that codes and scales can be changed and put together again.

Everything is transposed, [in_features, out_features]: a column of the weights is contiguous.
"""

from dataclasses import replace
from itertools import product

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats.scales import encode_scales
from lowbit.packed import CodeTerm, PackedMatrix, pack_groups, unpack_groups, unpack_multipliers
from lowbit.quantize.grid import F32
from lowbit.quantize.scale import round_scale

MAX_SUMS = 256  # combinations of the levels of all terms


class Coded:
    """Codes and scales of a matrix that stands for a weight.

    weight, value, rest: float32 [in_features, out_features]: W, Q and W - Q
    chosen: uint8 [in_features, out_features], which combination of the terms' codes
    scales: float32 [terms, groups, out_features], tensor scales included
    A *group* is what shares a scale; with m4 scales it has several *parts* of one multiplier each.
    """

    def __init__(self, weight: np.ndarray, matrix: PackedMatrix, what: str):
        terms = tuple(term for term in matrix.terms if isinstance(term, CodeTerm))
        if len(terms) != len(matrix.terms) or any(term.offsets is not None for term in terms):
            raise FormatError(f"{what}: only terms of codes without offsets have levels to choose from")
        if len({(term.group_size, term.scale_size, term.scale_type) for term in terms}) > 1:
            raise FormatError(f"{what}: its terms have different groups or scale types; give them the same")
        sums = int(np.prod([term.levels.shape[1] for term in terms]))
        if sums > MAX_SUMS:
            raise FormatError(f"{what}: {sums} sums of levels, at most {MAX_SUMS}; take fewer bits or terms")
        if weight.shape != matrix.shape:
            raise FormatError(f"{what}: weight {list(weight.shape)} and matrix {list(matrix.shape)} differ")
        self.terms, self._matrix = terms, matrix
        self.weight = np.ascontiguousarray(weight.T, F32)
        in_features, out_features = self.weight.shape
        self._combinations = np.array(
            list(product(*[range(term.levels.shape[1]) for term in terms])), np.uint8
        ).T
        self.scales = np.stack([term.effective_scales(out_features).T for term in terms])
        self.groups = self.scales.shape[1]
        self._width = in_features // self.groups
        self._part = terms[0].group_size or in_features
        self._rows = np.arange(out_features)
        self._tables = [_Tables(term, out_features) for term in terms]
        self.chosen = np.zeros(self.weight.shape, np.uint8)
        for term in terms:
            self.chosen *= np.uint8(term.levels.shape[1] % 256)
            self.chosen += term.unpack(out_features, in_features).T
        self._sorted: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.value = np.empty_like(self.weight)
        self.rest = np.empty_like(self.weight)
        self.evaluate()

    def columns(self, group: int) -> slice:
        return slice(group * self._width, (group + 1) * self._width)

    def error(self, hessian: np.ndarray) -> np.ndarray:
        """(R H R^T) of each row with itself, float64 [out_features]."""
        return np.einsum("ir,ir->r", self.rest, hessian @ self.rest, dtype=np.float64)

    def evaluate(self, group: int | None = None) -> None:
        """Bring `value` and `rest` of one group, or all, up to date with codes and scales."""
        for number in range(self.groups) if group is None else (group,):
            self._forget(number)
            here = self.columns(number)
            scaled = self.unscaled(number) * self.scales[:, number, None]
            total = scaled[0]
            for further in scaled[1:]:
                total += further
            self.value[here] = total
            self.rest[here] = self.weight[here] - total

    def unscaled(self, group: int) -> np.ndarray:
        """Values of each term over its scale: float32 [terms, columns of the group, out_features]."""
        here = self.columns(group)
        result = np.empty((len(self.terms), self._width, len(self._rows)), F32)
        for term, tables in enumerate(self._tables):
            for first in range(here.start, here.stop, min(self._part, self._width)):
                part = self.chosen[first : min(first + self._part, here.stop)]
                table = tables.of(first // self._part)[self._combinations[term]]
                rows = self._rows if table.shape[1] > 1 else 0
                result[term, first - here.start :][: len(part)] = table[part, rows]
        return result

    def nearest(self, group: int, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(chosen, values) nearest to `targets`, all [columns of the group, out_features], for its scales."""
        self._forget(group)
        here = self.columns(group)
        chosen, values = np.empty(targets.shape, np.uint8), np.empty(targets.shape, F32)
        for first in range(here.start, here.stop, min(self._part, self._width)):
            part = slice(first - here.start, min(first + self._part, here.stop) - here.start)
            order, levels, middles = self._levels(first)
            place = np.zeros(targets[part].shape, np.uint8)
            for middle in middles:
                place += targets[part] > middle
            chosen[part], values[part] = order[place, self._rows], levels[place, self._rows]
        self._forget(group)
        return chosen, values

    def nearest_in(self, column: int, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(chosen, values) nearest to `target` in one column, [out_features] each."""
        order, levels, middles = self._levels(column)
        place = (target > middles).sum(axis=0, dtype=np.uint8)
        return order[place, self._rows], levels[place, self._rows]

    def _levels(self, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The sums of scaled levels in a column: their combinations, values in ascending order, midpoints.

        uint8, float32 [sums, out_features] and float32 [sums - 1, out_features]
        """
        part, group = column // self._part, column // self._width
        if part not in self._sorted:
            sums = np.zeros((self._combinations.shape[1], len(self._rows)), F32)
            for term, tables in enumerate(self._tables):
                scaled = tables.of(part) * self.scales[term, group]
                sums += scaled[self._combinations[term]]
            order = np.argsort(sums, axis=0, kind="stable")
            levels = np.take_along_axis(sums, order, axis=0)
            middles = (levels[1:] + levels[:-1]) * F32(0.5)
            self._sorted[part] = order.astype(np.uint8), levels, middles
        return self._sorted[part]

    def _forget(self, group: int) -> None:
        """Its scales have changed, or its codes are done."""
        for part in range(group * self._width // self._part, -(-(group + 1) * self._width // self._part)):
            self._sorted.pop(part, None)

    def storable(self, scales: np.ndarray) -> np.ndarray:
        """Scales [out_features, terms] as the numbers that their type holds, float32."""
        columns = [
            round_scale((scales[:, number] / term.tensor_scale).astype(F32), term.scale_type)
            * F32(term.tensor_scale)
            for number, term in enumerate(self.terms)
        ]
        return np.stack(columns, axis=1)

    def packed(self) -> PackedMatrix:
        terms = tuple(self._term(number, term) for number, term in enumerate(self.terms))
        return PackedMatrix(*self._matrix.shape, terms, self._matrix.format_name)

    def _term(self, number: int, term: CodeTerm) -> CodeTerm:
        scales = (self.scales[number] / F32(term.tensor_scale)).T + F32(0)
        return replace(
            term,
            codes=term.repack(np.ascontiguousarray(self._combinations[number][self.chosen].T)),
            scales=pack_groups(encode_scales(scales, term.scale_type)),
        )


class _Tables:
    """What the codes of a term stand for before its scale: levels less zero-points, times multipliers."""

    def __init__(self, term: CodeTerm, out_features: int):
        self._levels = term.levels
        self._selectors = None if term.selectors is None else unpack_groups(term.selectors, out_features)
        self._zeros = None if term.zero_points is None else unpack_groups(term.zero_points, out_features)
        packed = term.multipliers
        self._multipliers = None if packed is None else unpack_multipliers(packed, out_features)

    def of(self, part: int) -> np.ndarray:
        """float32 [levels, out_features], or [levels, 1] where all rows have the same."""
        table = self._levels[0][:, None]
        if self._selectors is not None:
            table = self._levels[self._selectors[:, part]].T
        if self._zeros is not None:
            table = table - self._zeros[:, part].astype(F32)
        if self._multipliers is not None:
            table = table * self._multipliers[:, part].astype(F32)
        return table
