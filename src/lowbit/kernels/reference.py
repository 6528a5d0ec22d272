"""The product of activations with a PackedMatrix, in NumPy: it defines what every kernel computes.

x: float32 [tokens, in_features]. With 8- or 16-bit activations each token's inputs are taken in groups of
64; a group has scale = amax / 127 (or / 16256) and integers a = round_even(x * (127 / amax)), in float32. A
16-bit integer is held as two int8 limbs, a = 128 * high + low with low in [-64, 63]. Levels become integers
too, level = unit * integer (see `integer_levels`), so that the sums

    P[t, o] = sum over i of a[t, i] * (integer[o, i] - zero_point[o])      over one segment of inputs

are exact. With m4 scales the integers are multiplier * integer, and the weight groups are the super-groups.
A segment is the intersection of an activation group and a weight group. The result is

    sum over segments of  activation_scale * (scale * tensor_scale * unit * P + offset * sum of a)

of which a kernel must reproduce the integer parts exactly and the rest to `matmul_tolerance`. A gathered term
does all this with the inputs in its own order.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from lowbit.errors import FormatError
from lowbit.packed import (
    CodeTerm,
    GatheredTerm,
    LowRankTerm,
    PackedMatrix,
    RowsTerm,
    SparseTerm,
    Term,
    unpack_groups,
    unpack_multipliers,
)

ACTIVATION_GROUP = 64
LIMB_BASE = 128
LARGEST = {8: 127, 16: 127 * LIMB_BASE}  # of an activation integer
LINEAR_MAX = 2000  # largest level that stays as it is: 2000 * 16256 * 64 products fit int32
_F32 = np.float32
_TINY = _F32(1e-30)  # a group whose largest magnitude is not above this counts as zero
_HALF_ULP = 2.0**-24


def quantize_activations(x: np.ndarray, activation_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(integers int32 [tokens, in_features], scales float32 [tokens, groups of 64])."""
    if activation_bits not in LARGEST:
        raise FormatError(f"quantize_activations: activation_bits={activation_bits}; use 8 or 16")
    tokens, in_features = x.shape
    groups = -(-in_features // ACTIVATION_GROUP)
    padded = np.zeros((tokens, groups * ACTIVATION_GROUP), _F32)
    padded[:, :in_features] = x
    padded = padded.reshape(tokens, groups, ACTIVATION_GROUP)
    largest = np.abs(padded).max(axis=2)
    top = _F32(LARGEST[activation_bits])
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(largest > _TINY, top / largest, _F32(0)).astype(_F32)
    integers = np.rint(padded * inverse[:, :, None]).astype(np.int32)
    return integers.reshape(tokens, -1)[:, :in_features], largest / top


def split_limbs(integers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(high, low) int8 with integers = 128 * high + low and low in [-64, 63]."""
    high = (integers + LIMB_BASE // 2) >> 7
    return high.astype(np.int8), (integers - LIMB_BASE * high).astype(np.int8)


def integer_levels(levels: np.ndarray) -> tuple[np.ndarray, float]:
    """Levels as integers: (int64 of the same shape, unit) with level = unit * integer.

    levels: float32 [tables, n]. One table of evenly spaced integers up to 2000 keeps unit 1. Otherwise the
    unit is the largest power of two in 2**8 .. 2**-24 that makes all of them integers of at most 127 (a
    signed byte), or of at most 16256 (two limbs); where none does, peak / 16256 with rounding to nearest
    even, which is off by at most peak / 32512.
    """
    wide = levels.astype(np.float64)
    steps = np.diff(wide[0])
    peak = float(np.abs(wide).max())
    whole = bool((wide == np.rint(wide)).all())
    if (
        len(wide) == 1
        and whole
        and abs(wide[0, 0]) <= 256
        and peak <= LINEAR_MAX
        and (len(steps) == 0 or (steps[0] != 0 and abs(steps[0]) < 256 and (steps == steps[0]).all()))
    ):
        return wide.astype(np.int64), 1.0
    for limit in (LARGEST[8], LARGEST[16]):
        for power in range(8, -25, -1):
            scaled = wide / 2.0**power
            if np.abs(scaled).max() <= limit and (scaled == np.rint(scaled)).all():
                return scaled.astype(np.int64), 2.0**power
    unit = float(_F32(peak) / _F32(LARGEST[16]))
    return np.rint(levels / _F32(unit)).astype(np.int64), unit


def segments(in_features: int, group_size: int) -> list[tuple[int, int]]:
    """[begin, end) of the inputs that share both a weight scale and an activation scale."""
    edges = set(range(0, in_features, ACTIVATION_GROUP)) | {in_features}
    if group_size:
        edges |= set(range(0, in_features, group_size))
    ordered = sorted(edges)
    return list(pairwise(ordered))


def integer_weights(term: CodeTerm, out_features: int, in_features: int) -> tuple[np.ndarray, float]:
    """(int64 [out_features, in_features], unit): the integers of the dot products, less zero-points and times
    the multipliers of m4 scales.
    """
    codes = term.unpack(out_features, in_features)
    integers, unit = integer_levels(term.levels)
    if term.selectors is None:
        weights = integers[0][codes]
    else:
        weights = integers[_per_input(term.selectors, out_features, in_features), codes]
    if term.zero_points is not None:
        weights = weights - _per_input(term.zero_points, out_features, in_features).astype(np.int64)
    if term.multipliers is not None:
        factors = unpack_multipliers(term.multipliers, out_features).astype(np.int64)
        weights = weights * np.repeat(factors, term.group_size, axis=1)
    return weights, unit


def integer_products(activations: np.ndarray, weights: np.ndarray, group_size: int) -> np.ndarray:
    """Exact sums, int64 [segments, tokens, out_features].

    activations: int32 [tokens, in_features]; weights: int64 [out_features, in_features].
    """
    wide = activations.astype(np.int64)
    parts = segments(activations.shape[1], group_size)
    return np.stack([wide[:, begin:end] @ weights[:, begin:end].T for begin, end in parts])


def matmul_reference(x: np.ndarray, matrix: PackedMatrix, activation_bits: int | None = 8) -> np.ndarray:
    """x @ matrix.T as float64 [tokens, out_features].

    x: float32 [tokens, in_features], finite
    activation_bits: 8 or 16, as described above; None: x is not quantized and all arithmetic is float64
    """
    return _product(x, matrix, activation_bits, magnitudes=False)


def matmul_tolerance(x: np.ndarray, matrix: PackedMatrix, activation_bits: int | None = 8) -> np.ndarray:
    """How far a float32 kernel may be from `matmul_reference`, float64 [tokens, out_features].

    A kernel adds S segment results in float32, in any order: at most S - 1 roundings of partial sums, each
    bounded by the sum of magnitudes M. A segment result itself takes at most 8 roundings (conversion of the
    sums of the limbs, their combination, the product of four scales, the offset). So
    |error| <= (S + 8) * 2^-24 * M to first order; doubled, which covers second-order terms and intermediate
    values that cancel. A term that reads float activations sums in_features products instead of S segments,
    and a low-rank one the products of the second factor on top.
    """
    lengths = [8]
    for term in matrix.terms:
        if isinstance(term, CodeTerm):
            lengths.append(len(segments(matrix.in_features, term.scale_size)) + 8)
        elif isinstance(term, RowsTerm):
            lengths.append(len(segments(matrix.in_features, term.codes.scale_size)) + 8)
        elif isinstance(term, GatheredTerm):
            lengths.append(len(segments(len(term.inputs), term.codes.scale_size)) + 8)
        elif isinstance(term, SparseTerm):
            lengths.append(len(segments(matrix.in_features, term.group_size)) + 8)
        else:
            lengths.append(matrix.in_features + (term.rank if isinstance(term, LowRankTerm) else 0))
    roundings = sum(lengths)
    return 2 * roundings * _HALF_ULP * _product(x, matrix, activation_bits, magnitudes=True)


def _product(
    x: np.ndarray, matrix: PackedMatrix, activation_bits: int | None, magnitudes: bool
) -> np.ndarray:
    """The product, or with `magnitudes` the sum of the magnitudes of everything that is added up."""
    if x.ndim != 2 or x.shape[1] != matrix.in_features:
        raise FormatError(
            f"matmul: x has shape {list(x.shape)}; required [tokens, {matrix.in_features}] for {matrix!r}"
        )
    absolute = np.abs if magnitudes else np.asarray
    out_features, in_features = matrix.shape
    exact = absolute(x.astype(np.float64))
    result = np.zeros((len(x), out_features))
    rounded = x
    if matrix.excluded is not None:  # codes do not see these inputs, and they widen nobody's step
        rounded = x.copy()
        rounded[:, matrix.excluded] = 0
    for term in matrix.terms:
        if isinstance(term, RowsTerm):
            some = PackedMatrix(len(term.rows), in_features, (term.codes,))
            result[:, term.rows] += _product(rounded, some, activation_bits, magnitudes)
            continue
        if isinstance(term, GatheredTerm):
            inner = PackedMatrix(out_features, len(term.inputs), (term.codes,))
            result += _product(term.gather(x), inner, activation_bits, magnitudes)
            continue
        if isinstance(term, SparseTerm):
            term = term.dense(out_features, in_features)
        if not isinstance(term, CodeTerm) or activation_bits is None:
            seen = absolute(rounded.astype(np.float64)) if term.quantized else exact
            result += _float_product(seen, term, matrix.shape, absolute)
            continue
        integers, scales = quantize_activations(rounded, activation_bits)
        integers = absolute(integers)
        weights, unit = integer_weights(term, out_features, in_features)
        sums = integer_products(integers, absolute(weights), term.scale_size)
        weight_scales = absolute(term.effective_scales(out_features).astype(np.float64)) * unit
        offsets = None
        if term.offsets is not None:
            offsets = absolute(term.effective_offsets(out_features).astype(np.float64))
        for (begin, end), total in zip(segments(in_features, term.scale_size), sums, strict=True):
            group = begin // term.scale_size if term.scale_size else 0
            part = total * weight_scales[:, group]
            if offsets is not None:
                part = part + integers[:, begin:end].sum(axis=1, keepdims=True) * offsets[:, group]
            result += part * scales[:, begin // ACTIVATION_GROUP, None].astype(np.float64)
    return result


def _float_product(x: np.ndarray, term: Term, shape: tuple[int, int], absolute: Callable) -> np.ndarray:
    """x, float64 [tokens, in_features], times a term's weights, or times their magnitudes."""
    if isinstance(term, LowRankTerm):
        u = unpack_groups(term.u, shape[0]).astype(np.float64)
        return x @ absolute(term.v.astype(np.float64)).T @ absolute(u).T
    return x @ absolute(term.dequantize(*shape).astype(np.float64)).T


def _per_input(packed: np.ndarray, out_features: int, in_features: int) -> np.ndarray:
    """A value per group, repeated for each of its inputs: [out_features, in_features]."""
    values = unpack_groups(packed, out_features)
    assert in_features % values.shape[1] == 0
    return np.repeat(values, in_features // values.shape[1], axis=1)
