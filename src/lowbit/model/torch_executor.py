"""The described decoder in torch, one block at a time: for calibration and for methods that learn.

Same description, names and formulas as `reference.py`, on batches [batch, positions, hidden], with a hook at
the input of every matrix and gradients where they are asked for. It holds no weights: a block is called with
those of one layer, so that a walk over a large model keeps one layer in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lowbit.errors import RequestError
from lowbit.model.rope import Rope, inverse_frequencies
from lowbit.model.tensors import groups
from lowbit.model.torch_attention import Scoring, attention
from lowbit.model.torch_experts import experts_half

if TYPE_CHECKING:
    from lowbit.model.config import ModelConfig

__all__ = ["Scoring", "attention", "block", "embed", "groups", "logits", "rotation"]

Tensors = Mapping[str, torch.Tensor]
Product = Callable[[str, torch.Tensor], torch.Tensor]
Hook = Callable[[str, torch.Tensor], "torch.Tensor | None"]
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Scoring], torch.Tensor]
Turn = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, float32 [positions, rotary_dim / 2]


def embed(
    config: ModelConfig, weight: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Residual stream [batch, positions, hidden] of token ids [batch, positions].

    weight: [vocab, hidden]; positions: the table [rows, hidden] of a network with learned positions
    """
    if tokens.ndim != 2 or not tokens.numel():
        raise RequestError(
            f"embed: tokens have shape {list(tokens.shape)}; give [batch, positions], none empty"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= len(weight):
        raise RequestError(f"embed: token ids must be 0 to {len(weight) - 1}")
    x = F.embedding(tokens, weight)
    if config.embedding_scale != 1.0:
        x = x * config.embedding_scale
    if config.positions == "learned":
        first, last = config.position_offset, config.position_offset + tokens.shape[1]
        if positions is None or last > len(positions):
            held = 0 if positions is None else len(positions) - first
            raise RequestError(f"embed: {tokens.shape[1]} positions; the table holds {held}")
        x = x + positions[first:last]
    return x


def rotation(config: ModelConfig, positions: int, context: int | None = None) -> list[Turn]:
    """Of every layer, the cosines and sines times the attention factor; equal ones are the same tensors."""
    rotated: dict[Rope, Turn] = {}
    turns = []
    for layer, rope in enumerate(map(config.rope_of, range(config.n_layers))):
        if not config.rope_layers[layer]:
            turns.append((torch.empty(positions, 0), torch.empty(positions, 0)))
            continue
        if rope not in rotated:
            frequencies, factor = inverse_frequencies(
                replace(config, rope=rope), context or config.max_position
            )
            angles = torch.arange(positions, dtype=torch.float32)[:, None] * torch.from_numpy(frequencies)
            wide = angles.double()
            rotated[rope] = ((wide.cos() * factor).float(), (wide.sin() * factor).float())
        turns.append(rotated[rope])
    return turns


def normed(
    config: ModelConfig, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x normed over its features as the stream is."""
    if config.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, config.norm_eps)
    return _rms_norm(config, x, weight)


def _rms_norm(config: ModelConfig, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps)
    return x * scale * (weight + config.norm_offset if config.norm_offset else weight)


def block(
    config: ModelConfig,
    layer: int,
    weights: Tensors,
    x: torch.Tensor,
    turns: list[Turn],
    hook: Hook | None = None,
    attend: Attention | None = None,
    product: Product | None = None,
) -> torch.Tensor:
    """The residual stream after one layer.

    weights: tensors of the layer without their prefix ("self_attn.q_proj.weight", ..), matrices [out, in]
    x: float [batch, positions, hidden]; every row is a sequence that begins at position 0
    turns: what `rotation` gives for at least that many positions
    hook: called as hook(name, input) before each matrix, name without ".weight", input [.., in]; what it
        returns, if anything, is multiplied instead
    attend: takes the place of `attention`
    product: takes the place of input @ weight.T, as product(name, input)
    """

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        replaced = None if hook is None else hook(name, value)
        value = value if replaced is None else replaced
        bias = weights.get(f"{name}.bias")
        if product is None:
            return F.linear(value, weights[f"{name}.weight"], bias)
        result = product(name, value)
        return result if bias is None else result + bias

    def before(name: str, value: torch.Tensor) -> torch.Tensor:
        if config.norm_place == "post":
            return value
        return normed(config, value, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def after(name: str, value: torch.Tensor) -> torch.Tensor:
        if config.norm_place == "pre":
            return value
        return normed(config, value, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    h = _attention_half(config, layer, weights, linear, before("input_layernorm", x), turns[layer], attend)
    h = after("post_self_attn_norm", h)
    if config.parallel:
        return x + h + _mlp_half(config, weights, linear, before("post_attention_layernorm", x))
    x = x + h
    h = _mlp_half(config, weights, linear, before("post_attention_layernorm", x))
    return x + after("post_mlp_norm", h)


def _attention_half(
    config: ModelConfig,
    layer: int,
    weights: Tensors,
    linear: Product,
    h: torch.Tensor,
    turn: Turn,
    attend: Attention | None,
) -> torch.Tensor:
    q, k, v = (linear(f"self_attn.{part}_proj", h) for part in ("q", "k", "v"))
    if config.qk_norm and config.qk_norm_whole:
        q, k = _norm_qk(config, weights, q, k)
    q, k, v = (t.unflatten(-1, (-1, config.head_dim)) for t in (q, k, v))
    if config.qk_norm and not config.qk_norm_whole:
        q, k = _norm_qk(config, weights, q, k)
    if config.rope_layers[layer]:
        q, k = _rotate(q, *turn), _rotate(k, *turn)
    sinks = weights["self_attn.sinks"] if config.sinks else None
    scoring = Scoring(config.attention_scale, config.windows[layer], config.attention_softcap, sinks)
    h = (attend or attention)(q, k, v, scoring)
    if config.sub_norm:
        h = _rms_norm(config, h, weights["self_attn.attn_sub_norm.weight"])
    return linear("self_attn.o_proj", h)


def _norm_qk(
    config: ModelConfig, weights: Tensors, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        _rms_norm(config, q, weights["self_attn.q_norm.weight"]),
        _rms_norm(config, k, weights["self_attn.k_norm.weight"]),
    )


def _mlp_half(config: ModelConfig, weights: Tensors, linear: Product, h: torch.Tensor) -> torch.Tensor:
    if "mlp.router.weight" in weights:
        return experts_half(config, linear, partial(_gated, config), h)
    if config.gated:
        h = _gated(config, linear("mlp.gate_proj", h), linear("mlp.up_proj", h))
    else:
        h = ACTIVATIONS[config.activation](linear("mlp.up_proj", h))
    if config.sub_norm:
        h = _rms_norm(config, h, weights["mlp.ffn_sub_norm.weight"])
    return linear("mlp.down_proj", h)


def _gated(config: ModelConfig, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if config.activation == "swiglu_clamped":  # gpt-oss
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return gate * torch.sigmoid(gate * 1.702) * (up + 1)
    return ACTIVATIONS[config.activation](gate) * up


def logits(
    config: ModelConfig,
    norm: torch.Tensor,
    head: torch.Tensor,
    x: torch.Tensor,
    norm_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [.., vocab] of the stream after the last layer; norm and norm_bias [hidden], head [vocab,
    hidden]."""
    result = F.linear(normed(config, x, norm, norm_bias), head)
    if config.logit_softcap:
        result = config.logit_softcap * torch.tanh(result / config.logit_softcap)
    return result


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn feature i together with feature i + half; x [batch, positions, heads, head_dim]."""
    half = cosine.shape[-1]
    cosine = cosine[: x.shape[1], None].to(x.dtype)
    sine = sine[: x.shape[1], None].to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, x[..., 2 * half :]], dim=-1)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}
