"""GPTQ: columns are rounded one after the other, and those to come make up for the error.

With H the Hessian of a layer's squared output error (x x^T summed over its inputs) and U the upper Cholesky
factor of its inverse, rounding column i leaves e = (w_i - q_i) / U_ii; the columns behind it become
w_j - e U_ij. The error of the result, tr((W - Q) H (W - Q)^T), is the sum of all e^2.
Source: arXiv:2210.17323, with its damping and lazy updates in blocks. Activation order (largest diagonal
first) needs scales that do not wait for the order: those of the original weights ("static groups").
"""

from dataclasses import dataclass

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.packed import PackedMatrix, check_group_size
from lowbit.quantize.columns import Unit, assemble, check_units, unit_size
from lowbit.quantize.grid import F32
from lowbit.quantize.native import largest_magnitude

ORDERS = ("given", "activation")
LAZY = 128  # columns whose corrections to all later ones are applied together


@dataclass(frozen=True)
class GPTQResult:
    """matrix: the quantized weights; error: tr((W - Q) H (W - Q)^T) with the damped Hessian."""

    matrix: PackedMatrix
    error: float


def gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    format: Format,
    order: str = "given",
    damping: float = 0.01,
    search: str = "mse",
    lazy: int = LAZY,
) -> GPTQResult:
    """Quantize `weight` to `format` with the least error on the inputs that `hessian` describes.

    weight: float32 [out_features, in_features], finite
    hessian: float [in_features, in_features], the sum of x x^T over inputs x; its scale does not matter
    order: "given", or "activation": columns with large activations first, scales of the original weights
    damping: added to the diagonal, as a share of its mean; raised tenfold until the factor exists
    lazy: columns to a block; the result does not depend on it but for rounding
    Columns without any activation (zero diagonal) are rounded to nearest and corrected by no other.
    Raises FormatError for shapes that do not match, weights or Hessians that are not finite.
    """
    what = f"gptq to {format.name}"
    check_units(format, what)
    if order not in ORDERS:
        raise FormatError(f"{what}: order={order!r}; use one of {', '.join(ORDERS)}")
    if weight.ndim != 2 or weight.dtype != F32 or 0 in weight.shape:
        raise FormatError(f"{what}: weight is {weight.dtype} {list(weight.shape)}; needs float32 [out, in]")
    out_features, in_features = weight.shape
    check_group_size(in_features, format.group_size, what)
    largest = largest_magnitude(np.ascontiguousarray(weight))
    if not np.isfinite(largest):
        raise FormatError(f"{what}: a weight is NaN or infinite; the checkpoint is damaged")
    damped = _damped(hessian, in_features, damping, what)
    width = unit_size(format, in_features)
    sequence = np.arange(in_features)
    units: list[Unit] = []
    if order == "activation":
        sequence = np.argsort(-np.diag(damped), kind="stable")
        units = [
            Unit(weight[:, first : first + width], format, search, largest)
            for first in range(0, in_features, width)
        ]
    factor = _inverse_factor(damped[np.ix_(sequence, sequence)], what)
    rest = np.ascontiguousarray(weight.T[sequence])  # rows are columns of the weight: [in_features, out]
    codes = np.empty((format.terms, out_features, in_features), np.uint8)
    error = 0.0
    for begin in range(0, in_features, lazy):
        end = min(begin + lazy, in_features)
        errors = np.empty((end - begin, out_features), F32)
        for i in range(begin, end):
            column = int(sequence[i])
            if order == "given" and column % width == 0:
                # What the columns of this unit lack of earlier blocks is in `rest`; of this block, in errors.
                ahead = rest[i : i + width].copy()
                if i > begin and end < i + width:
                    late = slice(end, min(i + width, in_features))
                    ahead[end - i :] -= factor[begin:i, late].T @ errors[: i - begin]
                units.append(Unit(ahead.T, format, search, largest))
            coded, rounded = units[column // width].round(column % width, rest[i])
            codes[:, :, column] = coded
            errors[i - begin] = (rest[i] - rounded) / factor[i, i]
            rest[i + 1 : end] -= factor[i, i + 1 : end, None] * errors[i - begin]
        rest[end:] -= factor[begin:end, end:].T @ errors
        error += float(np.square(errors, dtype=np.float64).sum())
    return GPTQResult(assemble(units, codes, format), error)


def _damped(hessian: np.ndarray, in_features: int, damping: float, what: str) -> np.ndarray:
    """Hessian with damping, float64; columns that no input uses get the mean diagonal."""
    if hessian.shape != (in_features, in_features):
        raise FormatError(
            f"{what}: the Hessian is {list(hessian.shape)}; needs [{in_features}, {in_features}] as the "
            "weight has in_features"
        )
    damped = hessian.astype(np.float64)
    diagonal = np.diag(damped)
    if not np.isfinite(damped).all() or (diagonal < 0).any():
        raise FormatError(f"{what}: the Hessian is not finite or has a negative diagonal; calibrate again")
    mean = float(diagonal.mean()) or 1.0
    unused = diagonal == 0
    damped[unused, :] = damped[:, unused] = 0
    damped[np.diag_indices(in_features)] += np.where(unused, mean, damping * mean)
    return damped


def _inverse_factor(damped: np.ndarray, what: str) -> np.ndarray:
    """Upper Cholesky factor of the inverse, float32 [in, in]."""
    mean = float(np.diag(damped).mean())
    for extra in (0.0, 0.1, 1.0, 10.0):
        try:
            stronger = damped + extra * mean * np.eye(len(damped))
            # With P the reversal of order, H = P L L^T P gives H^-1 = (P L^-T P) (P L^-1 P), and P L^-T P
            # is lower: its transpose is the upper factor.
            lower = np.linalg.cholesky(stronger[::-1, ::-1])
            return np.ascontiguousarray(np.linalg.inv(lower)[::-1, ::-1].astype(F32))
        except np.linalg.LinAlgError:
            continue
    raise FormatError(f"{what}: the Hessian has no Cholesky factor even when damped; calibrate on more text")
