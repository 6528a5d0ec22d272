"""Mixtures of experts in torch: the same routing as reference_experts.py, with hooks and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lowbit.model.config import ModelConfig

Linear = Callable[[str, torch.Tensor], torch.Tensor]
Gated = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def route(config: ModelConfig, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts int64 [n, experts_per_token], ascending, and their weights; scores [n, n_experts]."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[:, : config.experts_per_token]
    best = best.sort(dim=-1).values
    if config.router_order == "topk_softmax" or config.router_renormalize:
        return best, scores.gather(-1, best).softmax(-1)
    return best, scores.softmax(-1).gather(-1, best)


def experts_half(config: ModelConfig, linear: Linear, gated: Gated, h: torch.Tensor) -> torch.Tensor:
    """What the experts of a layer add to the stream, shaped as h [.., hidden].

    linear: as in torch_executor.block, called for "mlp.router" with every position and for a matrix of an
        expert with the positions that come to it, [n, features], and not at all where none does
    gated: (gate, up) -> what the down projection reads
    """
    flat = h.reshape(-1, h.shape[-1])
    best, weights = route(config, linear("mlp.router", flat))
    total = torch.zeros_like(flat)
    for expert in best.unique().tolist():
        rows, places = torch.where(best == expert)
        x, at = flat[rows], f"mlp.experts.{expert}."
        inner = gated(linear(at + "gate_proj", x), linear(at + "up_proj", x))
        total = total.index_add(0, rows, linear(at + "down_proj", inner) * weights[rows, places, None])
    return total.view(h.shape)
