"""The table of weight methods: one name, one function, one paper each.

A method is a function (weight, format, statistics, **options) -> PackedMatrix in a file of its own; a line
here makes it known to `lowbit quantize --method`, to the comparison of methods and to `lowbit formats`.

    weight: float32 [out_features, in_features]
    format: Format
    statistics: what calibration saw of the input, or None where the method needs none

Options are the keyword-only parameters of the function; their defaults give their types.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowbit.errors import FormatError, RequestError
from lowbit.formats import Format, parse_format
from lowbit.packed import PackedMatrix
from lowbit.quantize.absmax import absmax
from lowbit.quantize.descent import Curvature, descend, descent
from lowbit.quantize.finequant import finequant
from lowbit.quantize.gptq import factorise, gptq
from lowbit.quantize.hqq import hqq
from lowbit.quantize.importance import round_by_importance
from lowbit.quantize.kept_columns import llmint8, salient
from lowbit.quantize.kmeans import kmeans, with_levels_of
from lowbit.quantize.llm_fp4 import llm_fp4
from lowbit.quantize.lorc import lorc
from lowbit.quantize.lossless import lossless
from lowbit.quantize.round_to_nearest import round_to_nearest
from lowbit.quantize.spqr import spqr
from lowbit.quantize.statistics import Statistics
from lowbit.quantize.sums import bcq, dbllm, ptqtp, shiftadd
from lowbit.quantize.zeroquant_fp import zeroquant_fp

Value = str | int | float | bool
Apply = Callable[..., PackedMatrix]


@dataclass(frozen=True)
class Method:
    """apply: the function; calibrated: whether it needs statistics; source: where it was published."""

    apply: Apply
    calibrated: bool
    summary: str
    source: str

    def options(self) -> dict[str, Value]:
        """Names and defaults of its options."""
        parameters = inspect.signature(self.apply).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _rtn(
    weight: np.ndarray, format: Format, statistics: Statistics | None, *, search: str = "mse"
) -> PackedMatrix:
    return round_to_nearest(weight, format, search)


def _gptq(
    weight: np.ndarray,
    format: Format,
    statistics: Statistics,
    *,
    order: str = "given",
    damping: float = 0.01,
    search: str = "mse",
    scales: str = "hessian",
    refit: int = 0,
) -> PackedMatrix:
    hessian = statistics.checked(weight.shape[1], f"gptq to {format.name}").hessian
    key = ("gptq", order, damping)
    factor = statistics.kept(key, lambda: factorise(hessian, order, damping, "gptq"))
    matrix = gptq(weight, factor, format, order, damping, search, scales=scales).matrix
    if refit <= 0:
        return matrix
    curvature = statistics.kept(("descent", damping), lambda: Curvature.of(hessian, damping, "gptq"))
    return descend(weight, curvature, matrix, fit_rounds=0, rounds=refit, compensate=False).matrix


def _hqq(
    weight: np.ndarray,
    format: Format,
    statistics: Statistics | None,
    *,
    p: float = 0.7,
    beta: float = 1.0,
    kappa: float = 1.01,
    iterations: int = 20,
    start: str = "mse",
) -> PackedMatrix:
    return hqq(weight, format, p, beta, kappa, iterations, start)


def _kmeans(
    weight: np.ndarray,
    format: Format,
    statistics: Statistics,
    *,
    rounds: int = 4,
    compensate: bool = False,
    refit: int = 0,
) -> PackedMatrix:
    checked = statistics.checked(weight.shape[1], f"kmeans to {format.name}")
    matrix = kmeans(weight, format, np.diag(checked.hessian), rounds)
    if not compensate and refit <= 0:
        return matrix
    return _gptq(weight, with_levels_of(matrix, format), statistics, refit=refit)


def _zqfp(
    weight: np.ndarray, format: Format, statistics: Statistics | None, *, ratios: str = "row"
) -> PackedMatrix:
    return zeroquant_fp(weight, format, ratios)


def _finequant(
    weight: np.ndarray,
    format: Format,
    statistics: Statistics | None,
    *,
    demand: float = 1.0,
    smallest: int = 32,
) -> PackedMatrix:
    return finequant(weight, format, demand, smallest)


def _imatrix(weight: np.ndarray, format: Format, statistics: Statistics) -> PackedMatrix:
    checked = statistics.checked(weight.shape[1], f"imatrix to {format.name}")
    return round_by_importance(weight, format, np.diag(checked.hessian))


def _lorc(
    weight: np.ndarray,
    format: Format,
    statistics: Statistics,
    *,
    base: str = "gptq",
    rank: int = 8,
    objective: str = "hessian",
    rounds: int = 1,
) -> PackedMatrix:
    return lorc(weight, format, statistics, parse_method(base), rank, objective, rounds)


METHODS: dict[str, Method] = {
    "rtn": Method(_rtn, False, "round to nearest, scales searched", "-"),
    "imatrix": Method(_imatrix, True, "round to nearest, scales searched for the inputs seen", "-"),
    "hqq": Method(_hqq, False, "zero-points of least error in the norm p < 1, in fp16", "HQQ, 2023"),
    "kmeans": Method(
        _kmeans, True, "a codebook for each matrix; compensate=yes, refit=N: as gptq", "arXiv:2306.07629"
    ),
    "llmfp4": Method(
        llm_fp4, True, "floats with the best split into exponent and mantissa", "arXiv:2310.16836"
    ),
    "zqfp": Method(_zqfp, False, "scales of a row in ratios of powers of two", "arXiv:2307.09782"),
    "finequant": Method(_finequant, False, "groups halved where that pays", "arXiv:2308.09723"),
    "absmax": Method(absmax, False, "symmetric integers that span the largest weight", "arXiv:2210.02414"),
    "gptq": Method(
        _gptq,
        True,
        "columns to come make up for the error; refit=N: N rounds of descent after",
        "arXiv:2210.17323",
    ),
    "descent": Method(descent, True, "compensation, then codes and scales by turns", "arXiv:2309.01885"),
    "bcq": Method(bcq, True, "scaled signs fitted to the output", "arXiv:2206.09557"),
    "shiftadd": Method(shiftadd, True, "signs times powers of two", "arXiv:2406.05981"),
    "dbllm": Method(dbllm, True, "two scaled planes of 0 and 1", "arXiv:2402.11960"),
    "ptqtp": Method(ptqtp, True, "scaled trits fitted to the output", "arXiv:2509.16989"),
    "lorc": Method(_lorc, True, "a method and a low-rank matrix for what it loses", "arXiv:2303.08302"),
    "llmint8": Method(llmint8, True, "inputs above a threshold in 16 bit", "arXiv:2208.07339"),
    "salient": Method(salient, True, "the inputs that matter most in 16 bit", "arXiv:2311.16442"),
    "spqr": Method(spqr, True, "the weights that matter most in 16 bit", "arXiv:2306.03078"),
    "lossless": Method(lossless, False, "bfloat16 with coded exponents, exactly", "arXiv:2504.11651"),
}


@dataclass(frozen=True)
class Choice:
    """A method and the options that differ from its defaults."""

    name: str
    options: dict[str, Value]

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    def __str__(self) -> str:
        return spelled(self.name, self.options)

    def __call__(
        self, weight: np.ndarray, format: Format, statistics: Statistics | None = None
    ) -> PackedMatrix:
        """Quantize one matrix. Raises RequestError if the method needs statistics and there are none."""
        if self.method.calibrated and statistics is None:
            raise RequestError(
                f"quantize: method {self.name} needs calibration; give statistics of the input"
            )
        return self.method.apply(weight, format, statistics, **self.options)

    def searching(self, search: str) -> "Choice":
        """Itself with this search of scales, where the method has the option and nobody set it."""
        default = self.method.options().get("search")
        if default in (None, search) or "search" in self.options:
            return self
        return replace(self, options={**self.options, "search": search})


def parse_method(text: str) -> Choice:
    """The method that `NAME` or `NAME:OPTION=VALUE,...` names. What is unknown raises RequestError."""
    name, _, rest = text.strip().partition(":")
    if name not in METHODS:
        raise RequestError(f"quantize: method {name[:60]!r} is unknown; use one of {', '.join(METHODS)}")
    return Choice(name, parse_options(name, rest, METHODS[name].options()))


def spelled(name: str, options: Mapping[str, Value]) -> str:
    """`NAME:OPTION=VALUE,...`"""
    given = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{name}:{given}" if given else name


def parse_options(name: str, rest: str, known: Mapping[str, Value]) -> dict[str, Value]:
    """The options in `OPTION=VALUE,...` of method `name`, whose defaults are `known`."""
    options: dict[str, Value] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in known:
            takes = ", ".join(f"{option}={default}" for option, default in known.items()) or "no options"
            raise RequestError(f"quantize: method {name} does not take {part[:60]!r}; it takes {takes}")
        options[key] = _converted(name, key, value, known[key])
    return options


def quantize_array(
    array: Any, format: Format | str, search: str = "mse", method: Choice | None = None
) -> PackedMatrix:
    """Any real array of two dimensions to a format or its name, by a method without calibration."""
    array = np.asarray(array)
    if array.dtype.kind not in "fiub" or array.ndim != 2:
        raise FormatError(
            f"quantize: received {array.dtype} {list(array.shape)}; needs a real [out_features, in_features]"
        )
    choice = (method or parse_method("rtn")).searching(search)
    return choice(np.ascontiguousarray(array, np.float32), parse_format(format))


def _converted(name: str, key: str, value: str, default: Any) -> Value:
    kind = type(default)
    try:
        if kind is bool:
            return {"yes": True, "true": True, "no": False, "false": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        raise RequestError(
            f"quantize: method {name}: {key}={value[:60]!r} is no {kind.__name__}; the default is {default}"
        ) from None
