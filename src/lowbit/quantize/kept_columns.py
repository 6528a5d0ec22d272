"""Some inputs in 16 bit, the others in any format of codes.

LLM.int8() (arXiv:2208.07339) keeps the inputs whose activations were seen above a threshold, for the sake of
rounded activations: its values are the weights themselves, and activations are rounded without these inputs.

`salient` keeps those that matter most to the output, after "2-bit with 4-bit groups" (arXiv:2311.16442),
whose score is the Hessian times the range of the weights. A second, 4-bit term for whole inputs would carry a
mask of one bit per weight; 16 bit for a quarter as many inputs take no more than that. Being free
numbers, they make up for the error of all others: with c the kept inputs and q the others, the best values
are W_c + R_q H_qc H_cc^-1, and what is left to q is the error under the Schur complement of the Hessian,
H_qq - H_qc H_cc^-1 H_cq, for which their codes are found (descent.py).

Measured as in descent.py: int2-g96 .0422 in 2.17 bits; with 1, 3, 6% of the inputs .0386 in 2.33, .0357 in
2.66, .0332 in 3.12. Smaller groups do more on this model, whose inputs have no outliers: int2-g32 .0351
in 2.5.
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.packed import ColumnsTerm, PackedMatrix, pack_groups
from lowbit.quantize.descent import DAMPING, ROUNDS, Curvature, descend
from lowbit.quantize.gptq import damp
from lowbit.quantize.grid import F32
from lowbit.quantize.outliers import split_columns
from lowbit.quantize.parameters import check_coded
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.side import with_term
from lowbit.quantize.statistics import Statistics

QUIET = 1e-6  # share of the mean diagonal that stands for a kept input in the Hessian of the others


def llmint8(
    weight: np.ndarray,
    format: Format,
    statistics: Statistics,
    *,
    threshold: float = 6.0,
    search: str = "mse",
) -> PackedMatrix:
    """Inputs whose largest |x| is above `threshold` in 16 bit; where there are none, round-to-nearest.

    The published format is int8-row with 8-bit activations.
    """
    what = f"llmint8 to {format.name}"
    check_coded(format, what)
    columns = np.flatnonzero(statistics.checked(weight.shape[1], what).largest > threshold)
    if not columns.size:
        return round_to_nearest(weight, format, search)
    return split_columns(weight, format, columns, search=search)


def salient(
    weight: np.ndarray,
    format: Format,
    statistics: Statistics,
    *,
    fraction: float = 0.01,
    rounds: int = ROUNDS,
) -> PackedMatrix:
    """A `fraction` of the inputs in 16 bit, at least one: those of largest H_ii (max w_i - min w_i)^2.

    Takes 16 * fraction bits per weight more than `format`.
    """
    what = f"salient to {format.name}"
    check_coded(format, what)
    if not 0 < fraction < 1:
        raise FormatError(f"{what}: fraction={fraction}; it must be above 0 and below 1, such as 0.01")
    hessian = statistics.checked(weight.shape[1], what).hessian
    score = np.diag(hessian) * np.square(np.ptp(weight, axis=0))
    count = max(1, round(fraction * weight.shape[1]))
    columns = np.sort(np.argsort(-score, kind="stable")[:count])
    return keep_columns(weight, format, hessian, columns, rounds)


def keep_columns(
    weight: np.ndarray, format: Format, hessian: np.ndarray, columns: np.ndarray, rounds: int = ROUNDS
) -> PackedMatrix:
    """The inputs `columns` (ascending) in 16 bit, the others in `format`, with the least output error."""
    what = f"keep_columns with {format.name}"
    damped = damp(hessian, DAMPING, what)
    others = np.setdiff1d(np.arange(weight.shape[1]), columns)
    share = np.linalg.solve(damped[np.ix_(columns, columns)], damped[np.ix_(columns, others)])
    left = np.zeros_like(damped)
    left[columns, columns] = QUIET * np.diag(damped).mean()
    left[np.ix_(others, others)] = damped[np.ix_(others, others)] - damped[np.ix_(others, columns)] @ share
    rest = weight.copy()
    rest[:, columns] = 0
    start = round_to_nearest(rest, format)
    matrix = descend(rest, Curvature.of(left, 0.0, what), start, rounds=rounds).matrix
    error = weight[:, others] - matrix.dequantize()[:, others]
    with np.errstate(over="ignore"):  # with_term refuses it
        values = (weight[:, columns] + error @ share.T.astype(F32)).astype(np.float16)
    term = ColumnsTerm(columns.astype(np.uint32), pack_groups(values), True)
    return with_term(matrix, term, f"{format.name}+{len(columns)}columns")
