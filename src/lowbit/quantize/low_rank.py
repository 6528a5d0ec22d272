"""The error of any format, approximated by two thin matrices in 16 bit: LoRC (ZeroQuant-V2,
arXiv:2303.08302, section 4), and with `importance` the activation-aware form of LQER (arXiv:2402.02446).
"""

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format, parse_format
from lowbit.packed import LowRankTerm, PackedMatrix, pack_groups
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.side import checked_importance, checked_weight, with_term

_EXACT = 1024  # the smaller side up to which the decomposition is exact
_EXTRA = 16  # more directions than asked for, and
_PASSES = 6  # passes over them, in the randomized one (arXiv:0909.4061)


def low_rank(
    weight: np.ndarray,
    format: Format | str,
    rank: int = 16,
    importance: np.ndarray | None = None,
    search: str = "mse",
) -> PackedMatrix:
    """`weight` rounded to the nearest levels of `format`, plus the best rank-`rank` part of what that loses.

    weight: float32 [out_features, in_features], finite
    importance: [in_features], how much an error of each input's weights counts, e.g. the root mean square of
        its activations; None: all alike. The error is decomposed after multiplication with it
    Singular vectors take the square root of their value each, which keeps both factors in fp16's range.
    """
    weight, format = checked_weight(weight, "low_rank"), parse_format(format)
    if not 1 <= rank <= min(weight.shape):
        raise FormatError(f"low_rank: rank={rank}; it must be 1 to {min(weight.shape)} for {weight.shape}")
    matrix = round_to_nearest(weight, format, search)
    factors = np.ones(weight.shape[1])
    if importance is not None:
        factors = np.maximum(checked_importance(importance, weight.shape[1], "low_rank"), 1e-6)
        factors /= factors.max()
    error = (weight - matrix.dequantize()) * factors.astype(np.float32)
    left, values, right = decompose(error, rank)
    roots = np.sqrt(values)
    term = LowRankTerm(
        pack_groups((left * roots).astype(np.float16)),
        np.ascontiguousarray(roots[:, None] * right / factors).astype(np.float16),
    )
    return with_term(matrix, term, f"{format.name}+rank{rank}")


def decompose(a: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest `rank` singular triples of `a`: ([m, rank], [rank], [rank, n])."""
    if min(a.shape) <= _EXACT:
        left, values, right = np.linalg.svd(a, full_matrices=False)
    else:  # subspace iteration from a fixed seed
        start = np.random.default_rng(0).standard_normal((a.shape[1], rank + _EXTRA)).astype(np.float32)
        basis = np.linalg.qr(a @ start)[0]
        for _ in range(_PASSES):
            basis = np.linalg.qr(a @ np.linalg.qr(a.T @ basis)[0])[0]
        inner, values, right = np.linalg.svd(basis.T @ a, full_matrices=False)
        left = basis @ inner
    return left[:, :rank], values[:rank], right[:rank]
