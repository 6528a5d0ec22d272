"""HQQ: zero-points for which a norm of the error that forgives outliers is least; no data needed.

min over z of ||W - W_r||_p^p with p < 1 is split in two (half-quadratic): errors E that are set apart, which
shrink W - W_r towards 0 more the smaller they are, and the zero-point that is best for W - E:

    E = sign(x) max(|x| - |x|^(p - 1) / beta, 0),  x = W - W_r        z = mean(codes - (W - E) / scale)

with beta growing by kappa each time.
Source: M. Badri and A. Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023
(mobiusml.github.io/hqq_blog), with its p = 0.7, kappa = 1.01 and 20 iterations.

Errors are taken over the scale of their group, so that the size of the weights does not matter, and each
group keeps the best it has had. The authors' beta = 10 meets raw weights, where E is 0 for almost all; over
the scale, where errors are up to 1/2, beta = 1 does that.

Kullback-Leibler divergence of a 15M-parameter Llama, rounded to nearest and by HQQ, each from its own start
by min-max and by mse, and what the larger beta does to the latter:

                    min-max            mse              beta = 10
    int4a-g32    0.083  0.080     0.075  0.069            0.073
    int3a-g32    0.394  0.358     0.365  0.354            0.352
    int2a-g32    3.86   3.18      2.55   2.27             2.34

Formats without zero-points are refused. Their scales can be fitted in the same way, and lose by it (int3-g96
0.633 -> 1.04): the outliers that the norm forgives are then the large weights, which matter most.
"""

from dataclasses import replace

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format
from lowbit.packed import PackedMatrix, pack_groups
from lowbit.quantize.grid import F32
from lowbit.quantize.parameters import Parameters, check_coded
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.search import inverse
from lowbit.quantize.threads import in_threads


def hqq(
    weight: np.ndarray,
    format: Format,
    p: float = 0.7,
    beta: float = 1.0,
    kappa: float = 1.01,
    iterations: int = 20,
    start: str = "mse",
) -> PackedMatrix:
    """Quantize with the least sum of |error|^p, starting from what round-to-nearest finds.

    weight: float32 [out_features, in_features], finite
    start: its search, "mse" or "minmax"
    Offsets in fp16 take the place of zero-points, as those of HQQ are no integers.
    No group ends with a larger sum than it starts with.
    Raises FormatError for formats without zero-points.
    """
    what = f"hqq to {format.name}"
    check_coded(format, what)
    if not format.zero_point:
        raise FormatError(
            f"{what}: it has no zero-points, which are what hqq finds; use one such as int4a-g64"
        )
    if not 0 < p < 1 or beta <= 0 or kappa < 1 or iterations < 1:
        raise FormatError(
            f"{what}: p={p}, beta={beta}, kappa={kappa}, iterations={iterations}; "
            "p must be in 0 .. 1, beta positive, kappa and iterations at least 1"
        )
    parameters = Parameters.of(round_to_nearest(weight, format, start), format)
    units = parameters.scales.shape[2]
    width = parameters.in_features // units
    codes = np.empty((1, *weight.shape), np.uint8)
    betas = [beta * kappa**i for i in range(iterations)]
    offsets = np.empty((len(weight), units), np.float16)

    def fit(number: int) -> Parameters:
        here = slice(number * width, (number + 1) * width)
        w = np.ascontiguousarray(weight[:, here].T)
        unit = parameters.unit(number)
        found, offsets[:, number] = _offsets(w, unit, p, betas)
        codes[0, :, here] = found.T
        return unit

    matrix = Parameters.joined(in_threads(fit, range(units))).pack(codes)
    if not np.isfinite(offsets).all():
        raise FormatError(f"{what}: an offset is beyond fp16's range; scale the weights down")
    term = replace(matrix.terms[0], zero_points=None, offsets=pack_groups(offsets))  # type: ignore[type-var]
    return PackedMatrix(*matrix.shape, (term,), f"{format.name}+offsets")


def _loss(rest: np.ndarray, p: float) -> np.ndarray:
    """Sum of |rest|^p over axis 0."""
    return np.power(np.abs(rest), F32(p)).sum(axis=0)


def _apart(x: np.ndarray, p: float, beta: float) -> np.ndarray:
    """The errors that are set apart; x: errors over the scale."""
    size = np.maximum(np.abs(x), F32(1e-6))
    shrunk = np.maximum(size - np.power(size, F32(p - 1)) * F32(1 / beta), F32(0))
    return np.copysign(shrunk, x)


def _offsets(w: np.ndarray, unit: Parameters, p: float, betas: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8 [width, rows], offsets float16 [rows]). w: float32 [width, rows]"""
    assert unit.marks is not None
    top = F32(2**unit.format.bits - 1)
    step = unit.steps()[0, :, 0]
    over = inverse(step)
    x = w * over  # in code units

    def stored(zero: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return (-zero * step).astype(np.float16)

    def coded(offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes and errors over the scale."""
        away = x - offset.astype(F32) * over
        codes = np.clip(np.rint(away), F32(0), top)
        return codes, away - codes

    best = stored(unit.marks[:, 0].astype(F32))
    best_codes, error = coded(best)
    codes, least = best_codes, _loss(error, p)
    for beta in betas:
        offset = stored((codes - x + _apart(error, p, beta)).mean(axis=0))
        codes, error = coded(offset)
        loss = _loss(error, p)
        better = loss < least
        best, best_codes = np.where(better, offset, best), np.where(better, codes, best_codes)
        least = np.minimum(loss, least)
    return best_codes.astype(np.uint8), best
