"""Causal attention in torch: scores scaled and capped, a window, sinks that take a share and add nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Scoring:
    """What turns products of queries and keys into shares of the values.

    scale: multiplies the products; window: how many of the latest positions are seen, 0: all before
    softcap: scores become softcap * tanh(score / softcap); 0: they stay
    sinks: [heads], one more score of each head, of nothing; None: there is none
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: torch.Tensor | None = None

    def seen(self, positions: int) -> torch.Tensor:
        """bool [positions, positions]: which key does each query see."""
        at = torch.arange(positions)
        seen = at <= at[:, None]
        return seen & (at > at[:, None] - self.window) if self.window else seen

    def shares(self, products: torch.Tensor) -> torch.Tensor:
        """products [.., heads, queries, keys] -> the share that each query gives each key."""
        scores = products * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~self.seen(scores.shape[-1]), -torch.inf)
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """[batch, positions, heads * dim] of q [batch, positions, heads, dim], k and v with kv_heads."""
    positions, heads = q.shape[1], q.shape[2]
    shared = heads // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    if scoring.softcap or scoring.sinks is not None:
        h = scoring.shares(q @ k.mT) @ v
    elif 0 < scoring.window < positions:
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=scoring.seen(positions), scale=scoring.scale)
    else:
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scoring.scale)
    return h.transpose(1, 2).reshape(len(h), positions, -1)
