"""The native quantizer: the same codes and scales as the NumPy version, many times faster.

Source: native/rtn.h, native/isa/rtn.cc.
"""

import numpy as np

from lowbit.formats import Format
from lowbit.formats.tables import SWITCHES
from lowbit.packed import BLOCK_ROWS, CodeTerm, PackedMatrix, base3_shape, codes_shape, group_count
from lowbit.packed.base3 import PADDING_BYTE
from lowbit.packed.layout import TILE_ROWS, block_count
from lowbit.packed.terms import SCALE_DTYPES
from lowbit.quantize import affine, multipliers, trit_planes
from lowbit.quantize.affine import normal_step
from lowbit.quantize.grid import F32, Grid, make_grid
from lowbit.quantize.scale import tensor_scale
from lowbit.quantize.search import LOWER, NORMAL_FRACTION, both_signs, starts_at_mean

try:
    from lowbit import _native
except ImportError:
    _native = None  # type: ignore[assignment]

MAX_COMBINATIONS = 256  # of the levels of all terms, as in native/rtn.h


def largest_magnitude(weight: np.ndarray) -> float:
    """Largest |weight|, in one pass; infinite or NaN if a weight is. weight: float32, C order."""
    if _native is None:
        return float(np.abs(weight).max())
    return float(_native.largest_magnitude(weight))


def quantize_native(
    weight: np.ndarray, format: Format, search: str, largest: float, counts: np.ndarray | None = None
) -> tuple[PackedMatrix, float] | None:
    """As `quantize_reference`, with equal codes and scales.

    weight: float32 [out_features, in_features], C order, finite; its group size fits
    largest: largest |weight|
    counts: float32 [in_features] or None
    Returns None for tables of unequal counts of distinct levels, for sums of terms with more than
    MAX_COMBINATIONS or of levels 0 and 1, and where the native module is not built.
    """
    grids = [make_grid(table) for table in format.tables]
    if _native is None or len({len(grid.levels) for grid in grids}) > 1:
        return None
    if format.terms > 1 and len(format.tables[0]) ** format.terms > MAX_COMBINATIONS:
        return None
    if format.terms > 1 and format.tables == (SWITCHES,):
        return None
    out_features, in_features = weight.shape
    divisor = tensor_scale(largest, format.max_level, format.scale_type)
    blocks, terms = block_count(out_features), format.terms  # terms follow one another
    if format.packing == "base3":  # filled for tiles without rows, which the native code leaves as they are
        shape = base3_shape(out_features, in_features)
        codes = np.full((terms * blocks, *shape[1:]), PADDING_BYTE, np.uint8)
    else:
        shape = codes_shape(out_features, in_features, format.bits)
        codes = np.zeros((terms * blocks, *shape[1:]), np.uint8)
    groups = (blocks, group_count(in_features, format.group_size), BLOCK_ROWS)
    together = groups[1] // group_count(in_features, format.scale_size(in_features))
    scales = np.zeros((terms * blocks, groups[1] // together, BLOCK_ROWS), SCALE_DTYPES[format.scale_type])
    m4 = format.scale_type == "m4"
    factors = np.zeros((*groups[:2], TILE_ROWS), np.uint8) if m4 else None
    zero_points = np.zeros(groups, np.uint8) if format.zero_point else None
    selectors = np.zeros(groups, np.uint8) if len(format.tables) > 1 else None
    error, squared = _native.round_to_nearest(
        weight,
        counts,
        codes,
        scales,
        zero_points,
        selectors,
        factors,
        digits=[float(x) for x in trit_planes.digits(terms)] if terms > 1 else [],
        bits=format.bits,
        group_size=format.group_size,
        together=together,
        scale_type="fp16" if m4 else format.scale_type,
        divisor=divisor,
        levels=np.stack([grid.levels for grid in grids]),
        boundaries=np.stack([grid.boundaries for grid in grids]),
        level_codes=np.stack([grid.codes for grid in grids]),
        parameters=np.stack([_parameters(grid, format) for grid in grids]),
        linear=all(grid.linear for grid in grids),
        both_signs=both_signs(grids[0], format.scale_type),
        mean_start=starts_at_mean(grids[0]),
        mse=search != "minmax",
        weigh=search == "mse",
        base3=format.packing == "base3",
    )
    parts = tuple(
        CodeTerm(
            bits=format.bits,
            levels=np.array(format.tables, F32),
            codes=codes[first : first + blocks],
            scales=scales[first : first + blocks],
            scale_type=format.scale_type,
            group_size=format.group_size,
            zero_points=zero_points,
            selectors=selectors,
            tensor_scale=divisor,
            packing=format.packing,
            multipliers=factors,
            super_size=format.scale_size(in_features) if m4 else 0,
        )
        for first in range(0, terms * blocks, blocks)
    )
    matrix = PackedMatrix(out_features, in_features, parts, format.name)
    return matrix, error / squared if squared else 0.0


def _parameters(grid: Grid, format: Format) -> np.ndarray:
    """What the native search needs to know of a table, in the order of `Parameter` in bind_quantize.cc."""
    normal = normal_step(format.bits) if format.zero_point else grid.normal_scale
    lower_cover = LOWER[format.bits] if grid.linear else 0.0
    return np.array(
        [
            grid.step,
            grid.first,
            grid.top_inverse,
            grid.bottom_inverse,
            F32(NORMAL_FRACTION) * normal,
            lower_cover,
            np.frexp(grid.levels[-1])[1],
            _roots(grid, format),
        ],
        F32,
    )


def _roots(grid: Grid, format: Format) -> int:
    if format.scale_type == "m4":
        return multipliers.ROOTS
    return affine.ROOTS if format.zero_point else grid.roots
