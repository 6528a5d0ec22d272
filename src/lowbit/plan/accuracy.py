"""What a format costs in accuracy, before anything is quantized.

Loss is the relative increase of perplexity: exp(KL) - 1, with KL the divergence of the outputs from the
original's in nats per token. The best knowledge is a measured sensitivity of each matrix (`lowbit quantize
MODEL auto --json` reports it; see lowbit.compress.sensitivity). Without one a prior holds:

    KL = a(parameters) m(method) sum over matrices  share of the weights * e(format)

e(format) is the relative squared error of normal weights in that format, computed here; that the increase is
linear in it is the linearity theorem of HIGGS (arXiv:2411.17525). a(parameters) = SCALE (parameters /
1e9)^-EXPONENT was fitted to the round-to-nearest rows of our measured table (docs/methods.md: stories15M) and
to the perplexities of Llama-2 that AWQ's paper reports (arXiv:2306.00978, table 4). Other models scatter
widely around it (`SPREAD`): SmolLM2-135M loses four times as much. The interval says so; measure before you
serve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from lowbit.errors import FormatError
from lowbit.formats import Format, Scheme
from lowbit.model.tensors import EMBEDDING, HEAD
from lowbit.plan.network import Network
from lowbit.plan.work import tensor_name

SAMPLE_ROWS, SAMPLE_INPUTS = 16, 4096
FLOAT_ERROR = {"fp16": 4e-8, "bf16": 2.7e-6, "fp32": 0.0}
# tests/plan/test_accuracy.py holds the rows they were fitted to against them.
SCALE, EXPONENT, SPREAD = 6.2, 0.152, (0.4, 4.5)
METHODS = {"rtn": 1.0, "gptq": 0.55}  # of our table, at 3 and 4 bits: gptq loses 0.53 of what rtn loses
# Of keys and values by bits: measured on SmolLM2-135M (docs/kv-cache.md), relative increase of perplexity.
KV_LOSS = {16: 0.0, 8: 0.0002, 4: 0.0066, 2: 0.40}
ACTIVATION_LOSS = {"int8": 0.002, "int16": 0.0}  # int8 activations with int8 weights: docs/methods.md, 8 bits
EMBEDDING_SHARE = 0.5  # an error of the embedding counts about half of one in the layers


@lru_cache(maxsize=256)
def format_error(fmt: Format) -> float:
    """Mean squared error of normal weights in `fmt` over their variance, each scale at its best of a few."""
    if fmt.float_type is not None:
        return FLOAT_ERROR[fmt.float_type]
    if fmt.terms > 1:  # sums of scaled terms: as good as one with as many levels
        levels = 3 if fmt.bits == 2 else 2
        return format_error(Format.integer(max(1, round(fmt.terms * math.log2(levels))), fmt.group_size))
    size = fmt.group_size or SAMPLE_INPUTS
    weights = np.random.default_rng(0).standard_normal((SAMPLE_ROWS, max(1, SAMPLE_INPUTS // size), size))
    return _table_error(weights, fmt)


def _table_error(groups: np.ndarray, fmt: Format) -> float:
    """Round each group to the levels at the best of several scales: what a search of scales reaches."""
    best = np.full(groups.shape[:2], np.inf)
    peak = np.abs(groups).max(axis=2)
    for table in fmt.tables:
        levels = np.sort(np.asarray(table, np.float64))
        if fmt.zero_point:
            low, high = groups.min(axis=2), groups.max(axis=2)
            middle = (levels[0] + levels[-1]) / 2
            shift, reach = (low + high) / 2, (high - low) / 2
        else:
            middle, shift, reach = 0.0, np.zeros_like(peak), peak
        top = max(abs(levels[0] - middle), abs(levels[-1] - middle))
        edges = (levels[1:] + levels[:-1]) / 2 - middle
        for part in np.linspace(0.55, 1.0, 10):
            scale = (part * reach / top)[..., None]
            relative = (groups - shift[..., None]) / np.where(scale == 0, 1, scale)
            near = (levels - middle)[np.searchsorted(edges, relative)]
            best = np.minimum(best, ((near * scale + shift[..., None] - groups) ** 2).mean(axis=2))
    return float(best.mean())


def divergence_scale(parameters: float) -> float:
    """a(parameters): nats per token for a relative squared error of 1."""
    return SCALE * (parameters / 1e9) ** -EXPONENT


def to_loss(nats: float) -> float:
    """Relative increase of perplexity."""
    return math.expm1(min(nats, 50.0))


@dataclass(frozen=True)
class Accuracy:
    """nats of each item and format; how wide; where from. factors: of the interval of a sum of nats."""

    source: str
    factors: tuple[float, float]
    measured: Mapping[str, Mapping[str, float]] | None = None  # tensor -> format -> nats
    method: str = "rtn"

    def nats(self, network: Network, tensors: Sequence[str], weights: int, fmt: Format) -> float | None:
        """Of storing these tensors, `weights` numbers, in `fmt`; None if nothing is known of it."""
        if self.measured is not None and tensors[0] in self.measured:
            known = self.measured[tensors[0]].get(fmt.name)
            return known if known is not None else (0.0 if fmt.float_type else None)
        share = weights / max(1, network.matrix_weights + network.embedding_weights)
        if tensors[0] in (EMBEDDING, HEAD):
            share *= EMBEDDING_SHARE
        scale = divergence_scale(network.parameters) * METHODS[self.method]
        return scale * share * format_error(fmt)


def prior(method: str = "rtn") -> Accuracy:
    """What holds without measurement."""
    if method not in METHODS:
        raise FormatError(
            f"plan: nothing is known of the accuracy of method {method!r}; use {', '.join(METHODS)}"
        )
    text = f"prior ({method}): error of normal weights, scaled by measured models"
    return Accuracy(text, SPREAD, None, method)


def from_report(report: Any, method: str = "rtn") -> Accuracy:
    """Measured sensitivities: the object that `lowbit quantize MODEL auto --json` prints, or its
    lowbit.json.
    """
    auto = report.get("auto") if isinstance(report, dict) else None
    items = auto.get("items") if isinstance(auto, dict) else None
    if not isinstance(auto, dict) or not isinstance(items, list) or not items:
        raise FormatError(
            "plan: the sensitivities are not what `lowbit quantize MODEL auto --bits B --json` "
            "prints; they have no auto.items"
        )
    table: dict[str, dict[str, float]] = {}
    try:
        for item in items:
            values = {str(k): max(0.0, float(v)) for k, v in item["sensitivity"].items()}
            for number, tensor in enumerate(item["tensors"]):
                table[str(tensor)] = values if number == 0 else dict.fromkeys(values, 0.0)
        total, achieved = float(auto["predicted_kl"] or 0), float(auto["achieved_kl"] or 0)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"plan: damaged sensitivities ({error!r}); measure them again") from error
    ratio = achieved / total if total > 0 and achieved > 0 else 1.0
    factors = (min(0.8, ratio), max(1.25, ratio))
    return Accuracy(f"measured sensitivities ({auto.get('sensitivity')})", factors, table, method)


def scheme_nats(network: Network, scheme: Scheme, accuracy: Accuracy) -> float | None:
    """Of a whole scheme, weights only; None if something of it is not known."""
    total = 0.0
    for number, layer in enumerate(network.layers):
        for matrix in layer.matrices:
            name = tensor_name(number, matrix.name)
            nats = accuracy.nats(network, [name], matrix.weights * matrix.copies, scheme.format_for(name))
            if nats is None:
                return None
            total += nats
    for name in (EMBEDDING,) if network.tied else (EMBEDDING, HEAD):
        nats = accuracy.nats(network, [name], network.vocab * network.hidden, scheme.format_for(name))
        total += nats or 0.0
    return total


def other_loss(kv_bits: int, activations: str) -> float:
    """Of keys and values and of activations, as measured on a small model."""
    return KV_LOSS[kv_bits] + ACTIVATION_LOSS[activations]
