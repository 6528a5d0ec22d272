"""Methods for formats that are sums of terms: each its own start, then the stages of descent.py.

Binary-coded quantization (arXiv:1802.00150, for language models LUT-GEMM, arXiv:2206.09557) with an objective
of choice, ShiftAddLLM (arXiv:2406.05981), DB-LLM (arXiv:2402.11960) and PTQTP (arXiv:2509.16989).

The fit that looks at weights alone is round-to-nearest's for these formats (binary_coded.py,
dual_binary.py, trit_planes.py).
ShiftAddLLM's scale per column of all rows has no place in a group of inputs; its accuracy comes from
compensation here, and its power-of-two scales lie in groups as those of every format.
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.formats.tables import BINARY, SWITCHES, TERNARY
from lowbit.packed import PackedMatrix
from lowbit.quantize.descent import ROUNDS, descend, descent
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.statistics import Statistics

OBJECTIVES = ("weights", "diagonal", "hessian")


def bcq(
    weight: np.ndarray,
    format: Format,
    statistics: Statistics,
    *,
    objective: str = "hessian",
    rounds: int = ROUNDS,
) -> PackedMatrix:
    """Scaled signs with the least error of the weights, of the weights by their inputs' size, or of outputs.

    objective: "weights", "diagonal" (an error counts as the mean square of its input) or "hessian"
    """
    _check(format, "bcq", format.tables == (BINARY,), "scaled signs", "bcq3-g64")
    return _fit(weight, format, statistics, "bcq", objective, rounds)


def ptqtp(
    weight: np.ndarray,
    format: Format,
    statistics: Statistics,
    *,
    objective: str = "hessian",
    rounds: int = ROUNDS,
) -> PackedMatrix:
    """Scaled trits; objective "weights" is the published method: ridge least squares by turns with the best
    of the 9 sums, from a progressive start. Two planes take 3.2 bits in base 3 (groups of 64 n), else 4.
    """
    _check(format, "ptqtp", format.tables == (TERNARY,), "trit planes", "trit2-g64")
    return _fit(weight, format, statistics, "ptqtp", objective, rounds)


def dbllm(
    weight: np.ndarray,
    format: Format,
    statistics: Statistics,
    *,
    objective: str = "hessian",
    rounds: int = ROUNDS,
) -> PackedMatrix:
    """Two scaled planes of 0 and 1 for 2-bit integers. The published fine step trains both scales through the
    network and weights samples by the entropy of its predictions; here they are set for the output error of
    the matrix, in closed form, and the planes chosen again.
    """
    _check(format, "dbllm", format.tables == (SWITCHES,), "two planes of 0 and 1", "dual-g64")
    return _fit(weight, format, statistics, "dbllm", objective, rounds)


def shiftadd(
    weight: np.ndarray, format: Format, statistics: Statistics, *, rounds: int = ROUNDS
) -> PackedMatrix:
    """Signs times powers of two: products become shifts and sums."""
    power = format.tables == (BINARY,) and format.scale_type == "e8m0"
    _check(format, "shiftadd", power, "scaled signs with power-of-two scales", "bcq3-g64-e8m0")
    return _fit(weight, format, statistics, "shiftadd", "hessian", rounds)


def _check(format: Format, method: str, fits: bool, wants: str, example: str) -> None:
    if not fits:
        raise FormatError(f"{method} to {format.name}: it makes {wants}; take a format such as {example}")


def _fit(
    weight: np.ndarray, format: Format, statistics: Statistics, method: str, objective: str, rounds: int
) -> PackedMatrix:
    what = f"{method} to {format.name}"
    if objective not in OBJECTIVES:
        raise FormatError(f"{what}: objective={objective!r}; use one of {', '.join(OBJECTIVES)}")
    if objective == "weights":
        return round_to_nearest(weight, format)
    if objective == "hessian":
        return descent(weight, format, statistics, rounds=rounds)
    hessian = statistics.checked(weight.shape[1], what).hessian
    return descend(weight, np.diag(np.diag(hessian)), round_to_nearest(weight, format), rounds=0).matrix
