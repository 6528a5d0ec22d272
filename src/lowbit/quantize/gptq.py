"""GPTQ: columns are rounded one after the other, and those to come make up for the error.

With H the Hessian of a layer's squared output error (x x^T summed over its inputs) and U the upper Cholesky
factor of its inverse, rounding column i leaves e = (w_i - q_i) / U_ii; the columns behind it become
w_j - e U_ij. The error of the result, tr((W - Q) H (W - Q)^T), is the sum of all e^2.
Source: arXiv:2210.17323, with its damping and lazy updates in blocks. Activation order (largest diagonal
first) needs scales that do not wait for the order: those of the original weights ("static groups").

Scales searched with the cost of each column, not alike for all, lower the output error further. Matrices of
one layer of a 15M-parameter Llama, output error over that of zeros, geometric mean (order given):

                                    int2-g32   int3-g96   int4-g32   bcq2-g96   ternary-g96
    round to nearest                 0.0854     0.0274    0.00514     0.1055      0.1743
    scales of the weights            0.0547     0.0170    0.00315     0.0649      0.1096
    scales by cost                   0.0480     0.0148    0.00288     0.0538      0.0888
    and 4 rounds of descent.py       0.0422     0.0131    0.00262     0.0457
"""

from dataclasses import dataclass

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.packed import PackedMatrix, check_group_size
from lowbit.quantize.grid import F32
from lowbit.quantize.importance import round_by_importance
from lowbit.quantize.native import largest_magnitude
from lowbit.quantize.parameters import Parameters, Rounding, check_coded
from lowbit.quantize.round_to_nearest import quantize_with_error

ORDERS = ("given", "activation")
SCALES = ("hessian", "weights")
LAZY = 32  # columns whose corrections to all later ones are applied together


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian; matrices that read the same input share it.

    order: int [in_features], the sequence of columns
    upper: float32 [in_features, in_features], upper Cholesky factor of the inverse, in that order
    """

    order: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True)
class GPTQResult:
    """matrix: the quantized weights; error: tr((W - Q) H (W - Q)^T) with the damped Hessian."""

    matrix: PackedMatrix
    error: float


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray | Factor,
    format: Format,
    order: str = "given",
    damping: float = 0.01,
    search: str = "mse",
    lazy: int = LAZY,
    scales: str = "hessian",
) -> GPTQResult:
    """Quantize `weight` to `format` with the least error on the inputs that `hessian` describes.

    weight: float32 [out_features, in_features], finite
    hessian: float [in_features, in_features], the sum of x x^T over inputs x; its scale does not matter. Or
        what `factorise` made of it, then with the same order
    order: "given", or "activation": columns with large activations first, scales of the original weights
    damping: added to the diagonal, as a share of its mean; raised tenfold until the factor exists
    search: "mse" or "minmax", as for round-to-nearest
    lazy: columns to a block; the result does not depend on it but for rounding
    scales: "hessian": mse counts each column's error by what it costs the output once the columns behind have
        made up for what they can, 1 / U_ii^2; "weights": as for round-to-nearest
    Columns without any activation (zero diagonal) are rounded to nearest and corrected by no other.
    Raises FormatError for shapes that do not match, weights or Hessians that are not finite.
    """
    what = f"gptq to {format.name}"
    check_coded(format, what)
    if order not in ORDERS:
        raise FormatError(f"{what}: order={order!r}; use one of {', '.join(ORDERS)}")
    if scales not in SCALES:
        raise FormatError(f"{what}: scales={scales!r}; use one of {', '.join(SCALES)}")
    if weight.ndim != 2 or weight.dtype != F32 or 0 in weight.shape:
        raise FormatError(f"{what}: weight is {weight.dtype} {list(weight.shape)}; needs float32 [out, in]")
    out_features, in_features = weight.shape
    check_group_size(in_features, format.group_size, what)
    largest = largest_magnitude(np.ascontiguousarray(weight))
    if not np.isfinite(largest):
        raise FormatError(f"{what}: a weight is NaN or infinite; the checkpoint is damaged")
    factor = hessian if isinstance(hessian, Factor) else factorise(hessian, order, damping, what)
    if len(factor.order) != in_features:
        raise FormatError(
            f"{what}: the Hessian is {[len(factor.order)] * 2}; needs [{in_features}, {in_features}] as the "
            "weight has in_features"
        )
    upper = factor.upper
    costs = np.empty(in_features, F32)
    costs[factor.order] = 1 / np.square(np.diag(upper))
    mode = "hessian" if (search, scales) == ("mse", "hessian") else search
    columns = _Columns(weight, format, mode, largest, costs, order == "activation")
    inverse = F32(1) / np.diag(upper)
    rest = np.ascontiguousarray(weight.T[factor.order])  # rows are columns of the weight: [in_features, out]
    codes = np.empty((in_features, format.terms, out_features), np.uint8)
    error = 0.0
    for begin in range(0, in_features, lazy):
        end = min(begin + lazy, in_features)
        errors = np.empty((end - begin, out_features), F32)
        for i in range(begin, end):
            column = int(factor.order[i])
            if columns.wants(column):
                # What the columns of this unit lack of earlier blocks is in `rest`; of this block, in errors.
                last = i + columns.unit
                ahead = rest[i:last].copy()
                if i > begin:
                    ahead -= upper[begin:i, i:last].T @ errors[: i - begin]
                columns.give(column, ahead.T)
            now = rest[i]
            if i > begin:
                now -= upper[begin:i, i] @ errors[: i - begin]
            codes[column], rounded = columns.rounding(column)(now)
            np.multiply(now - rounded, inverse[i], out=errors[i - begin])
        rest[end:] -= upper[begin:end, end:].T @ errors
        error += float(np.square(errors, dtype=np.float64).sum())
    matrix = columns.parameters().pack(np.ascontiguousarray(codes.transpose(1, 2, 0)))
    return GPTQResult(matrix, error)


class _Columns:
    """The parameters of each unit of columns: a group, or with m4 scales a super-group.

    costs: float32 [in_features], what a squared error of each column adds to that of the output
    static: found for the original weights; otherwise for those that `give` hands over when they are due.
    """

    def __init__(
        self, weight: np.ndarray, format: Format, search: str, largest: float, costs: np.ndarray, static: bool
    ):
        in_features = weight.shape[1]
        self._format, self._search, self._largest, self._costs = format, search, largest, costs
        self.unit = format.scale_size(in_features) or in_features
        self._units: list[Parameters] = []
        self._roundings: dict[int, Rounding] = {}
        if static:
            self.unit = in_features
            self.give(0, weight)

    def wants(self, column: int) -> bool:
        return column // self.unit == len(self._units)

    def give(self, column: int, weight: np.ndarray) -> None:
        part = np.ascontiguousarray(weight, F32)
        if self._search == "hessian":
            costs = self._costs[column : column + part.shape[1]]
            matrix = round_by_importance(part, self._format, costs, "plain", self._largest)
        else:
            matrix = quantize_with_error(part, self._format, self._search, largest=self._largest)[0]
        self._units.append(Parameters.of(matrix, self._format))

    def rounding(self, column: int) -> Rounding:
        """How to round `column`, whose unit is there."""
        group = column // self._units[0].width
        if group not in self._roundings:
            unit = self._units[column // self.unit]
            self._roundings[group] = unit.rounding(group % unit.groups)
        return self._roundings[group]

    def parameters(self) -> Parameters:
        return Parameters.joined(self._units)


def factorise(hessian: np.ndarray, order: str, damping: float, what: str = "gptq") -> Factor:
    """Order of columns and factor of the damped Hessian. Parameters as for `gptq`."""
    damped = damp(hessian, damping, what)
    sequence = np.arange(len(damped))
    if order == "activation":
        sequence = np.argsort(-np.diag(damped), kind="stable")
    return Factor(sequence, _inverse_factor(damped[np.ix_(sequence, sequence)], what))


def damp(hessian: np.ndarray, damping: float, what: str) -> np.ndarray:
    """Hessian with damping, float64; columns that no input uses get the mean diagonal."""
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise FormatError(f"{what}: the Hessian is {list(hessian.shape)}; needs [in_features, in_features]")
    damped = hessian.astype(np.float64)
    diagonal = np.diag(damped)
    if not np.isfinite(damped).all() or (diagonal < 0).any():
        raise FormatError(f"{what}: the Hessian is not finite or has a negative diagonal; calibrate again")
    mean = float(diagonal.mean()) or 1.0
    unused = diagonal == 0
    damped[unused, :] = damped[:, unused] = 0
    damped[np.diag_indices(len(damped))] += np.where(unused, mean, damping * mean)
    return damped


def _inverse_factor(damped: np.ndarray, what: str) -> np.ndarray:
    """Upper Cholesky factor of the inverse, float32 [in, in]."""
    mean = float(np.diag(damped).mean())
    for extra in (0.0, 0.1, 1.0, 10.0):
        try:
            stronger = damped + extra * mean * np.eye(len(damped)) if extra else damped
            # With P the reversal of order, H = P L L^T P gives H^-1 = (P L^-T P) (P L^-1 P), and P L^-T P
            # is lower: its transpose is the upper factor.
            lower = np.linalg.cholesky(stronger[::-1, ::-1])
            return np.ascontiguousarray(_inverse_of_lower(lower)[::-1, ::-1].astype(F32))
        except np.linalg.LinAlgError:
            continue
    raise FormatError(f"{what}: the Hessian has no Cholesky factor even when damped; calibrate on more text")


def _inverse_of_lower(lower: np.ndarray) -> np.ndarray:
    """Inverse of a lower triangular matrix by halves: a third of the work of one that may be full."""
    half = len(lower) // 2
    if half < 32:
        return np.linalg.inv(lower)
    first, last = _inverse_of_lower(lower[:half, :half]), _inverse_of_lower(lower[half:, half:])
    below = -last @ (lower[half:, :half] @ first)
    return np.block([[first, np.zeros((half, len(lower) - half))], [below, last]])
