"""The described decoder in NumPy, straight from float weights: what executors are held against.

Short and slow on purpose: no cache, no blocks, one matrix product after another. Used by tests and to find
the first layer in which an executor differs (`trace`), never on the way of a request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from lowbit.errors import RequestError
from lowbit.model.config import ModelConfig
from lowbit.model.reference_experts import experts_mlp
from lowbit.model.rope import Rope, inverse_frequencies
from lowbit.model.tensors import EMBEDDING, HEAD, POSITIONS

# Where `trace` is called, in this order: "embed", then per layer "layers.N.<point>", then "norm".
POINTS = ("q", "k", "v", "attention", "after_attention", "mlp")


def reference_logits(
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    tokens: np.ndarray | list[int],
    *,
    context: int | None = None,
    dtype: type = np.float32,
    kv_dtype: type | None = None,
    trace: Callable[[str, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Logits of every position of one sequence.

    weights: canonical name -> float array; vectors [n], matrices [out, in].
    tokens: ids [n], each below vocab_size. context: what the network is loaded with (dynamic scaling).
    dtype: float32 or float64, of all arithmetic except the angles, which are float32 as in training.
    kv_dtype: float16 to round keys and values as a 16-bit cache does; None: as dtype.
    trace: called with the name of a point and a copy of its value [n, features].
    Returns [n, vocab_size] in dtype.
    """
    ids = np.asarray(tokens, np.int64)
    if ids.ndim != 1 or ids.size == 0 or ids.min() < 0 or ids.max() >= config.vocab_size:
        raise RequestError(f"reference_logits: tokens must be a list of ids below {config.vocab_size}")

    def weight(name: str) -> np.ndarray:
        return np.asarray(weights[name], dtype)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        y = x @ weight(f"{name}.weight").T
        return y + weight(f"{name}.bias") if f"{name}.bias" in weights else y

    def rms(x: np.ndarray, name: str) -> np.ndarray:
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
        gain = weight(name) + dtype(config.norm_offset)
        return x / np.sqrt(mean_square + dtype(config.norm_eps)) * gain

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        """Of the stream."""
        if config.norm == "rms":
            return rms(x, f"{name}.weight")
        x = x - np.mean(x, axis=-1, keepdims=True)
        x = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + dtype(config.norm_eps))
        x = x * weight(f"{name}.weight")
        return x + weight(f"{name}.bias") if config.norm_bias else x

    def show(point: str, value: np.ndarray) -> None:
        if trace is not None:
            trace(point, value.reshape(len(ids), -1).copy())

    def attention(h: np.ndarray, layer: int) -> np.ndarray:
        at = f"model.layers.{layer}.self_attn."
        q, k, v = (linear(h, at + name) for name in ("q_proj", "k_proj", "v_proj"))
        if config.qk_norm and config.qk_norm_whole:
            q, k = rms(q, at + "q_norm.weight"), rms(k, at + "k_norm.weight")
        q = q.reshape(-1, config.n_heads, config.head_dim)
        k, v = (x.reshape(-1, config.n_kv_heads, config.head_dim) for x in (k, v))
        if config.qk_norm and not config.qk_norm_whole:
            q, k = rms(q, at + "q_norm.weight"), rms(k, at + "k_norm.weight")
        if config.rope_layers[layer]:
            turn = rotations[config.rope_of(layer)]
            q, k = _rotate(q, *turn), _rotate(k, *turn)
        if kv_dtype is not None:
            k, v = k.astype(kv_dtype).astype(dtype), v.astype(kv_dtype).astype(dtype)
        for point, value in (("q", q), ("k", k), ("v", v)):
            show(f"layers.{layer}.{point}", value)
        sinks = weight(at + "sinks") if config.sinks else None
        h = _attention(config, q, k, v, config.windows[layer], sinks)
        show(f"layers.{layer}.attention", h)
        if config.sub_norm:
            h = rms(h, at + "attn_sub_norm.weight")
        return linear(h, at + "o_proj")

    def mlp(h: np.ndarray, layer: int) -> np.ndarray:
        at = f"model.layers.{layer}.mlp."
        if config.sparse(layer):
            return experts_mlp(config, h, linear, activate, at)
        gate = linear(h, at + "gate_proj") if config.gated else None
        h = activate(config.activation, gate, linear(h, at + "up_proj"))
        if config.sub_norm:
            h = rms(h, at + "ffn_sub_norm.weight")
        return linear(h, at + "down_proj")

    n = len(ids)
    ropes = {config.rope_of(layer) for layer in range(config.n_layers) if config.rope_layers[layer]}
    rotations = {rope: _rotation(config, rope, n, context or config.max_position, dtype) for rope in ropes}
    into, out_of = config.norm_place != "post", config.norm_place != "pre"
    x = weight(EMBEDDING)[ids] * dtype(config.embedding_scale)
    if config.positions == "learned":
        x = x + weight(POSITIONS)[config.position_offset : config.position_offset + n]
    show("embed", x)
    for layer in range(config.n_layers):
        at = f"model.layers.{layer}."
        h = attention(norm(x, at + "input_layernorm") if into else x, layer)
        h = norm(h, at + "post_self_attn_norm") if out_of else h
        before, x = x, x + h
        show(f"layers.{layer}.after_attention", x)
        h = before if config.parallel else x
        h = mlp(norm(h, at + "post_attention_layernorm") if into else h, layer)
        x = x + (norm(h, at + "post_mlp_norm") if out_of else h)
        show(f"layers.{layer}.mlp", x)
    x = norm(x, "model.norm")
    show("norm", x)
    return softcap(x @ weight(EMBEDDING if config.tied else HEAD).T, config.logit_softcap)


def softcap(x: np.ndarray, cap: float) -> np.ndarray:
    """cap * tanh(x / cap); x where cap is 0."""
    return x.dtype.type(cap) * np.tanh(x / x.dtype.type(cap)) if cap else x


def _rotation(
    config: ModelConfig, rope: Rope, n: int, context: int, dtype: type
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [n, 1, rotary_dim / 2], times the attention factor."""
    frequencies, factor = inverse_frequencies(config, context, rope)
    angles = np.arange(n, dtype=np.float32)[:, None] * frequencies
    angles = angles.astype(np.float64)[:, None]
    return (np.cos(angles) * factor).astype(dtype), (np.sin(angles) * factor).astype(dtype)


def _rotate(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """Turn feature i together with feature i + half; x [n, heads, head_dim]."""
    half = cosine.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine, x[..., 2 * half :]], axis=-1)


def _attention(
    config: ModelConfig, q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int, sinks: np.ndarray | None
) -> np.ndarray:
    """Causal attention of q [n, heads, dim] to k, v [n, kv_heads, dim]; returns [n, heads * dim].

    Query i sees keys max(0, i - window + 1) .. i; window 0: all of 0 .. i. sinks [heads]: scores that take
    part in the softmax like one more key, whose value is 0.
    """
    n, heads, _ = q.shape
    shared = heads // k.shape[1]
    rows, columns = np.arange(n)[:, None], np.arange(n)[None, :]
    seen = columns <= rows
    if window:
        seen &= columns > rows - window
    outputs = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // shared].T * q.dtype.type(config.attention_scale)
        scores = np.where(seen, softcap(scores, config.attention_softcap), -np.inf)
        peak = scores.max(axis=-1, keepdims=True)
        if sinks is not None:
            peak = np.maximum(peak, sinks[head])
        scores = np.exp(scores - peak)
        total = scores.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sinks[head] - peak)
        outputs.append(scores / total @ v[:, head // shared])
    return np.concatenate(outputs, axis=-1)


def _silu(x: np.ndarray) -> np.ndarray:
    return x * (0.5 * (1 + np.tanh(0.5 * x)))  # x / (1 + exp(-x)) without overflow


def _relu2(x: np.ndarray) -> np.ndarray:
    return np.square(np.maximum(x, 0))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(x.dtype.type(0.7978845608028654) * (x + x.dtype.type(0.044715) * x**3)))


def _gelu(x: np.ndarray) -> np.ndarray:
    return (0.5 * x * (1 + _erf(x / np.sqrt(2)))).astype(x.dtype)


_erf = np.vectorize(math.erf, otypes=[np.float64])

_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": _silu,
    "relu2": _relu2,
    "gelu_tanh": _gelu_tanh,
    "gelu": _gelu,
    "relu": lambda x: np.maximum(x, 0),
}


def activate(name: str, gate: np.ndarray | None, up: np.ndarray) -> np.ndarray:
    """activation(gate) * up, or activation(up) without a gate."""
    if name == "swiglu_clamped":  # gpt-oss
        if gate is None:
            raise RequestError("swiglu_clamped needs a gate")
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return gate * (0.5 * (1 + np.tanh(0.5 * up.dtype.type(1.702) * gate))) * (up + 1)
    return _ACTIVATIONS[name](up) if gate is None else _ACTIVATIONS[name](gate) * up
