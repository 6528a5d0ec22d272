"""A codebook for each matrix: its levels are the means of clusters of weights, weighted by what they cost.

Weights over the scales of their groups are clustered (k-means in one dimension on a histogram), each counted
by the mean square of its input; then scales for the levels and levels for codes and scales are found by
turns, as long as the weighted error falls. The levels are stored with the matrix: 4 * 2^bits bytes.

A 15M-parameter Llama, all layers quantized from statistics of the unquantized model: output error over that
of zeros (geometric mean over its matrices), and Kullback-Leibler divergence on another text:

                                 int3-g96         int2-g32
    rtn                       0.0268  0.633    0.0843  2.785
    imatrix                   0.0222  0.479
    kmeans                    0.0188  0.337
    gptq                      0.0145  0.351
    gptq:refit=4              0.0127  0.325    0.0408  1.055
    kmeans:refit=4            0.0111  0.240    0.0364  0.850

Source: SqueezeLLM, arXiv:2306.07629, which has a codebook for each row instead of scales of
groups, and the Fisher information in the place of the Hessian's diagonal.
"""

from dataclasses import replace

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.packed import CodeTerm, PackedMatrix
from lowbit.quantize.grid import F32
from lowbit.quantize.importance import relative, round_by_importance
from lowbit.quantize.parameters import Parameters, check_coded
from lowbit.quantize.search import inverse

BINS = 4096
PASSES = 50  # of k-means on the histogram


def kmeans(
    weight: np.ndarray, format: Format, importance: np.ndarray | None = None, rounds: int = 4
) -> PackedMatrix:
    """Quantize to a table of the matrix's own, with as many levels as the one of `format`.

    weight: float32 [out_features, in_features], finite
    importance: [in_features], what a squared error in each input's weights costs; None: 1
    rounds: of scales and levels by turns, at most
    Takes the storage of `format`. Raises FormatError for zero-points, several tables or terms, and m4 scales.
    """
    what = f"kmeans to {format.name}"
    check_coded(format, what)
    if format.terms > 1 or len(format.tables) > 1 or format.zero_point or format.scale_type == "m4":
        raise FormatError(f"{what}: it replaces one table with a scale per group; use one such as int4-g64")
    counts = relative(
        np.ones(weight.shape[1]) if importance is None else np.asarray(importance), weight.shape[1], what
    )
    best = round_by_importance(weight, format, counts)
    parameters = Parameters.of(best, format)
    best_error = _cost(weight, best, counts)
    levels = _clusters(weight, parameters, counts, len(set(format.tables[0])))
    packing = format.packing
    for _ in range(rounds):
        own = replace(format, name=f"{format.name}+kmeans", tables=(_spread(levels),))
        if own.packing != packing or len(set(own.tables[0])) < 2:
            break  # three levels that are -1, 0, 1 after all
        matrix = round_by_importance(weight, own, counts)
        error = _cost(weight, matrix, counts)
        if error >= best_error:
            break
        best, best_error = matrix, error
        levels = _means(weight, matrix, Parameters.of(matrix, own), counts, own)
    return best


def with_levels_of(matrix: PackedMatrix, format: Format) -> Format:
    """`format` with the table that `kmeans` found, for methods that choose codes and scales by themselves."""
    term = matrix.terms[0]
    assert isinstance(term, CodeTerm) and matrix.format_name is not None
    table = tuple(float(level) for level in term.levels[0])
    return replace(format, name=matrix.format_name, tables=(table,))


def _cost(weight: np.ndarray, matrix: PackedMatrix, counts: np.ndarray) -> float:
    return float((np.square(weight - matrix.dequantize()) @ counts).sum(dtype=np.float64))


def _spread(levels: np.ndarray) -> tuple[float, ...]:
    """Levels in float32, the largest 1."""
    return tuple(float(v) for v in np.sort(levels / np.abs(levels).max()).astype(F32))


def _clusters(weight: np.ndarray, parameters: Parameters, counts: np.ndarray, number: int) -> np.ndarray:
    """Levels float64 [number] for the weights over their scales, each counted with scale^2 counts."""
    step = np.repeat(parameters.steps()[0], parameters.width, axis=1)
    x = weight * inverse(step)
    mass = counts * np.square(step)
    low, high = float(x.min()), float(x.max())
    place = np.minimum(((x - low) * (BINS / max(high - low, 1e-30))).astype(np.int32), BINS - 1).ravel()
    masses = np.bincount(place, mass.ravel(), BINS) + 1e-300
    centres = np.bincount(place, (mass * x).ravel(), BINS) / masses
    # Start where each level has its share of the third root of the density, best for many levels.
    share = np.cumsum(np.cbrt(masses))
    levels = centres[np.searchsorted(share, share[-1] * (np.arange(number) + 0.5) / number)]
    for _ in range(PASSES):
        nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, centres)
        total = np.bincount(nearest, masses, number)
        new = np.where(
            total > 1e-200, np.bincount(nearest, masses * centres, number) / np.maximum(total, 1e-300), levels
        )
        if np.array_equal(new, levels):
            break
        levels = np.sort(new)
    return levels


def _means(
    weight: np.ndarray, matrix: PackedMatrix, parameters: Parameters, counts: np.ndarray, format: Format
) -> np.ndarray:
    """The best levels for these codes and scales, float64; a level without weights stays."""
    codes = matrix.terms[0].unpack(*matrix.shape).ravel()  # type: ignore[attr-defined]
    step = np.repeat(parameters.steps()[0], parameters.width, axis=1)
    old = np.array(format.tables[0])
    counted = counts * step
    bottom = np.bincount(codes, (counted * step).ravel(), len(old))
    top = np.bincount(codes, (counted * weight).ravel(), len(old))
    return np.where(bottom > 0, top / np.maximum(bottom, 1e-300), old)
