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


def awq(weights: Sequence[np.ndarray], hessian: np.ndarray, format: Format, search: str = "mse") -> AWQResult:
    """Find the channel factors for matrices that share their input.

    weights: float32 [out_features, in_features] each
    hessian: float [in_features, in_features], the sum of x x^T over inputs x
    Raises FormatError for shapes that do not match or values that are not finite.
    """
    hessian = np.asarray(hessian, F32)
    width = weights[0].shape[1]
    if hessian.shape != (width, width) or any(w.shape[1] != width for w in weights):
        raise FormatError(
            f"awq to {format.name}: weights of {[w.shape[1] for w in weights]} inputs and a Hessian "
            f"{list(hessian.shape)}; all must have the same inputs"
        )
    if not np.isfinite(hessian).all():
        raise FormatError(f"awq to {format.name}: the Hessian is not finite; calibrate again")
    loudness = np.sqrt(np.maximum(np.diag(hessian), 0))
    loudness = np.maximum(loudness, loudness.max() / RANGE) if loudness.any() else np.ones(width, F32)

    def error(factors: np.ndarray) -> float:
        total = 0.0
        for weight in weights:
            scaled = np.ascontiguousarray(weight * factors)
            rest = weight - round_to_nearest(scaled, format, search).dequantize() / factors
            total += float(np.vdot(rest @ hessian, rest))
        return total

    best, exponent = np.ones(width, F32), 0.0
    unscaled = lowest = error(best)
    for step in range(1, STEPS + 1):
        factors = loudness ** F32(step / STEPS)
        factors = (factors / np.sqrt(factors.max() * factors.min())).astype(F32)
        found = error(factors)
        if found < lowest:
            best, exponent, lowest = factors, step / STEPS, found
    return AWQResult(best, exponent, lowest, unscaled)
