"""emulate: round an array to a number format and get floats back.

Plain rounding looks at each number alone. With groups, numbers of the last axis that lie together share a
scale, as in a quantized matrix; the scale is chosen here by a plain rule (see `group_scales`), while
`lowbit.quantize` searches for a better one.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import tables
from lowbit.formats.format import Format
from lowbit.formats.minifloat import FLOAT_TYPES, Minifloat, parse_minifloat
from lowbit.formats.multipliers import MAX_MULTIPLIER, super_size
from lowbit.formats.parse import parse_format, split_name
from lowbit.formats.rounding import check_rounding, round_to_integers, round_to_table
from lowbit.formats.scales import check_scale_type, decode_scales, encode_scales

# Elements whose levels mean something without a scale. Others (MX, BitMoD, zero-points) come in groups.
_PLAIN_ELEMENT = re.compile(r"int\db?|ternary|nf4|shift\d")


def emulate(
    x: Any,
    format: str | Format | Minifloat,
    rounding: str = "nearest_even",
    group_size: int | None = None,
    scale_type: str | None = None,
    seed: int | np.random.Generator | None = None,
) -> np.ndarray:
    """Round an array of any shape to `format`; same shape and float dtype (integers and lists give float64).

    format: a name, a Format or a Minifloat. The name of an element alone (`e3m2`, `e8m10`, `int4`, `nf4`)
        with neither group_size nor scale_type rounds plainly. A name with a suffix (`e3m2-g32`), a published
        format (`mxfp4`) or a Format rounds in groups; the two arguments override group size and scale type.
    rounding: one of `rounding.ROUNDINGS`; scales are always rounded to nearest even.
    group_size: any number above 0, the last group of a row may be shorter; 0: a whole row of the last axis.
    seed: of stochastic rounding; None differs each time.

    Plain overflow is that of an ml_dtypes cast: infinity (e5m2, e4m3, fp16), NaN (e4m3fn, fnuz, e8m0),
    the largest value (finite formats, integers, tables); NaN stays NaN in minifloats. Rounding is done in
    float64, once; a float32 or float16 result too large for the dtype of `x` is infinity.
    In groups, numbers beyond the scaled levels take the last one.
    Raises FormatError for an unknown format, for NaN where no NaN exists, and for NaN or infinity in groups;
    UnsupportedError for formats of several terms, which are fits rather than roundings.
    """
    check_rounding(rounding)
    values = np.asarray(x)
    if values.dtype.kind not in "fiub" or values.dtype.itemsize > 8:
        raise FormatError(
            f"emulate: dtype {values.dtype} is not supported; convert to float16, float32 or float64"
        )
    dtype = values.dtype if values.dtype.kind == "f" else np.dtype(np.float64)
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes quiet
        wide = values.astype(np.float64)
    rng = np.random.default_rng(seed) if rounding == "stochastic" else None
    target = _resolve(format, group_size, scale_type)
    if isinstance(target, Minifloat):
        result = target.round(wide, rounding, rng)
    elif isinstance(target, tuple):
        if np.isnan(wide).any():
            raise FormatError(
                f"emulate({format!r}): the input holds NaN, which no level stands for; remove it"
            )
        result = _round_levels(wide, target, rounding, rng)
    else:
        group = target.group_size if group_size is None else group_size
        result = _round_groups(wide, target, group, scale_type or target.scale_type, rounding, rng)
    with np.errstate(over="ignore"):
        return np.asarray(result).astype(dtype)


def group_scales(
    groups: np.ndarray, counts: np.ndarray, table: tuple[float, ...], scale_type: str
) -> np.ndarray:
    """Return a scale per group, float64, before it is rounded to its type.

    groups: float64 [..., group_size], padded with zeros; counts: numbers in each group, broadcastable.
    Binary and ternary: the mean magnitude (BitNet b1.58, arXiv:2402.17764). e8m0: the power of two that
    brings the exponent of the largest magnitude to that of the largest level (OCP Microscaling Formats
    v1.0 section 6.3).
    Otherwise the smallest scale at which the levels cover the group.
    """
    if table in (tables.BINARY, tables.TERNARY):
        return np.abs(groups).sum(axis=-1) / counts
    if scale_type == "e8m0":
        magnitude = np.abs(groups).max(axis=-1)
        exponent = np.frexp(magnitude)[1] - np.frexp(max(table))[1]
        return np.where(magnitude > 0, np.ldexp(1.0, np.maximum(exponent, -127)), 0.0)
    top, bottom = max(table), min(table)
    scale = np.zeros(groups.shape[:-1])
    if top > 0:
        scale = np.maximum(scale, groups.max(axis=-1) / top)
    if bottom < 0:
        scale = np.maximum(scale, groups.min(axis=-1) / bottom)
    return scale


def _resolve(
    format: str | Format | Minifloat, group_size: int | None, scale_type: str | None
) -> Minifloat | tuple[float, ...] | Format:
    """Return what to round to: a Minifloat or a table (plain), or a Format (in groups)."""
    grouped = group_size is not None or scale_type is not None
    if group_size is not None and group_size < 0:
        raise FormatError(f"emulate: group_size={group_size}, must be positive, or 0 for whole rows")
    if scale_type is not None:
        check_scale_type(scale_type)
        if scale_type == "m4":
            raise FormatError("emulate: scale_type='m4'; name it in the format, as in 'int4-g16-m4'")
    if isinstance(format, Minifloat):
        format = format.name
    if isinstance(format, str):
        base, group, scale = split_name(format)
        element = parse_minifloat("e2m1" if base == "fp4" else base)
        if not grouped and group is None and scale is None:
            if element is not None:
                return element
            if _PLAIN_ELEMENT.fullmatch(base):
                return parse_format(base).tables[0]
    fmt = parse_format(format)
    if fmt.float_type is not None:
        if grouped:
            raise FormatError(
                f"emulate({fmt.name!r}): plain floats have no groups; leave group_size and scale_type out"
            )
        return FLOAT_TYPES[fmt.float_type]
    if fmt.terms > 1:
        raise UnsupportedError(
            f"emulate({fmt.name!r}): a sum of {fmt.terms} terms is fitted to a matrix, not rounded;"
            f" use lowbit.quantize(x, {fmt.name!r}).dequantize()"
        )
    return fmt


def _round_levels(
    x: np.ndarray, table: tuple[float, ...], rounding: str, rng: np.random.Generator | None
) -> np.ndarray:
    """Round float64 numbers to the levels of a table; those beyond it take its end."""
    step = tables.linear_step(table)
    if step is None:
        return np.asarray(table)[round_to_table(x, table, rounding, rng)]
    integers = np.clip(round_to_integers(x / step, rounding, rng), table[0] / step, table[-1] / step)
    return integers * step + 0.0  # minus zero becomes zero


def _round_groups(
    x: np.ndarray,
    fmt: Format,
    group_size: int,
    scale_type: str,
    rounding: str,
    rng: np.random.Generator | None,
) -> np.ndarray:
    if not np.isfinite(x).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise FormatError(
            f"emulate({fmt.name!r}): x{list(where)} is infinite or NaN, which has no scale; remove it"
        )
    if x.size == 0:
        return x.copy()
    length = x.shape[-1] if x.ndim else 1
    size = group_size or length
    n_groups = -(-length // size)
    rows = x.reshape(-1, length)
    groups = np.zeros((len(rows), n_groups * size))
    groups[:, :length] = rows
    groups = groups.reshape(len(rows), n_groups, size)
    counts = np.minimum(size, length - size * np.arange(n_groups))
    if fmt.zero_point:
        result = _round_asymmetric(groups, fmt.bits, scale_type, rounding, rng)
    else:
        result = _round_tables(groups, counts, fmt, scale_type, rounding, rng)
    return result.reshape(len(rows), -1)[:, :length].reshape(x.shape)


def _round_asymmetric(
    groups: np.ndarray, bits: int, scale_type: str, rounding: str, rng: np.random.Generator | None
) -> np.ndarray:
    """scale = (max - min) / (2**bits - 1) over a range with zero, zero_point = round(-min / scale)."""
    low = np.minimum(groups.min(axis=-1), 0.0)
    high = np.maximum(groups.max(axis=-1), 0.0)
    top = 2**bits - 1
    scales, safe = _stored_scales((high - low) / top, scale_type)
    zero_points = np.clip(np.rint(-low / safe), 0, top)[..., None]
    codes = np.clip(round_to_integers(groups / safe[..., None], rounding, rng) + zero_points, 0, top)
    return (codes - zero_points) * scales[..., None]


def _round_tables(
    groups: np.ndarray,
    counts: np.ndarray,
    fmt: Format,
    scale_type: str,
    rounding: str,
    rng: np.random.Generator | None,
) -> np.ndarray:
    """Round by the table of the format, of several by the one with the least squared error per group."""
    best = np.empty_like(groups)
    least = np.full(groups.shape[:-1], np.inf)
    for table in fmt.tables:
        wanted = group_scales(groups, counts, table, scale_type)
        if scale_type == "m4":
            scales, safe = _stored_products(wanted, int(counts.sum()), groups.shape[-1])
        else:
            scales, safe = _stored_scales(wanted, scale_type)
        rounded = _round_levels(groups / safe[..., None], table, rounding, rng) * scales[..., None]
        error = np.square(rounded - groups).sum(axis=-1)
        better = error < least
        best[better], least[better] = rounded[better], error[better]
    return best


def _stored_scales(scales: np.ndarray, scale_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 scales as stored, and the same with 1.0 for 0.0, to divide by.

    e4m3 scales get a scale per tensor, float32, that brings the largest to 448 (NVFP4).
    """
    tensor_scale = 1.0
    if scale_type == "e4m3" and scales.max() > 0:
        tensor_scale = float(np.float32(scales.max() / 448.0)) or 1.0
    stored = decode_scales(encode_scales(scales / tensor_scale, scale_type), scale_type)
    wide = stored.astype(np.float64) * tensor_scale
    return wide, np.where(wide == 0.0, 1.0, wide)


def _stored_products(scales: np.ndarray, in_features: int, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return m4 scales times multipliers, and the same with 1.0 for 0.0: float64, [rows, groups] as `scales`.

    The largest group of a super-group takes multiplier 15, others the smallest that does not fall short.
    """
    groups = scales.shape[-1]
    together = super_size(in_features, group_size) // group_size or groups
    grouped = scales.reshape(-1, groups // together, together)
    shared, safe = _stored_scales(grouped.max(axis=-1, keepdims=True) / MAX_MULTIPLIER, "m4")
    wide = (shared * np.minimum(np.ceil(grouped / safe), MAX_MULTIPLIER)).reshape(scales.shape)
    return wide, np.where(wide == 0.0, 1.0, wide)
