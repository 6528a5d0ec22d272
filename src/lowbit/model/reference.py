"""The described decoder in NumPy, straight from float weights: what executors are held against.

Short and slow on purpose: no cache, no blocks, one matrix product after another. Used by tests and to find
the first layer in which an executor differs (`trace`), never on the way of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lowbit.errors import RequestError
from lowbit.model.config import ModelConfig
from lowbit.model.rope import inverse_frequencies
from lowbit.model.tensors import EMBEDDING, FINAL_NORM, HEAD

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

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + dtype(config.norm_eps)) * weight(name)

    def show(point: str, value: np.ndarray) -> None:
        if trace is not None:
            trace(point, value.reshape(len(ids), -1).copy())

    cosine, sine = _rotation(config, len(ids), context or config.max_position, dtype)
    heads, kv_heads, dim = config.n_heads, config.n_kv_heads, config.head_dim
    x = weight(EMBEDDING)[ids]
    show("embed", x)
    for layer in range(config.n_layers):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm.weight")
        q = linear(h, at + "self_attn.q_proj").reshape(-1, heads, dim)
        k = linear(h, at + "self_attn.k_proj").reshape(-1, kv_heads, dim)
        v = linear(h, at + "self_attn.v_proj").reshape(-1, kv_heads, dim)
        if config.qk_norm:
            q = norm(q, at + "self_attn.q_norm.weight")
            k = norm(k, at + "self_attn.k_norm.weight")
        if config.rope_layers[layer]:
            q, k = _rotate(q, cosine, sine), _rotate(k, cosine, sine)
        if kv_dtype is not None:
            k, v = k.astype(kv_dtype).astype(dtype), v.astype(kv_dtype).astype(dtype)
        for point, value in (("q", q), ("k", k), ("v", v)):
            show(f"layers.{layer}.{point}", value)
        h = _attention(q, k, v, config.attention_scale, config.windows[layer])
        show(f"layers.{layer}.attention", h)
        if config.sub_norm:
            h = norm(h, at + "self_attn.attn_sub_norm.weight")
        x = x + linear(h, at + "self_attn.o_proj")
        show(f"layers.{layer}.after_attention", x)
        h = norm(x, at + "post_attention_layernorm.weight")
        h = _ACTIVATIONS[config.activation](linear(h, at + "mlp.gate_proj")) * linear(h, at + "mlp.up_proj")
        if config.sub_norm:
            h = norm(h, at + "mlp.ffn_sub_norm.weight")
        x = x + linear(h, at + "mlp.down_proj")
        show(f"layers.{layer}.mlp", x)
    x = norm(x, FINAL_NORM)
    show("norm", x)
    return x @ weight(EMBEDDING if config.tied else HEAD).T


def _rotation(config: ModelConfig, n: int, context: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [n, 1, rotary_dim / 2], times the attention factor."""
    frequencies, factor = inverse_frequencies(config, context)
    angles = np.arange(n, dtype=np.float32)[:, None] * frequencies
    angles = angles.astype(np.float64)[:, None]
    return (np.cos(angles) * factor).astype(dtype), (np.sin(angles) * factor).astype(dtype)


def _rotate(x: np.ndarray, cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """Turn feature i together with feature i + half; x [n, heads, head_dim]."""
    half = cosine.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cosine - b * sine, b * cosine + a * sine, x[..., 2 * half :]], axis=-1)


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, window: int) -> np.ndarray:
    """Causal attention of q [n, heads, dim] to k, v [n, kv_heads, dim]; returns [n, heads * dim].

    Query i sees keys max(0, i - window + 1) .. i; window 0: all of 0 .. i.
    """
    n, heads, _ = q.shape
    shared = heads // k.shape[1]
    rows, columns = np.arange(n)[:, None], np.arange(n)[None, :]
    seen = columns <= rows
    if window:
        seen &= columns > rows - window
    outputs = []
    for head in range(heads):
        scores = q[:, head] @ k[:, head // shared].T * q.dtype.type(scale)
        scores = np.where(seen, scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        outputs.append(scores / scores.sum(axis=-1, keepdims=True) @ v[:, head // shared])
    return np.concatenate(outputs, axis=-1)


def _silu(x: np.ndarray) -> np.ndarray:
    return x * (0.5 * (1 + np.tanh(0.5 * x)))  # x / (1 + exp(-x)) without overflow


def _relu2(x: np.ndarray) -> np.ndarray:
    return np.square(np.maximum(x, 0))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(x.dtype.type(0.7978845608028654) * (x + x.dtype.type(0.044715) * x**3)))


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": _silu,
    "relu2": _relu2,
    "gelu_tanh": _gelu_tanh,
}
