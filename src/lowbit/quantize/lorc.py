"""The error of any method, approximated by two thin matrices in 16 bit: LoRC.

ZeroQuant-V2 (arXiv:2303.08302, section 4; with floats ZeroQuant-FP, arXiv:2307.09782) takes the best product
of rank r for the weights' error, its singular vectors. Here an error may also count as its input's mean
square (LQER, arXiv:2402.02446), or as output error: with H = L L^T, tr(E H E^T) is the squared norm of E L,
so the best product is that of E L times L^-1.

Further rounds quantize what the product leaves and fit the product again (LoftQ, arXiv:2310.08659); the best
round stays.

Measured as in descent.py, rank 8 for int2-g96: rounded to nearest .0962 -> .0784, .0645, .0561 by objective
(weights, diagonal, hessian), 3 rounds .0516; after descent .0431 -> .0365, 3 rounds .0333. The matrices are
small, so rank 8 takes 0.69 bits per weight; as many bits in smaller groups do as much.
"""

from collections.abc import Callable

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.packed import LowRankTerm, PackedMatrix, pack_groups
from lowbit.packed.low_rank_term import MAX_RANK
from lowbit.quantize.gptq import damp
from lowbit.quantize.grid import F32
from lowbit.quantize.low_rank import decompose
from lowbit.quantize.side import with_term
from lowbit.quantize.statistics import Statistics

WEIGHTS, DIAGONAL, HESSIAN = OBJECTIVES = ("weights", "diagonal", "hessian")

Base = Callable[[np.ndarray, Format, Statistics], PackedMatrix]


def lorc(
    weight: np.ndarray,
    format: Format,
    statistics: Statistics,
    base: Base,
    rank: int = 8,
    objective: str = HESSIAN,
    rounds: int = 1,
) -> PackedMatrix:
    """What `base` makes of `weight`, plus the best product of rank `rank` for its error.

    Takes 16 * rank * (1 / in_features + 1 / out_features) bits per weight more than the base.
    """
    what = f"lorc to {format.name}"
    limit = min(*weight.shape, MAX_RANK)
    if not 1 <= rank <= limit:
        raise FormatError(f"{what}: rank={rank}; it must be 1 to {limit} for {list(weight.shape)}")
    if objective not in OBJECTIVES or rounds < 1:
        raise FormatError(
            f"{what}: objective={objective!r}, rounds={rounds}; "
            f"use one of {', '.join(OBJECTIVES)}, and 1 or more"
        )
    root, inverse = _root(statistics.checked(weight.shape[1], what).hessian, objective, what)
    best, least = None, np.inf
    product = np.zeros_like(weight)
    for _ in range(rounds):
        matrix = base(np.ascontiguousarray(weight - product), format, statistics)
        left, values, right = decompose((weight - matrix.dequantize()) @ root, rank)
        term = _term(left * np.sqrt(values), (np.sqrt(values)[:, None] * right) @ inverse)
        made = with_term(matrix, term, f"{matrix.format_name}+rank{rank}")
        product = term.dequantize(*weight.shape)
        error = float(np.square((weight - made.dequantize()) @ root, dtype=np.float64).sum())
        if error < least:
            best, least = made, error
    assert best is not None
    return best


def _root(hessian: np.ndarray, objective: str, what: str) -> tuple[np.ndarray, np.ndarray]:
    """L with L L^T what an error counts, of mean diagonal 1, and its inverse: float32 [in, in] each."""
    if objective == WEIGHTS:
        return (np.eye(len(hessian), dtype=F32),) * 2
    damped = damp(hessian, 0.01, what)
    damped /= np.diag(damped).mean()
    if objective == DIAGONAL:
        roots = np.sqrt(np.diag(damped))
        return np.diag(roots).astype(F32), np.diag(1 / roots).astype(F32)
    lower = np.linalg.cholesky(damped)
    return lower.astype(F32), np.linalg.inv(lower).astype(F32)


def _term(u: np.ndarray, v: np.ndarray) -> LowRankTerm:
    """u v with the largest numbers of both sides alike for each rank, which keeps them in fp16's range."""
    peaks = np.abs(u).max(axis=0), np.abs(v).max(axis=1)
    balance = np.sqrt(np.divide(peaks[1], peaks[0], out=np.ones_like(peaks[0]), where=peaks[0] > 0))
    balance[balance == 0] = 1
    return LowRankTerm(
        pack_groups((u * balance).astype(np.float16)),
        np.ascontiguousarray(v / balance[:, None]).astype(np.float16),
    )
