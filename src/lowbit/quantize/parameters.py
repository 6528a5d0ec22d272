"""Scales, zero-points, tables and multipliers of a matrix, apart from its codes.

Methods that move codes about (gptq.py, refit.py) or search scales by what calibration saw (weighted.py) work
on these plain arrays; `pack` puts them and the codes back into terms.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.formats.scales import decode_scales, encode_scales
from lowbit.packed import (
    CodeTerm,
    PackedMatrix,
    pack_base3,
    pack_codes,
    pack_groups,
    pack_multipliers,
    unpack_groups,
)
from lowbit.packed.layout import unpack_multipliers
from lowbit.quantize.grid import F32, Grid, make_grid
from lowbit.quantize.search import inverse


@dataclass
class Parameters:
    """All of a matrix of code terms but its codes.

    format: its tables are the levels; one without floats
    in_features: of the weights it belongs to
    tensor_scale: multiplies all scales
    scales: float32 [terms, rows, super-groups], values that their storage type holds
    marks: uint8 [rows, groups]: zero-point, table or multiplier of each group, whichever the format has
    """

    format: Format
    in_features: int
    tensor_scale: float
    scales: np.ndarray
    marks: np.ndarray | None

    @classmethod
    def of(cls, matrix: PackedMatrix, format: Format) -> "Parameters":
        """Those of a matrix that round-to-nearest made."""
        terms = [term for term in matrix.terms if isinstance(term, CodeTerm)]
        rows = matrix.out_features
        stored = [decode_scales(unpack_groups(term.scales, rows), term.scale_type) for term in terms]
        marks: np.ndarray | None = None
        if terms[0].multipliers is not None:
            marks = unpack_multipliers(terms[0].multipliers, rows)
        for bytes_of_groups in (terms[0].zero_points, terms[0].selectors):
            if bytes_of_groups is not None:
                marks = unpack_groups(bytes_of_groups, rows)
        scales = np.stack(stored).astype(F32, copy=False)
        return cls(format, matrix.in_features, terms[0].tensor_scale, scales, marks)

    @classmethod
    def joined(cls, units: Sequence["Parameters"]) -> "Parameters":
        """Those of matrices that stand side by side."""
        marks = None if units[0].marks is None else np.concatenate([unit.marks for unit in units], axis=1)
        scales = np.concatenate([unit.scales for unit in units], axis=2)
        width = sum(unit.in_features for unit in units)
        return cls(units[0].format, width, units[0].tensor_scale, scales, marks)

    @property
    def rows(self) -> int:
        return self.scales.shape[1]

    @property
    def groups(self) -> int:
        """Groups of a row: inputs that share all parameters."""
        return self.in_features // (self.format.group_size or self.in_features)

    @property
    def width(self) -> int:
        """Inputs of a group."""
        return self.in_features // self.groups

    def steps(self) -> np.ndarray:
        """What levels are multiplied with: float32 [terms, rows, groups]."""
        steps = np.repeat(self.scales * F32(self.tensor_scale), self.groups // self.scales.shape[2], axis=2)
        if self.format.scale_type == "m4":
            assert self.marks is not None
            steps = steps * self.marks.astype(F32)
        return steps

    def rounding(self, group: int) -> "Rounding":
        """How the weights of one group are rounded."""
        marks = None if self.marks is None else self.marks[:, group]
        return Rounding(self.format, self._step(group), marks)

    def _step(self, group: int) -> np.ndarray:
        super_group = group * self.scales.shape[2] // self.groups
        step = self.scales[:, :, super_group] * F32(self.tensor_scale)
        if self.format.scale_type == "m4":
            assert self.marks is not None
            step = step * self.marks[:, group].astype(F32)
        return step

    def unit(self, number: int) -> "Parameters":
        """Those of super-group `number` alone."""
        units = self.scales.shape[2]
        groups = self.groups // units
        marks = None if self.marks is None else self.marks[:, number * groups : (number + 1) * groups]
        scales = self.scales[:, :, number : number + 1]
        return Parameters(self.format, self.in_features // units, self.tensor_scale, scales, marks)

    def nearest(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(codes uint8 [terms, in_features, rows], rounded float32 [in_features, rows]).

        weight: float32 [in_features, rows]: rows of it are columns of the matrix
        """
        codes = np.empty((self.format.terms, *weight.shape), np.uint8)
        rounded = np.empty_like(weight)
        for group in range(self.groups):
            here = slice(group * self.width, (group + 1) * self.width)
            codes[:, here], rounded[here] = self.rounding(group)(weight[here])
        return codes, rounded

    def values(self, codes: np.ndarray) -> np.ndarray:
        """Levels less zero-points: float32 [terms, rows, in_features] of codes of that shape."""
        grouped = codes.reshape(len(codes), self.rows, self.groups, self.width)
        levels = np.array(self.format.tables, F32)
        if len(levels) > 1:
            assert self.marks is not None
            values = levels[self.marks[None, :, :, None], grouped]
        else:
            values = levels[0][grouped]
        if self.format.zero_point:
            assert self.marks is not None
            values = values - self.marks[:, :, None].astype(F32)
        return values.reshape(codes.shape)

    def pack(self, codes: np.ndarray) -> PackedMatrix:
        """The matrix of these codes, uint8 [terms, rows, in_features]."""
        format = self.format
        m4 = format.scale_type == "m4"
        stored: dict[str, Any] = {}
        if self.marks is not None:
            name = "multipliers" if m4 else "zero_points" if format.zero_point else "selectors"
            stored[name] = (pack_multipliers if m4 else pack_groups)(np.ascontiguousarray(self.marks))
        if m4:
            stored["super_size"] = format.scale_size(self.in_features)
        terms = tuple(
            CodeTerm(
                bits=format.bits,
                levels=np.array(format.tables, F32),
                codes=pack_base3(part) if format.packing == "base3" else pack_codes(part, format.bits),
                scales=pack_groups(encode_scales(scales + F32(0), format.scale_type)),
                scale_type=format.scale_type,
                group_size=format.group_size,
                tensor_scale=self.tensor_scale,
                packing=format.packing,
                **stored,
            )
            for part, scales in zip(codes, self.scales, strict=True)
        )
        return PackedMatrix(self.rows, self.in_features, terms, format.name)


class Rounding:
    """The nearest levels, or sums of levels, for one group of inputs in every row.

    step: float32 [terms, rows], what levels are multiplied with; marks: uint8 [rows] or None
    """

    def __init__(self, format: Format, step: np.ndarray, marks: np.ndarray | None):
        self._grids = [make_grid(table) for table in format.tables]
        self._step = step[0]
        self._zero = self._selector = self._sums = None
        if format.zero_point:
            assert marks is not None
            self._zero = marks.astype(F32)
            self._inverse = [inverse(self._step)]
            self._top = F32(2**format.bits - 1)
            return
        self._inverse = [inverse(self._step * grid.step) for grid in self._grids]
        if len(self._grids) > 1:
            self._selector = marks
        if format.terms > 1:  # few terms of few levels: every sum of levels is tried
            levels = np.array(format.tables[0], F32)
            combinations = itertools.product(*[range(len(levels))] * format.terms)
            self._combinations = np.array(list(combinations), np.uint8)
            self._sums = np.zeros((len(self._combinations), step.shape[1]), F32)
            for number, scales in enumerate(step):
                self._sums += levels[self._combinations[:, number], None] * scales

    def __call__(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(codes uint8 [terms, .., rows], rounded float32 [.., rows]).

        values: float32 [rows] of one column, or [columns, rows]
        """
        if self._zero is not None:
            codes = np.rint(values * self._inverse[0])
            codes += self._zero
            np.clip(codes, F32(0), self._top, out=codes)
            return codes.astype(np.uint8)[None], self._step * (codes - self._zero)
        if self._sums is not None:
            columns = values.reshape(-1, values.shape[-1])
            best = np.abs(self._sums[:, None] - columns).argmin(axis=0)
            codes = np.moveaxis(self._combinations[best], -1, 0).reshape(-1, *values.shape)
            return codes, np.take_along_axis(self._sums, best, axis=0).reshape(values.shape)
        codes, rounded = self._nearest(values, self._grids[0], self._inverse[0])
        if self._selector is not None:
            for number in range(1, len(self._grids)):
                here = self._selector == number
                of_table = self._nearest(values, self._grids[number], self._inverse[number])
                codes, rounded = np.where(here, of_table[0], codes), np.where(here, of_table[1], rounded)
        return codes[None], rounded

    def _nearest(self, values: np.ndarray, grid: Grid, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = grid.nearest(values * inverse)
        return grid.codes[index], self._step * grid.levels[index]


def check_coded(format: Format, what: str) -> None:
    """Raise FormatError for plain floats, which have no scales."""
    if format.float_type is not None:
        raise FormatError(f"{what} to {format.name}: floats have no scales; use round-to-nearest")
