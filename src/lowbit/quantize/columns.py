"""A matrix rounded column by column: what methods that correct the columns to come have in common.

Scales, zero-points, tables and multipliers are those that round-to-nearest finds for a *unit* of inputs (a
group, or with m4 scales a super-group) as it stands when its first column is due; then each column takes the
nearest levels under them.
"""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.packed import CodeTerm, PackedMatrix, unpack_groups
from lowbit.packed.layout import unpack_multipliers
from lowbit.quantize.grid import F32, make_grid
from lowbit.quantize.round_to_nearest import quantize_with_error
from lowbit.quantize.search import inverse


class Unit:
    """One unit of a matrix with its scales fixed.

    weight: float32 [out_features, width]; a unit of `format`, see `unit_size`
    largest: largest |weight| of the whole matrix, from which the scale of the tensor follows
    """

    def __init__(self, weight: np.ndarray, format: Format, search: str, largest: float):
        weight = np.ascontiguousarray(weight, F32)
        self.matrix = quantize_with_error(weight, format, search, largest=largest)[0]
        out_features, width = weight.shape
        self._terms = [_Fixed(term, format, out_features, width) for term in _code_terms(self.matrix)]
        combinations = itertools.product(*[range(len(format.tables[0]))] * format.terms)
        self._combinations = np.array(list(combinations), np.uint8) if format.terms > 1 else None

    def round(self, column: int, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(codes uint8 [terms, out_features], rounded float32 [out_features]) of one column.

        column: its place within the unit; values: float32 [out_features]
        """
        if self._combinations is None:
            codes, rounded = self._terms[0].nearest(column, values)
            return codes[None], rounded
        # Few terms of few levels: every sum of levels is tried.
        sums = np.zeros((len(self._combinations), len(values)), F32)
        for number, term in enumerate(self._terms):
            sums += term.levels[self._combinations[:, number], None] * term.scale(column)
        best = np.abs(sums - values).argmin(axis=0)
        return self._combinations[best].T, sums[best, np.arange(len(values))]


class _Fixed:
    """The parameters of one code term, per row and column, and the nearest level under them."""

    def __init__(self, term: CodeTerm, format: Format, out_features: int, width: int):
        scales = term.effective_scales(out_features)
        self._scales = np.repeat(scales, width // scales.shape[1], axis=1)
        if term.multipliers is not None:
            multipliers = unpack_multipliers(term.multipliers, out_features).astype(F32)
            self._scales = self._scales * np.repeat(multipliers, width // multipliers.shape[1], axis=1)
        self._zero = None if term.zero_points is None else unpack_groups(term.zero_points, out_features)
        self._selector = None if term.selectors is None else unpack_groups(term.selectors, out_features)
        self._grids = [make_grid(table) for table in format.tables]
        self._width, self._bits = width, format.bits
        self.levels = term.levels[0]

    def scale(self, column: int) -> np.ndarray:
        return self._scales[:, column]

    def _at(self, groups: np.ndarray, column: int) -> np.ndarray:
        return groups[:, column * groups.shape[1] // self._width]

    def nearest(self, column: int, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = self._scales[:, column]
        if self._zero is not None:
            zero = self._at(self._zero, column).astype(F32)
            codes = np.clip(np.rint(values * inverse(scale)) + zero, F32(0), F32(2**self._bits - 1))
            return codes.astype(np.uint8), scale * (codes - zero)
        codes = np.zeros(len(values), np.uint8)
        rounded = np.zeros(len(values), F32)
        selector = None if self._selector is None else self._at(self._selector, column)
        for number, grid in enumerate(self._grids):
            index = grid.nearest(values * inverse(scale * grid.step))
            level = grid.levels[index]
            here = slice(None) if selector is None else selector == number
            codes[here] = grid.codes[index][here]
            rounded[here] = (scale * level)[here]
        return codes, rounded


def unit_size(format: Format, in_features: int) -> int:
    """Inputs whose scales are found together; divides in_features."""
    return format.scale_size(in_features) or in_features


def check_units(format: Format, what: str) -> None:
    """Raise FormatError for plain floats, which have no scales to fix."""
    if format.float_type is not None:
        raise FormatError(f"{what} to {format.name}: floats have no scales; use round-to-nearest")


def assemble(units: list[Unit], codes: np.ndarray, format: Format) -> PackedMatrix:
    """One matrix of all units. codes: uint8 [terms, out_features, in_features]."""
    _, out_features, in_features = codes.shape
    terms = []
    for number in range(len(codes)):
        parts = [_code_terms(unit.matrix)[number] for unit in units]
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts], axis=1)
            for name, _ in parts[0].arrays()
            if name not in ("codes", "levels")
        }
        if parts[0].multipliers is not None:
            joined["super_size"] = format.scale_size(in_features)
        terms.append(replace(parts[0], codes=parts[0].repack(codes[number]), **joined))
    return PackedMatrix(out_features, in_features, tuple(terms), format.name)


def _code_terms(matrix: PackedMatrix) -> list[CodeTerm]:
    return [term for term in matrix.terms if isinstance(term, CodeTerm)]
