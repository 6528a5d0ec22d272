"""The levels of one table, arranged so that the nearest one to a number is found fast.

Linear tables (integers of any kind) round and clip; others count the midpoints below the number. The
native quantizer does the same float32 operations in the same order, so both give the same codes.
"""

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from lowbit.errors import FormatError

F32 = np.float32
_LEVEL_LIMIT = 2.0**40  # squares of levels are summed in float32


@dataclass(frozen=True, eq=False)
class Grid:
    """One table of levels.

    With `step` > 0 the level of code c is step * (first + c), and numbers are handled in units of step;
    otherwise step is 1 for all purposes and `linear` is False.

    levels: float32 [n], ascending and distinct
    boundaries: float32 [n - 1]; a number takes the level whose index is the count of boundaries below it
    codes: uint8 [n], the code of each level
    top_inverse, bottom_inverse: 1 / largest level and 1 / smallest level; 0 if it is not above / below zero
    normal_scale: the scale with the least squared error on a standard normal distribution
    """

    levels: np.ndarray
    boundaries: np.ndarray
    codes: np.ndarray
    linear: bool
    step: np.float32
    first: np.float32
    top_inverse: np.float32
    bottom_inverse: np.float32
    symmetric: bool
    normal_scale: np.float32

    @property
    def roots(self) -> int:
        """The search tries 2**roots + 1 scales for each sign; their ratio is a repeated square root.

        Many uneven levels are those of small floats, which look alike at every scale.
        """
        if self.linear:
            return 5
        return 4 if len(self.levels) <= 16 else 3

    def nearest(self, x: np.ndarray) -> np.ndarray:
        """Index of the nearest level; x: float32, weight / (scale * step). Ties go to the even code."""
        if self.linear:
            return np.clip(np.rint(x - self.first), F32(0), F32(len(self.levels) - 1)).astype(np.int32)
        if len(self.levels) > 16:
            return np.searchsorted(self.boundaries, x.ravel(), side="left").reshape(x.shape)
        index = np.zeros(x.shape, np.uint8)
        for boundary in self.boundaries:  # few comparisons of whole vectors are faster than a search
            index += x > boundary
        return index

    def value(self, index: np.ndarray) -> np.ndarray:
        """Level in units of step, float32."""
        if self.linear:
            return index.astype(F32) + self.first
        return self.levels[index]

    def nearest_level(self, x: np.ndarray) -> np.ndarray:
        """The nearest level to each number, both in units of scale * step."""
        return self.value(self.nearest(x))


@lru_cache(maxsize=64)
def make_grid(table: tuple[float, ...]) -> Grid:
    """Arrange `table`, the levels of a format in code order."""
    levels, first_code = np.unique(np.asarray(table, np.float64), return_index=True)
    if float(np.abs(levels).max()) > _LEVEL_LIMIT:
        raise FormatError(
            f"quantize: level {float(np.abs(levels).max()):g} is above {_LEVEL_LIMIT:g}; "
            "divide all levels by a common factor, the scales make up for it"
        )
    codes = first_code.astype(np.uint8)
    step, first = _linear(table)
    levels32 = levels.astype(F32)
    top, bottom = float(levels[-1]), float(levels[0])
    grid = Grid(
        levels=levels32,
        boundaries=_boundaries(levels32.astype(np.float64), codes),
        codes=codes,
        linear=step > 0,
        step=F32(step or 1.0),
        first=F32(first),
        top_inverse=F32(1 / top if top > 0 else 0),
        bottom_inverse=F32(1 / bottom if bottom < 0 else 0),
        symmetric=bool(np.array_equal(levels, -levels[::-1])),
        normal_scale=F32(0),
    )
    return Grid(**(vars(grid) | {"normal_scale": _normal_scale(grid)}))


def _linear(table: tuple[float, ...]) -> tuple[float, float]:
    """(step, first) if level c is step * (first + c) with step a power of two and 2 * first an integer."""
    step = table[1] - table[0]
    if step <= 0 or np.frexp(step)[0] != 0.5 or not (2 * table[0] / step).is_integer():
        return 0.0, 0.0
    if abs(table[0] / step) > 256 or any(v != table[0] + step * c for c, v in enumerate(table)):
        return 0.0, 0.0
    return step, table[0] / step


def _boundaries(levels: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Midpoints in float32, lowered by one unit in the last place where a tie belongs to the upper level."""
    middle = ((levels[:-1] + levels[1:]) / 2).astype(F32)
    upper_is_even = (codes[1:] % 2 == 0) & (codes[:-1] % 2 == 1)
    return np.where(upper_is_even, np.nextafter(middle, F32(-np.inf)), middle)


def _normal_scale(grid: Grid) -> np.float32:
    """Best scale for a standard normal distribution, on a geometric grid of 2% steps."""
    quantiles = NormalDist()
    x = np.array([quantiles.inv_cdf((i + 0.5) / 1024) for i in range(1024)], F32)
    largest = 4.0 * max(float(grid.top_inverse), -float(grid.bottom_inverse))
    if largest == 0.0:
        return F32(0)
    scales = (largest * 0.98 ** np.arange(300)).astype(F32)
    grids = grid.value(grid.nearest(x[:, None] / (scales * grid.step))) * (scales * grid.step)
    return scales[int(np.argmin(np.square(grids - x[:, None]).sum(axis=0)))]
