"""What other formats have to hold: whole numbers times a scale for each group.

Most stored schemes are, exactly,

    weight = scale[row, group] * (number[row, input] - zero_point[row, group]) + offset[row, group]

whatever their levels are called: bipolar or MX integers count in half or 64th steps, m4 multipliers belong to
the scale. A target that can hold the numbers, the scales and the groups holds the matrix to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lowbit.interop.slabs import rows_of
from lowbit.packed import CodeTerm, PackedMatrix, unpack_groups, unpack_multipliers

MAX_NUMBER = 1 << 10
_POWERS = range(4, -25, -1)  # of two, tried as the step of a table


@dataclass(frozen=True, eq=False)
class Integers:
    """A matrix as whole numbers times scales.

    matrix: holds the codes, in its only term
    table: int32 [levels], the number of each code
    scales: float32 [rows, groups]; group: inputs of each, the whole row where there is one
    zero_points: int32 [rows, groups] or None; offsets: float32 [rows, groups] or None
    """

    matrix: PackedMatrix
    table: np.ndarray
    scales: np.ndarray
    group: int
    zero_points: np.ndarray | None
    offsets: np.ndarray | None

    @property
    def least(self) -> int:
        """No number less its zero-point is below it."""
        return int(self.table.min()) - (0 if self.zero_points is None else int(self.zero_points.max()))

    @property
    def most(self) -> int:
        return int(self.table.max()) - (0 if self.zero_points is None else int(self.zero_points.min()))

    @property
    def columns(self) -> int:
        return self.matrix.in_features

    @property
    def consecutive(self) -> bool:
        """Is each number one more than the one before it?"""
        return bool((np.diff(self.table) == 1).all())

    def codes(self, first: int, count: int) -> np.ndarray:
        """uint8 [count, inputs]: indices into the table."""
        term = rows_of(self.matrix, first, count).terms[0]
        assert isinstance(term, CodeTerm)
        return term.unpack(count, self.columns)

    def numbers(self, first: int, count: int) -> np.ndarray:
        """int16 [count, inputs] of the rows from `first` on, a multiple of 32; zero-points taken off."""
        codes = self.codes(first, count)
        if self.consecutive:
            numbers = codes.astype(np.int16)
            numbers += np.int16(self.table[0])
        else:
            numbers = self.table.astype(np.int16)[codes]
        if self.zero_points is not None:
            zero_points = self.zero_points[first : first + count].astype(np.int16)
            numbers.reshape(*zero_points.shape, -1)[:] -= zero_points[:, :, None]
        return numbers

    def per(self, inputs: int) -> np.ndarray | None:
        """The scales of groups of `inputs`, float32 [rows, in / inputs]; None where a group has several."""
        return spread(self.scales, self.group, inputs, self.columns)

    def offsets_per(self, inputs: int) -> np.ndarray | None:
        return None if self.offsets is None else spread(self.offsets, self.group, inputs, self.columns)


def spread(values: np.ndarray, group: int, inputs: int, columns: int) -> np.ndarray | None:
    """Numbers of groups as numbers of other groups, smaller ones or larger ones of equal numbers."""
    if columns % inputs:
        return None
    if group % inputs == 0:
        return np.repeat(values, group // inputs, axis=1)
    if inputs % group:
        return None
    several = values.reshape(len(values), columns // inputs, inputs // group)
    return several[:, :, 0] if (several == several[:, :, :1]).all() else None


def integers(matrix: PackedMatrix) -> Integers | None:
    """The matrix as whole numbers times scales, None where it is none: floats, several terms or tables,
    levels that are no multiples of a power of two."""
    term = matrix.terms[0]
    if len(matrix.terms) > 1 or not isinstance(term, CodeTerm) or len(term.levels) > 1:
        return None
    found = _table(term.levels[0])
    if found is None:
        return None
    table, step = found
    rows, columns = matrix.shape
    scales = term.effective_scales(rows) * np.float32(step)
    group = term.scale_size or columns
    if term.multipliers is not None:
        factors = unpack_multipliers(term.multipliers, rows).astype(np.float32)
        scales = np.repeat(scales, group // term.group_size, axis=1) * factors
        group = term.group_size
    return Integers(
        matrix,
        table,
        scales,
        group,
        None if term.zero_points is None else unpack_groups(term.zero_points, rows).astype(np.int32),
        None if term.offsets is None else term.effective_offsets(rows),
    )


def halves(values: np.ndarray) -> np.ndarray | None:
    """The numbers as float16, None unless each is one exactly."""
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float16)
    return narrow if np.array_equal(narrow.astype(np.float32), values) else None


def _table(levels: np.ndarray) -> tuple[np.ndarray, float] | None:
    """(whole numbers, step), the step a power of two, as large as possible."""
    wide = levels.astype(np.float64)
    for power in _POWERS:
        numbers = np.ldexp(wide, -power)
        if (numbers == np.rint(numbers)).all():
            if np.abs(numbers).max() > MAX_NUMBER:
                return None
            return numbers.astype(np.int32), math.ldexp(1.0, power)
    return None
