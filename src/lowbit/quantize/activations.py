"""Activation methods: what rounding the inputs of a matrix does to them, on arrays.

A method prepares a rounding from a sample of inputs, float32 [tokens, in_features] (None if it needs none):

    prepare(sample, *, options) -> round;  round(x) -> (rounded x, bits per number)

Bits are true ones: scales that change with the token count as 16 each, what is fixed by calibration does not.
A product of rounded inputs and rounded weights is what a kernel of that kind computes; here it is emulated
with floats, for comparing methods. One function per method and a line in ACTIVATIONS.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lowbit.errors import FormatError, RequestError
from lowbit.formats import Format
from lowbit.quantize.grid import F32, make_grid
from lowbit.quantize.methods import Value

Round = Callable[[np.ndarray], tuple[np.ndarray, float]]
SCALE_BITS = 16  # of a scale that is found while running, fp16
_SHRINKS = tuple(F32(1 - i / 32) for i in range(26))  # of a range, when searched: 1 to 0.22
_SAMPLE = 1024  # tokens that a search looks at, spread over all


@dataclass(frozen=True)
class Activation:
    """prepare: see the head of this file; calibrated: whether it needs a sample; source: where published."""

    prepare: Callable[..., Round]
    calibrated: bool
    summary: str
    source: str

    def options(self) -> dict[str, Value]:
        """Names and defaults of its options."""
        parameters = inspect.signature(self.prepare).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def round_integers(x: np.ndarray, bits: int) -> np.ndarray:
    """Each row of float32 x [.., n] to integers -(2**(bits-1) - 1) .. 2**(bits-1) - 1 times an fp16 scale."""
    return _to_integers(x, np.abs(x).max(axis=-1, keepdims=True) / F32(_top(bits)), bits)


def round_ranges(x: np.ndarray, bits: int) -> np.ndarray:
    """Each row of float32 x [.., n] to integers 0 .. 2**bits - 1 times an fp16 scale plus an fp16 minimum."""
    low = np.clip(x.min(axis=-1, keepdims=True), F32(-65504), F32(65504)).astype(np.float16).astype(F32)
    scale = _stored((x.max(axis=-1, keepdims=True) - low) / F32(2**bits - 1))
    codes = np.clip(np.rint((x - low) / np.where(scale > 0, scale, F32(1))), 0, 2**bits - 1)
    return np.asarray(codes * scale + low, F32)


def grouped(x: np.ndarray, size: int, what: str) -> np.ndarray:
    """x [.., n] as [.., n / size, size]; size 0: one group. FormatError where size does not divide n."""
    size = size or x.shape[-1]
    if x.shape[-1] % size:
        raise FormatError(f"{what}: groups of {size} do not divide {x.shape[-1]} channels; give a divisor")
    return x.reshape(*x.shape[:-1], -1, size)


def _top(bits: int) -> int:
    if not 2 <= bits <= 16:
        raise RequestError(f"round activations: bits={bits}; give 2 to 16")
    return 2 ** (bits - 1) - 1


def _stored(scale: np.ndarray) -> np.ndarray:
    """Scales as fp16 holds them; beyond its range the largest."""
    return np.minimum(scale, F32(65504)).astype(np.float16).astype(F32)


def _to_integers(x: np.ndarray, scale: np.ndarray, bits: int, store: bool = True) -> np.ndarray:
    scale = _stored(scale) if store else scale
    top = F32(_top(bits))
    codes = np.clip(np.rint(x / np.where(scale > 0, scale, F32(1))), -top, top)
    return np.asarray(codes * scale, F32)


def _few(sample: np.ndarray) -> np.ndarray:
    """At most _SAMPLE tokens from all over the sample."""
    if len(sample) <= _SAMPLE:
        return sample
    return sample[np.linspace(0, len(sample) - 1, _SAMPLE).astype(np.int64)]


def _token(sample: np.ndarray | None, *, bits: int = 8) -> Round:
    _top(bits)
    return lambda x: (round_integers(x, bits), bits + SCALE_BITS / x.shape[-1])


def _group(sample: np.ndarray | None, *, bits: int = 8, group: int = 32) -> Round:
    _top(bits)

    def round(x: np.ndarray) -> tuple[np.ndarray, float]:
        parts = grouped(x, group, "round activations")
        return round_integers(parts, bits).reshape(x.shape), bits + SCALE_BITS / parts.shape[-1]

    return round


def _static(sample: np.ndarray, *, bits: int = 8, per: str = "tensor", search: str = "mse") -> Round:
    """One symmetric range, fixed by the sample: of the tensor, or of each channel.

    search: "minmax" covers the sample, "mse" shrinks the range to the least squared error on it
    """
    if per not in ("tensor", "channel") or search not in ("mse", "minmax"):
        raise RequestError(
            f"round activations: static:per={per},search={search}; give per=tensor or channel and "
            "search=mse or minmax"
        )
    axis = 0 if per == "channel" else None
    scale = peak = np.abs(sample).max(axis=axis, keepdims=True) / F32(_top(bits))
    if search == "mse":
        part = _few(sample)
        errors = [np.square(_to_integers(part, peak * s, bits, False) - part).mean(axis) for s in _SHRINKS]
        scale = peak * np.array(_SHRINKS)[np.argmin(errors, axis=0)]
    return lambda x: (_to_integers(x, scale, bits, False), float(bits))


def _integer(sample: np.ndarray, *, bits: int = 8) -> Round:
    """One range with a zero-point, fixed by the sample, and a scale that integer arithmetic can apply.

    The scale is m / 2**shift with m of 15 bits: requantizing takes an integer product and a shift, no float.
    The range is the one of least squared error among shrunk ones.
    """
    _top(bits)
    low, high = F32(min(float(sample.min()), 0.0)), F32(max(float(sample.max()), 0.0))
    last = F32(2**bits - 1)

    def rounding(shrink: float) -> Callable[[np.ndarray], np.ndarray]:
        scale = _dyadic(float(high - low) * float(shrink) / float(last))
        zero = F32(np.clip(np.rint(-float(low) * float(shrink) / float(scale)), 0, last))
        return lambda x: np.asarray((np.clip(np.rint(x / scale) + zero, F32(0), last) - zero) * scale, F32)

    part = _few(sample)
    best = min((rounding(s) for s in _SHRINKS), key=lambda r: float(np.square(r(part) - part).sum()))
    return lambda x: (best(x), float(bits))


def _dyadic(scale: float) -> np.float32:
    """The nearest m / 2**shift with 2**14 <= m < 2**15."""
    if scale <= 0:
        return F32(1)
    mantissa, exponent = np.frexp(scale)
    return F32(np.ldexp(np.rint(np.ldexp(mantissa, 15)), int(exponent) - 15))


def _fmpq(
    sample: np.ndarray, *, bits: int = 4, outlier_bits: int = 8, block: int = 128, ratio: float = 4.0
) -> Round:
    """Blocks of channels, each token and block with its scale; blocks that hold an outlier in more bits.

    A channel is an outlier if its largest magnitude is above `ratio` times the median of those of all.
    Channels are ordered by magnitude, so that outliers fill as few blocks as they can; the order is that of
    the columns of the weights, and costs nothing to apply.
    """
    largest = np.abs(sample).max(axis=0)
    order = np.argsort(-largest, kind="stable")
    outliers = int((largest > ratio * np.median(largest)).sum())
    starts = range(0, len(order), block)
    widths = [outlier_bits if start < outliers else bits for start in starts]

    def round(x: np.ndarray) -> tuple[np.ndarray, float]:
        rounded = np.empty_like(x)
        total = 0
        for start, width in zip(starts, widths, strict=True):
            channels = order[start : start + block]
            rounded[..., channels] = round_integers(x[..., channels], width)
            total += width * len(channels) + SCALE_BITS
        return rounded, total / len(order)

    return round


def _e4m3(sample: np.ndarray | None) -> Round:
    """FP8 with a scale per token that brings its largest number to 448."""
    grid = make_grid(Format.minifloat(4, 3, specials="fn").tables[0])

    def round(x: np.ndarray) -> tuple[np.ndarray, float]:
        scale = _stored(np.abs(x).max(axis=-1, keepdims=True) * grid.top_inverse)
        units = x / np.where(scale > 0, scale * grid.step, F32(1))
        return grid.nearest_level(units) * (scale * grid.step), 8 + SCALE_BITS / x.shape[-1]

    return round


def _llmfp4(sample: np.ndarray, *, bits: int = 4) -> Round:
    """Small floats with one range, fixed by the sample: how many bits are exponent, and the largest number,
    are searched for the least squared error."""
    if not 3 <= bits <= 8:
        raise RequestError(f"round activations: llmfp4 with bits={bits}; give 3 to 8")
    peak = F32(np.abs(sample).max())

    def rounding(exponents: int, shrink: np.float32) -> Callable[[np.ndarray], np.ndarray]:
        grid = make_grid(Format.minifloat(exponents, bits - 1 - exponents).tables[0])
        step = (peak * shrink * grid.top_inverse or F32(1)) * grid.step
        return lambda x: np.asarray(grid.nearest_level(np.asarray(x / step, F32)) * step, F32)

    choices = [rounding(e, s) for e in range(1, min(bits - 1, 4) + 1) for s in _SHRINKS]
    part = _few(sample)
    best = min(choices, key=lambda r: float(np.square(r(part) - part).sum()))
    return lambda x: (best(x), float(bits))


def _flexq(
    sample: np.ndarray, *, bits: int = 6, sensitive_bits: int = 8, group: int = 128, limit: float = 1e-3
) -> Round:
    """Groups of channels in 6 bits, and in 8 for a matrix whose inputs lose more than `limit` of their
    squares in 6: those with outliers, as a rule the input of down_proj."""
    size = np.gcd(group, sample.shape[1])
    narrow, wide = (_group(None, bits=b, group=int(size)) for b in (bits, sensitive_bits))
    sample = _few(sample)
    lost = np.square(narrow(sample)[0] - sample).sum() / max(float(np.square(sample).sum()), 1e-30)
    return wide if lost > limit else narrow


ACTIVATIONS: dict[str, Activation] = {
    "token": Activation(_token, False, "integers, a scale for each token", "arXiv:2206.01861"),
    "group": Activation(_group, False, "integers, a scale for each token and group of channels", "-"),
    "static": Activation(_static, True, "integers, one range fixed by calibration", "arXiv:2211.10438"),
    "integer": Activation(_integer, True, "a fixed range with zero-point, all-integer", "arXiv:2408.13933"),
    "fmpq": Activation(
        _fmpq, True, "blocks with outliers in 8 bits, the rest in 4 (COMET)", "arXiv:2410.12168"
    ),
    "e4m3": Activation(_e4m3, False, "FP8, a scale for each token (ZeroQuant-FP)", "arXiv:2307.09782"),
    "llmfp4": Activation(_llmfp4, True, "4-bit floats, exponent bits and range searched", "arXiv:2310.16836"),
    "flexq": Activation(_flexq, True, "6 bits in groups, 8 for sensitive inputs", "arXiv:2508.04405"),
}
