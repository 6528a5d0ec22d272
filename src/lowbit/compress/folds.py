"""Folds: factors that move between an activation and the weights which read it, the function unchanged.

The input x of a group of matrices becomes x / s, one factor for each channel, and their columns are
multiplied by s. What divides x is folded into what makes it:

    q, k, v     <- weight and bias of input_layernorm
    o           <- the weight of attn_sub_norm where there is one, else the rows of v: heads that read the
                   same values share their factors
    gate, up    <- weight and bias of post_attention_layernorm; with experts, all of them and the router
    down        <- that of ffn_sub_norm where there is one, else the rows of up, in which a gated activation
                   and ReLU are linear

Where nothing linear makes an input its factors stay 1: q, k, v, gate and up of networks that norm only what
they add to the stream (OLMo 2), down after GELU without a gate or a clamped one. A row's bias goes with the
row. A fold is a function

    (config, weights, statistics, formats, *, options) -> factors

    weights: float32 arrays of one layer by name without prefix; changed in place
    statistics: leader of a group ("self_attn.q_proj", ..) -> what calibration saw of its input; an expert
        that no token reached has none, and its inputs stay as they are
    formats: matrix ("self_attn.q_proj", ..) -> the format it will be rounded to
    factors: leader -> float32 [in_features], by which its input is divided now

and a line in FOLDS.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lowbit.formats import Format
from lowbit.model.config import ModelConfig
from lowbit.quantize.awq import awq
from lowbit.quantize.statistics import Statistics

Weights = dict[str, np.ndarray]
Apply = Callable[..., dict[str, np.ndarray]]
Search = Callable[["Group", Weights, Statistics], np.ndarray]
F32 = np.float32
SMALLEST = F32(1e-5)  # of a factor, so that its inverse is one too


@dataclass(frozen=True)
class Group:
    """Matrices that read the same input, and the tensor before them that takes 1 / s.

    source: a norm, or a matrix whose rows take them
    heads: query heads that read the same values; 1: every channel has a factor of its own
    watched: the matrix whose statistics are taken
    """

    matrices: tuple[str, ...]
    source: str
    heads: int = 1
    watched: str = ""

    @property
    def leader(self) -> str:
        return self.watched or self.matrices[0]

    def shared(self, config: ModelConfig) -> np.ndarray | None:
        """int [in_features]: channels with the same number share a factor; None: none do."""
        if self.heads == 1:
            return None
        rows = np.arange(config.n_kv_heads * config.head_dim).reshape(config.n_kv_heads, 1, config.head_dim)
        return np.broadcast_to(rows, (config.n_kv_heads, self.heads, config.head_dim)).reshape(-1)


def groups(config: ModelConfig, sparse: bool = False) -> list[Group]:
    """The groups of a layer whose factors can move, those first whose source is a matrix of a later one.

    sparse: it has experts
    """
    found = [] if sparse else _mlp(config)
    if sparse:
        experts = [f"mlp.experts.{expert}" for expert in range(config.n_experts)]
        if config.activation != "swiglu_clamped":
            found += [Group((f"{at}.down_proj",), f"{at}.up_proj") for at in experts]
        if config.norm_place != "post":
            read = ("mlp.router", *(f"{at}.{name}" for at in experts for name in ("gate_proj", "up_proj")))
            found.append(Group(read, "post_attention_layernorm"))
    if config.sub_norm:
        found.append(Group(("self_attn.o_proj",), "self_attn.attn_sub_norm"))
    else:
        found.append(Group(("self_attn.o_proj",), "self_attn.v_proj", config.n_heads // config.n_kv_heads))
    if config.norm_place != "post":
        found.append(Group(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"))
    return found


def _mlp(config: ModelConfig) -> list[Group]:
    found = []
    if config.sub_norm:
        found.append(Group(("mlp.down_proj",), "mlp.ffn_sub_norm"))
    elif config.gated or config.activation == "relu":
        found.append(Group(("mlp.down_proj",), "mlp.up_proj"))
    if config.norm_place != "post":
        read = ("mlp.gate_proj", "mlp.up_proj") if config.gated else ("mlp.up_proj",)
        found.append(Group(read, "post_attention_layernorm"))
    return found


def _fold(
    config: ModelConfig, weights: Weights, statistics: Mapping[str, Statistics], search: Search
) -> dict[str, np.ndarray]:
    """Find the factors of every group by `search` and move them."""
    found = {}
    for group in groups(config, "mlp.router.weight" in weights):
        width = weights[f"{group.leader}.weight"].shape[1]
        if group.leader not in statistics and ".experts." in group.leader:
            continue
        seen = statistics[group.leader].checked(width, f"fold {group.leader}")
        factors = search(group, weights, seen)
        for name in group.matrices:
            found[name] = factors
            weights[f"{name}.weight"] *= factors
        if group.heads > 1:  # one of the heads stands for all
            factors = factors.reshape(config.n_kv_heads, group.heads, -1)[:, 0].reshape(-1)
        source = weights[f"{group.source}.weight"]
        if source.ndim == 2:
            source /= factors[:, None]
        else:
            offset = F32(config.norm_offset if config.norm == "rms" else 0)
            source[:] = (source + offset) / factors - offset
        if f"{group.source}.bias" in weights:
            weights[f"{group.source}.bias"] /= factors
    return {name: factors for name, factors in found.items() if name in statistics}


def _awq(
    config: ModelConfig,
    weights: Weights,
    statistics: Mapping[str, Statistics],
    formats: Mapping[str, Format],
    *,
    search: str = "mse",
) -> dict[str, np.ndarray]:
    def factors(group: Group, weights: Weights, seen: Statistics) -> np.ndarray:
        rounded = [name for name in group.matrices if formats[name].float_type is None]
        if not rounded:
            return np.ones(len(seen.largest), F32)
        return awq(
            [weights[f"{name}.weight"] for name in rounded],
            seen.hessian,
            [formats[name] for name in rounded],
            search,
            group.shared(config),
        ).factors

    return _fold(config, weights, statistics, factors)


def _smoothquant(
    config: ModelConfig,
    weights: Weights,
    statistics: Mapping[str, Statistics],
    formats: Mapping[str, Format],
    *,
    alpha: float = 0.5,
) -> dict[str, np.ndarray]:
    """s = max|x|^alpha / max|w|^(1 - alpha): the part alpha of the difficulty moves into the weights."""

    def factors(group: Group, weights: Weights, seen: Statistics) -> np.ndarray:
        columns = np.max([np.abs(weights[f"{name}.weight"]).max(0) for name in group.matrices], axis=0)
        x, w = (_largest_shared(values, group.shared(config)) for values in (seen.largest, columns))
        s = np.maximum(x, SMALLEST) ** F32(alpha) / np.maximum(w, SMALLEST) ** F32(1 - alpha)
        return np.where((x > 0) & (w > 0), np.maximum(s, SMALLEST), F32(1)).astype(F32)

    return _fold(config, weights, statistics, factors)


def _llmfp4(
    config: ModelConfig,
    weights: Weights,
    statistics: Mapping[str, Statistics],
    formats: Mapping[str, Format],
    *,
    reach: int = 3,
) -> dict[str, np.ndarray]:
    """Powers of two, at most 2**reach apart: the integer part of each channel's exponent bias.

    The bias that a channel's range asks for is split into a real one of the whole tensor, which the
    quantizer of the activation keeps, and integers from 0 to `reach`, which weights take without error.
    """

    def factors(group: Group, weights: Weights, seen: Statistics) -> np.ndarray:
        largest = _largest_shared(seen.largest, group.shared(config))
        peak = largest.max()
        if peak <= 0:
            return np.ones(len(largest), F32)
        below = np.rint(np.log2(peak / np.maximum(largest, peak * F32(2.0 ** -(reach + 1)))))
        return np.exp2(-np.clip(below, 0, reach)).astype(F32)

    return _fold(config, weights, statistics, factors)


def _largest_shared(values: np.ndarray, shared: np.ndarray | None) -> np.ndarray:
    """values [in_features], each the largest of the channels that share with it."""
    if shared is None:
        return values
    largest = np.zeros(int(shared.max()) + 1, values.dtype)
    np.maximum.at(largest, shared, values)
    return largest[shared]


@dataclass(frozen=True)
class Fold:
    """apply: see the head of this file; source: where it was published."""

    apply: Apply
    summary: str
    source: str

    def options(self) -> dict[str, str | int | float | bool]:
        """Names and defaults of its options."""
        parameters = inspect.signature(self.apply).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


FOLDS: dict[str, Fold] = {
    "awq": Fold(
        _awq, "loud channels scaled up before rounding, by a search on the output", "arXiv:2306.00978"
    ),
    "smoothquant": Fold(_smoothquant, "outliers of activations moved into the weights", "arXiv:2211.10438"),
    "llmfp4": Fold(_llmfp4, "exponent bias of each channel moved into the weights", "arXiv:2310.16836"),
}
