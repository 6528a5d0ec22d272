"""The described decoder in torch, one block at a time: for calibration and for methods that learn.

Same description, names and formulas as `reference.py`, on batches [batch, positions, hidden], with a hook at
the input of every matrix and gradients where they are asked for. It holds no weights: a block is called with
those of one layer, so that a walk over a large model keeps one layer in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lowbit.errors import RequestError
from lowbit.model.rope import inverse_frequencies
from lowbit.model.tensors import GROUPS

if TYPE_CHECKING:
    from lowbit.model.config import ModelConfig

__all__ = ["GROUPS", "block", "embed", "logits", "rotation"]

Tensors = Mapping[str, torch.Tensor]
Product = Callable[[str, torch.Tensor], torch.Tensor]
Hook = Callable[[str, torch.Tensor], "torch.Tensor | None"]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, int], torch.Tensor]


def embed(weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Residual stream [batch, positions, hidden] of token ids [batch, positions]; weight [vocab, hidden]."""
    if tokens.ndim != 2 or not tokens.numel():
        raise RequestError(
            f"embed: tokens have shape {list(tokens.shape)}; give [batch, positions], none empty"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= len(weight):
        raise RequestError(f"embed: token ids must be 0 to {len(weight) - 1}")
    return F.embedding(tokens, weight)


def rotation(
    config: ModelConfig, positions: int, context: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines float32 [positions, rotary_dim / 2], times the attention factor."""
    frequencies, factor = inverse_frequencies(config, context or config.max_position)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * torch.from_numpy(frequencies)
    wide = angles.double()
    return (wide.cos() * factor).float(), (wide.sin() * factor).float()


def block(
    config: ModelConfig,
    layer: int,
    weights: Tensors,
    x: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor],
    hook: Hook | None = None,
    attend: Attention | None = None,
    product: Product | None = None,
) -> torch.Tensor:
    """The residual stream after one layer.

    weights: tensors of the layer without their prefix ("self_attn.q_proj.weight", ..), matrices [out, in]
    x: float [batch, positions, hidden]; every row is a sequence that begins at position 0
    turn: what `rotation` gives for at least that many positions
    hook: called as hook(name, input) before each matrix, name without ".weight", input [.., in]; what it
        returns, if anything, is multiplied instead
    attend: takes the place of `attention`
    product: takes the place of input @ weight.T, as product(name, input)
    """
    batch, positions, _ = x.shape
    heads, kv_heads, dim = config.n_heads, config.n_kv_heads, config.head_dim

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        replaced = None if hook is None else hook(name, value)
        value = value if replaced is None else replaced
        bias = weights.get(f"{name}.bias")
        if product is None:
            return F.linear(value, weights[f"{name}.weight"], bias)
        result = product(name, value)
        return result if bias is None else result + bias

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(value.square().mean(-1, keepdim=True) + config.norm_eps)
        return value * scale * weights[f"{name}.weight"]

    h = norm("input_layernorm", x)
    q = linear("self_attn.q_proj", h).view(batch, positions, heads, dim)
    k = linear("self_attn.k_proj", h).view(batch, positions, kv_heads, dim)
    v = linear("self_attn.v_proj", h).view(batch, positions, kv_heads, dim)
    if config.qk_norm:
        q, k = norm("self_attn.q_norm", q), norm("self_attn.k_norm", k)
    if config.rope_layers[layer]:
        q, k = _rotate(q, *turn), _rotate(k, *turn)
    h = (attend or attention)(q, k, v, config.attention_scale, config.windows[layer])
    if config.sub_norm:
        h = norm("self_attn.attn_sub_norm", h)
    x = x + linear("self_attn.o_proj", h)
    h = norm("post_attention_layernorm", x)
    h = ACTIVATIONS[config.activation](linear("mlp.gate_proj", h)) * linear("mlp.up_proj", h)
    if config.sub_norm:
        h = norm("mlp.ffn_sub_norm", h)
    return x + linear("mlp.down_proj", h)


def logits(config: ModelConfig, norm: torch.Tensor, head: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Logits [.., vocab] of the stream after the last layer; norm [hidden], head [vocab, hidden]."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)
    return F.linear(x * scale * norm, head)


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn feature i together with feature i + half; x [batch, positions, heads, head_dim]."""
    half = cosine.shape[-1]
    cosine = cosine[: x.shape[1], None].to(x.dtype)
    sine = sine[: x.shape[1], None].to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, x[..., 2 * half :]], dim=-1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int) -> torch.Tensor:
    """Causal attention; q [batch, positions, heads, dim], k and v with kv_heads. Window 0: all before."""
    positions, heads = q.shape[1], q.shape[2]
    shared = heads // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    if window and window < positions:
        rows = torch.arange(positions)
        seen = (rows[None, :] <= rows[:, None]) & (rows[None, :] > rows[:, None] - window)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    else:
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return h.transpose(1, 2).reshape(len(h), positions, -1)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
