"""AWQ: input channels that carry large activations are scaled up before rounding, and down in what feeds
them.

For matrices that read the same input x, Q(W diag(s)) diag(1/s) x stands for W x; the factor 1/s is folded
into the operation before. s = a^r, where a is the root mean square of each channel, and the exponent r is
searched for the least squared output error, tr((W - Q) H (W - Q)^T). s = 1 is a candidate, so the result is
never worse than round-to-nearest on that error.
Source: arXiv:2306.00978, eq. 4 and 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.quantize.grid import F32
from lowbit.quantize.round_to_nearest import round_to_nearest

STEPS = 20  # exponents 1/20, 2/20, .. 1
RANGE = F32(1e4)  # between the smallest and the largest factor


@dataclass(frozen=True)
class AWQResult:
    """factors: float32 [in_features], multiply the weights' columns and divide the input; exponent: r;
    error, unscaled_error: output errors with and without them."""

    factors: np.ndarray
    exponent: float
    error: float
    unscaled_error: float


def awq(
    weights: Sequence[np.ndarray],
    hessian: np.ndarray,
    format: Format | Sequence[Format],
    search: str = "mse",
    shared: np.ndarray | None = None,
) -> AWQResult:
    """Find the channel factors for matrices that share their input.

    weights: float32 [out_features, in_features] each
    hessian: float [in_features, in_features], the sum of x x^T over inputs x
    format: of all matrices, or of each
    shared: int [in_features]; channels with the same number get the same factor, made of the mean square or
        of the largest of their magnitudes, whichever errs less. None: every channel has its own
    Raises FormatError for shapes that do not match or values that are not finite.
    """
    formats = [format] * len(weights) if isinstance(format, Format) else list(format)
    what = f"awq to {formats[0].name}"
    hessian = np.asarray(hessian, F32)
    width = weights[0].shape[1]
    if hessian.shape != (width, width) or any(w.shape[1] != width for w in weights):
        raise FormatError(
            f"{what}: weights of {[w.shape[1] for w in weights]} inputs and a Hessian "
            f"{list(hessian.shape)}; all must have the same inputs"
        )
    if len(formats) != len(weights):
        raise FormatError(f"{what}: {len(weights)} matrices and {len(formats)} formats; give one for each")
    if not np.isfinite(hessian).all():
        raise FormatError(f"{what}: the Hessian is not finite; calibrate again")

    def error(factors: np.ndarray) -> float:
        total = 0.0
        for weight, form in zip(weights, formats, strict=True):
            scaled = np.ascontiguousarray(weight * factors)
            rest = weight - round_to_nearest(scaled, form, search).dequantize() / factors
            total += float(np.vdot(rest @ hessian, rest))
        return total

    best, exponent = np.ones(width, F32), 0.0
    unscaled = lowest = error(best)
    for loudness in _loudness(np.sqrt(np.maximum(np.diag(hessian), 0)), shared):
        for step in range(1, STEPS + 1):
            factors = loudness ** F32(step / STEPS)
            factors = (factors / np.sqrt(factors.max() * factors.min())).astype(F32)
            found = error(factors)
            if found < lowest:
                best, exponent, lowest = factors, step / STEPS, found
    return AWQResult(best, exponent, lowest, unscaled)


def _loudness(magnitudes: np.ndarray, shared: np.ndarray | None) -> list[np.ndarray]:
    """What the factors are powers of: magnitudes [in_features], those of channels that share made one."""
    if not magnitudes.any():
        return []
    if shared is None:
        choices = [magnitudes]
    else:
        largest = np.zeros(int(shared.max()) + 1, F32)
        np.maximum.at(largest, shared, magnitudes)
        counts = np.maximum(np.bincount(shared), 1)
        mean = np.sqrt(np.bincount(shared, np.square(magnitudes)) / counts).astype(F32)
        choices = [mean[shared], largest[shared]]
    return [np.maximum(choice, choice.max() / RANGE) for choice in choices]
