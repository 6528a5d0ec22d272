"""Mixtures of experts in NumPy: which experts a token takes, and what they return.

The definition that executors are held against. Every token takes the experts of its best scores, of equal
ones those of lower index, and their results are added in ascending order of the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lowbit.model.config import ModelConfig


def route(config: ModelConfig, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Experts int64 [n, experts_per_token], ascending, and their weights; scores [n, n_experts]."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, : config.experts_per_token]
    best = np.sort(best, axis=1)
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    chosen = np.take_along_axis(e, best, axis=1)
    over_all = config.router_order == "softmax_topk" and not config.router_renormalize
    return best, chosen / (e if over_all else chosen).sum(axis=1, keepdims=True)


def experts_mlp(
    config: ModelConfig,
    h: np.ndarray,
    linear: Callable[[np.ndarray, str], np.ndarray],
    activate: Callable[[str, np.ndarray | None, np.ndarray], np.ndarray],
    at: str,
) -> np.ndarray:
    """What the experts of a layer add to the stream, [n, hidden].

    h: normed stream [n, hidden]; linear(x, name): x through a matrix and its bias; at: "model.layers.N.mlp."
    """
    best, weights = route(config, linear(h, at + "router"))
    total = np.zeros_like(h)
    for expert in range(config.n_experts):
        rows, places = np.nonzero(best == expert)
        if not rows.size:
            continue
        stem = f"{at}experts.{expert}."
        inner = activate(
            config.activation, linear(h[rows], stem + "gate_proj"), linear(h[rows], stem + "up_proj")
        )
        total[rows] += weights[rows, places, None] * linear(inner, stem + "down_proj")
    return total
