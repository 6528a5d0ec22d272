"""Round-to-nearest for every format: arrays in, PackedMatrix out.

Single-term formats search the scale of each group (search.py, affine.py, multipliers.py); formats of several
terms are fitted (binary_coded.py, dual_binary.py, trit_planes.py); plain floats are converted. NumPy works
through the matrix in chunks of rows; where the native quantizer knows the format, it gives the same codes and
scales many times faster.
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.formats.scales import encode_scales
from lowbit.formats.tables import BINARY, SWITCHES, TERNARY
from lowbit.packed import (
    CodeTerm,
    EntropyTerm,
    FloatTerm,
    PackedMatrix,
    check_group_size,
    group_count,
    pack_base3,
    pack_codes,
    pack_groups,
    pack_multipliers,
    pack_values,
)
from lowbit.quantize.affine import affine_codes, search_affine
from lowbit.quantize.binary_coded import fit_planes
from lowbit.quantize.dual_binary import fit_dual
from lowbit.quantize.grid import F32, make_grid
from lowbit.quantize.multipliers import search_multipliers, units
from lowbit.quantize.native import largest_magnitude, quantize_native
from lowbit.quantize.scale import tensor_scale
from lowbit.quantize.search import Fit, inverse, search_scales, total
from lowbit.quantize.threads import in_threads
from lowbit.quantize.trit_planes import fit_trits

SEARCHES = ("mse", "minmax")
FIT = {BINARY: fit_planes, TERNARY: fit_trits, SWITCHES: fit_dual}  # sums of terms, by their levels
_CHUNK_WEIGHTS = 1 << 16  # weights that NumPy handles at a time: what a search reads stays in the cache


def round_to_nearest(weight: np.ndarray, format: Format, search: str = "mse") -> PackedMatrix:
    """Round each group of `weight` to the nearest levels of `format`.

    weight: float32 [out_features, in_features], finite
    search: "mse" (scale of least squared error, in which large weights count more, see search.py) or
        "minmax" (scale that covers the group)
    Formats of several terms are always fitted by least squares.
    Raises FormatError if the group size does not divide in_features or a weight is not finite.
    """
    return quantize_with_error(weight, format, search)[0]


def quantize_with_error(
    weight: np.ndarray,
    format: Format,
    search: str = "mse",
    what: str = "quantize",
    largest: float | None = None,
) -> tuple[PackedMatrix, float]:
    """(matrix, squared error / squared weights). `what` opens error messages, e.g. with a tensor's name.

    largest: largest magnitude of the whole tensor where `weight` is a part of it; None: that of `weight`
    """
    if search not in SEARCHES:
        raise FormatError(f"{what}: search={search!r}; use one of {', '.join(SEARCHES)}")
    if weight.ndim != 2 or weight.dtype != F32 or 0 in weight.shape:
        raise FormatError(
            f"{what}: received {weight.dtype} {list(weight.shape)}; needs float32 [out_features, in_features]"
        )
    weight = np.ascontiguousarray(weight)
    own = largest_magnitude(weight)
    if not np.isfinite(own):
        check_finite(weight, what)
    largest = own if largest is None else max(own, largest)
    if format.float_type is not None:
        return _to_floats(weight, format, largest, what)
    check_group_size(weight.shape[1], format.group_size, f"{what} to {format.name}")
    fast = quantize_native(weight, format, search, largest)
    return fast or quantize_reference(weight, format, search, largest)


def check_finite(weight: np.ndarray, what: str) -> None:
    """Raise FormatError that names the first weight that is NaN or infinite."""
    rows = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    for first in range(0, len(weight), rows):
        part = weight[first : first + rows]
        if np.isfinite(part).all():
            continue
        row, column = (int(i) for i in np.argwhere(~np.isfinite(part))[0])
        raise FormatError(
            f"{what}: weight[{first + row}, {column}] is {part[row, column]}; every weight must be finite: "
            "the checkpoint is damaged or was trained to divergence"
        )


def quantize_reference(
    weight: np.ndarray, format: Format, search: str, largest: float, counts: np.ndarray | None = None
) -> tuple[PackedMatrix, float]:
    """The definition in NumPy. weight: float32, finite, largest magnitude `largest`; its group size fits.

    counts: float32 [in_features], times which a squared error in each input counts in the search; None: 1
    """
    out_features, in_features = weight.shape
    groups = group_count(in_features, format.group_size)
    supers = format.scale_size(in_features)
    divisor = tensor_scale(largest, format.max_level, format.scale_type)
    codes = np.empty((format.terms, out_features, in_features), np.uint8)
    scales = np.empty((format.terms, out_features, group_count(in_features, supers)), F32)
    bytes_of_groups = {
        name: np.empty((out_features, groups), np.uint8)
        for name, stored in (
            ("zero_points", format.zero_point),
            ("selectors", len(format.tables) > 1),
            ("multipliers", format.scale_type == "m4"),
        )
        if stored
    }
    together = groups // scales.shape[2]
    step = max(1, _CHUNK_WEIGHTS // in_features)

    def fit_rows(first: int) -> float:
        """Fill the arrays for some rows from `first` on; returns their squared error."""
        rows = slice(first, min(first + step, out_features))
        part = weight[rows] / F32(divisor)
        shape = (len(part), groups)
        w = np.ascontiguousarray(part.reshape(*shape, -1).transpose(2, 0, 1).reshape(-1, len(part) * groups))
        each = None if counts is None else np.tile(counts.reshape(groups, -1).T, (1, len(part)))
        part_codes, part_scales, part_bytes, errors = _fit(w, format, search, together, each)
        for term in range(format.terms):
            codes[term, rows] = part_codes[term].T.reshape(len(part), in_features)
            scales[term, rows] = part_scales[term].reshape(len(part), -1)
        for values in bytes_of_groups.values():
            values[rows] = part_bytes.reshape(shape)
        return float(errors.sum(dtype=np.float64))

    squared_error = sum(in_threads(fit_rows, range(0, out_features, step)))
    squared = float(np.square(weight, dtype=np.float64).sum())
    packed_bytes = {
        name: pack_multipliers(values) if name == "multipliers" else pack_groups(values)
        for name, values in bytes_of_groups.items()
    }
    levels = np.array(format.tables, F32)
    terms = tuple(
        CodeTerm(
            bits=format.bits,
            levels=levels,
            codes=pack_base3(part) if format.packing == "base3" else pack_codes(part, format.bits),
            scales=pack_groups(encode_scales(scales[term] + F32(0), format.scale_type)),
            scale_type=format.scale_type,
            group_size=format.group_size,
            tensor_scale=divisor,
            packing=format.packing,
            super_size=supers if format.scale_type == "m4" else 0,
            **packed_bytes,  # type: ignore[arg-type]
        )
        for term, part in enumerate(codes)
    )
    matrix = PackedMatrix(out_features, in_features, terms, format.name)
    return matrix, squared_error * divisor**2 / squared if squared else 0.0


def _fit(
    w: np.ndarray, format: Format, search: str, together: int, counts: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Fit N groups, of which `together` neighbours share an m4 scale.

    Returns codes [terms, group_size, N], scales [terms, N / together], a byte [N] (zero-point, selector or
    multiplier, where the format has one) and errors [N].
    """
    none = np.zeros(w.shape[1], np.uint8)
    if format.terms > 1:
        codes, scales = FIT[format.tables[0]](w, format.terms, format.scale_type, counts)
        values = np.array(format.tables[0], F32)[codes] * scales[:, None]
        return codes, scales, none, np.square(w - values.sum(axis=0)).sum(axis=0)
    if format.zero_point:
        fit = search_affine(w, format.bits, format.scale_type, search, counts)
        codes = affine_codes(w, fit.scales, fit.zero_points, format.bits).astype(np.uint8)
        errors = total(np.square(w - fit.scales * (codes.astype(F32) - fit.zero_points)))
        return codes[None], fit.scales[None], fit.zero_points.astype(np.uint8), errors
    if format.scale_type == "m4":
        grid = make_grid(format.tables[0])
        shared = search_multipliers(w, grid, format.bits, together, search, counts)
        unit = units(shared, grid)
        index = grid.nearest(w * inverse(unit))
        errors = total(np.square(w - unit * grid.value(index)))
        return grid.codes[index][None], shared.scales[None], shared.multipliers.astype(np.uint8), errors
    codes, fit = _fit_table(w, format, 0, search, counts)
    selected = none
    for number in range(1, len(format.tables)):
        new_codes, new_fit = _fit_table(w, format, number, search, counts)
        better = new_fit.errors < fit.errors
        selected = np.where(better, np.uint8(number), selected)
        codes = np.where(better, new_codes, codes)
        fit.keep(new_fit.scales, new_fit.zero_points, new_fit.errors)
    levels = np.array(format.tables, F32)[selected, codes]
    return codes[None], fit.scales[None], selected, total(np.square(w - fit.scales * levels))


def _fit_table(
    w: np.ndarray, format: Format, number: int, search: str, counts: np.ndarray | None
) -> tuple[np.ndarray, Fit]:
    """(codes [group_size, N], fit) with one of the tables of `format`."""
    grid = make_grid(format.tables[number])
    fit = search_scales(w, grid, format.bits, format.scale_type, search, counts)
    return grid.codes[grid.nearest(w * inverse(fit.scales * grid.step))], fit


def _to_floats(weight: np.ndarray, format: Format, largest: float, what: str) -> tuple[PackedMatrix, float]:
    """Convert to fp32, fp16 or bf16, rounding to nearest even."""
    assert format.float_type is not None
    if format.float_type == "fp16":
        if largest >= 65520:
            raise FormatError(
                f"{what} to fp16: the largest weight {largest:g} rounds above 65504; use bf16 or fp32"
            )
        values = weight.astype(np.float16)
    elif format.float_type == "bf16":
        bits = weight.view(np.uint32)
        if format.coded:
            return _to_coded(weight, format, what), 0.0
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    else:
        values = weight
    matrix = PackedMatrix(
        weight.shape[0], weight.shape[1], (FloatTerm(format.float_type, pack_values(values)),), format.name
    )
    if format.float_type == "fp32":
        return matrix, 0.0
    squared = float(np.square(weight, dtype=np.float64).sum())
    error = float(np.square(matrix.dequantize() - weight, dtype=np.float64).sum())
    return matrix, error / squared if squared else 0.0


def _to_coded(weight: np.ndarray, format: Format, what: str) -> PackedMatrix:
    """Code bfloat16 weights, which the float32 array must hold exactly."""
    bits = weight.view(np.uint32)
    inexact = bits & 0xFFFF != 0
    if inexact.any():
        row, column = (int(i) for i in np.argwhere(inexact)[0])
        raise FormatError(
            f"{what} to {format.name}: weight[{row}, {column}] is {weight[row, column]}, which is no "
            "bfloat16, so it cannot be kept; take bf16, which rounds, or quantize the result of that"
        )
    term = EntropyTerm.of((bits >> 16).astype(np.uint16))
    return PackedMatrix(weight.shape[0], weight.shape[1], (term,), format.name)
