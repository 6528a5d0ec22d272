"""Small random networks: built into the native decoder, and run by a float64 decoder in NumPy.

Run as a script it prints a fingerprint of their outputs, for comparison between processes.
"""

import hashlib
import math
from dataclasses import dataclass, field, replace

import numpy as np

from lowbit import _native
from lowbit.packed.layout import pack_codes, pack_groups, pack_values

if __package__:
    from .attention_reference import ATTEND, capped
else:  # run as a script
    from attention_reference import ATTEND, capped


@dataclass(frozen=True)
class Net:
    """A small random network; the fields are those of DecoderSpec."""

    n_layers: int = 2
    hidden_size: int = 48
    intermediate_size: int = 80
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 101
    rotary_dim: int = 16
    activation: str = "silu"
    gated: bool = True
    norm: str = "rms"
    norm_place: str = "pre"
    qk_norm: bool = False
    qk_norm_whole: bool = False
    sub_norm: bool = False
    parallel: bool = False
    positions: str = "rope"
    position_offset: int = 0
    embedding_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    sinks: bool = False
    biases: bool = False
    local_layers: tuple[bool, ...] = ()  # rotate by other speeds
    windows: tuple[int, ...] = (0, 0)
    rope_layers: tuple[bool, ...] = (True, True)
    activation_bits: int = 8
    kv_bits: int = 16
    bits: int = 0  # of the codes; 0: float32 weights
    norm_eps: float = 1e-5
    factor: float = 1.0
    weights: dict = field(default_factory=dict, compare=False)

    def inverse_frequencies(self, theta: float = 10000.0) -> np.ndarray:
        n = self.rotary_dim
        return (theta ** (-np.arange(0, n, 2) / max(n, 1))).astype(np.float32)


SPEC_FIELDS = (
    *("n_layers", "hidden_size", "intermediate_size", "n_heads", "n_kv_heads", "head_dim", "vocab_size"),
    *("norm_eps", "activation", "qk_norm", "sub_norm", "activation_bits", "kv_bits", "rotary_dim"),
    *("gated", "norm", "norm_place", "qk_norm_whole", "parallel", "positions", "position_offset"),
    *("embedding_scale", "attention_softcap", "logit_softcap", "sinks"),
)

NETS = {
    "plain": Net(),
    "one_kv_head": Net(n_kv_heads=1),
    "nine_heads": Net(n_heads=9, n_kv_heads=3, head_dim=8, rotary_dim=8),
    "head_80_partial": Net(head_dim=80, rotary_dim=20, n_kv_heads=4),
    "head_128": Net(head_dim=128, rotary_dim=128, n_heads=2, n_kv_heads=1),
    "head_48": Net(head_dim=48, rotary_dim=48),
    "head_24": Net(head_dim=24, rotary_dim=24, n_heads=2, n_kv_heads=1),
    "windows": Net(windows=(5, 0)),
    "nope": Net(rope_layers=(True, False), factor=1.3),
    "qk_norm": Net(qk_norm=True, head_dim=32, rotary_dim=32),
    "bitnet": Net(sub_norm=True, activation="relu2"),
    "biases": Net(biases=True, activation="gelu_tanh"),
    "odd_sizes": Net(hidden_size=50, intermediate_size=77, vocab_size=37),
    "no_rotation": Net(rotary_dim=0),
    "sandwich": Net(
        norm_place="sandwich",
        biases=True,
        activation="gelu_tanh",
        embedding_scale=1.7,
        attention_softcap=1.5,
        logit_softcap=12.0,
        windows=(90, 0),
        local_layers=(True, False),
    ),
    "post": Net(norm_place="post", qk_norm=True, qk_norm_whole=True, biases=True, n_heads=6),
    "layer_norm": Net(
        norm="layer",
        gated=False,
        activation="gelu",
        positions="learned",
        position_offset=2,
        rotary_dim=0,
        biases=True,
    ),
    "parallel": Net(norm="layer", gated=False, activation="relu", parallel=True, rotary_dim=4, biases=True),
    "sinks": Net(sinks=True, activation="swiglu_clamped", biases=True, windows=(0, 5), n_kv_heads=1),
    "sinks_capped": Net(
        sinks=True, attention_softcap=2.5, head_dim=136, rotary_dim=136, hidden_size=50, parallel=True
    ),
}


def make(net: Net, seed: int = 0) -> Net:
    """The network with random weights: canonical short name -> float32 array."""
    rng = np.random.default_rng(seed)
    q, kv, h, m = (
        net.n_heads * net.head_dim,
        net.n_kv_heads * net.head_dim,
        net.hidden_size,
        net.intermediate_size,
    )
    shapes = {
        "q": (q, h),
        "k": (kv, h),
        "v": (kv, h),
        "o": (h, q),
        "gate": (m, h),
        "up": (m, h),
        "down": (h, m),
    }
    w = {name: rng.normal(size=(net.vocab_size, h)) for name in ("embed", "head")}
    w["norm"] = rng.uniform(0.5, 1.5, h)
    if net.norm == "layer":
        w["norm_bias"] = 0.3 * rng.normal(size=h)
    if net.positions == "learned":
        w["positions"] = rng.normal(size=(1200, h))
    for i in range(net.n_layers):
        at = f"layers.{i}."
        for name, shape in shapes.items():
            if name == "gate" and not net.gated:
                continue
            w[at + name] = rng.normal(size=shape) / np.sqrt(shape[1])
            if net.biases:
                w[at + name + "_bias"] = 0.3 * rng.normal(size=shape[0])
        if net.norm_place != "post":
            w[at + "input_norm"], w[at + "post_norm"] = rng.uniform(0.5, 1.5, (2, h))
        if net.norm_place != "pre":
            w[at + "attn_out_norm"], w[at + "mlp_out_norm"] = rng.uniform(0.5, 1.5, (2, h))
        if net.norm == "layer":
            w[at + "input_norm_bias"], w[at + "post_norm_bias"] = 0.3 * rng.normal(size=(2, h))
        if net.qk_norm:
            w[at + "q_norm"] = rng.uniform(0.5, 1.5, q if net.qk_norm_whole else net.head_dim)
            w[at + "k_norm"] = rng.uniform(0.5, 1.5, kv if net.qk_norm_whole else net.head_dim)
        if net.sinks:
            w[at + "sinks"] = rng.normal(size=net.n_heads)
        if net.sub_norm:
            w[at + "attn_sub_norm"], w[at + "ffn_sub_norm"] = (
                rng.uniform(0.5, 1.5, q),
                rng.uniform(0.5, 1.5, m),
            )
    return replace(net, weights={name: x.astype(np.float32) for name, x in w.items()})


def matrix(values: np.ndarray, bits: int) -> _native.Matrix:
    """float32 weights as they are, or rounded to symmetric codes with one scale per row."""
    native = _native.Matrix(*values.shape)
    if not bits:
        native.add_float_term("fp32", pack_values(values))
        return native
    top = 2 ** (bits - 1)
    scale = (np.abs(values).max(1) / (top - 1)).astype(np.float32)
    codes = np.clip(np.rint(values / scale[:, None]), -top, top - 1).astype(np.int64) + top
    levels = np.arange(-top, top, dtype=np.float32)[None]
    native.add_code_term(
        bits, pack_codes(codes.astype(np.uint8), bits), "fp32", pack_groups(scale[:, None]), 0, levels
    )
    return native


def build(net: Net) -> _native.Decoder:
    spec = _native.DecoderSpec()
    for name in SPEC_FIELDS:
        setattr(spec, name, getattr(net, name))
    spec.attention_scale = net.head_dim**-0.5
    decoder = _native.Decoder(spec)
    for name, x in net.weights.items():
        if x.ndim == 2:
            decoder.set_matrix(name, matrix(x, net.bits))
        else:
            decoder.set_vector(name, x)
    decoder.set_rope(net.inverse_frequencies(), net.factor, list(net.rope_layers))
    if net.local_layers:
        decoder.set_local_rope(net.inverse_frequencies(100.0), net.factor, list(net.local_layers))
    decoder.set_windows(list(net.windows))
    decoder.finish()
    return decoder


def reference(net: Net, tokens: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocab] in float64, with keys and values rounded as net.kv_bits says."""
    w = {name: x.astype(np.float64) for name, x in net.weights.items()}
    n, heads, kv, dim = len(tokens), net.n_heads, net.n_kv_heads, net.head_dim
    gated, whole = net.gated, net.qk_norm and net.qk_norm_whole

    def rms(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + net.norm_eps) * weight

    def norm(x, name):
        """Of the stream; x itself where the network has no such norm."""
        if name not in w:
            return x
        if net.norm == "rms":
            return rms(x, w[name])
        x = x - x.mean(-1, keepdims=True)
        return rms(x, w[name]) + w.get(name + "_bias", 0.0)

    def linear(x, name):
        return x @ w[name].T + w.get(name + "_bias", 0.0)

    def rotate(x, theta):
        angles = (np.arange(n, dtype=np.float32)[:, None] * net.inverse_frequencies(theta)).astype(np.float64)
        cosine, sine = np.cos(angles)[:, None] * net.factor, np.sin(angles)[:, None] * net.factor
        half = net.rotary_dim // 2
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([a * cosine - b * sine, b * cosine + a * sine, rest], -1)

    def attention(h, i):
        at = f"layers.{i}."
        q, k, v = (linear(h, at + name) for name in "qkv")
        if whole:
            q, k = rms(q, w[at + "q_norm"]), rms(k, w[at + "k_norm"])
        q, k, v = q.reshape(n, heads, dim), k.reshape(n, kv, dim), v.reshape(n, kv, dim)
        if net.qk_norm and not whole:
            q, k = rms(q, w[at + "q_norm"]), rms(k, w[at + "k_norm"])
        if net.rope_layers[i] and net.rotary_dim:
            theta = 100.0 if net.local_layers and net.local_layers[i] else 10000.0
            q, k = rotate(q, theta), rotate(k, theta)
        h = ATTEND[net.kv_bits](net, q, k, v, net.windows[i], w.get(at + "sinks")).reshape(n, -1)
        if net.sub_norm:
            h = rms(h, w[at + "attn_sub_norm"])
        return norm(linear(h, at + "o"), at + "attn_out_norm")

    def mlp(h, i):
        at = f"layers.{i}."
        up = linear(h, at + "up")
        if net.activation == "swiglu_clamped":
            gate = np.minimum(linear(h, at + "gate"), 7)
            h = gate / (1 + np.exp(-1.702 * gate)) * (np.clip(up, -7, 7) + 1)
        else:
            h = ACTS[net.activation](linear(h, at + "gate")) * up if gated else ACTS[net.activation](up)
        if net.sub_norm:
            h = rms(h, w[at + "ffn_sub_norm"])
        return norm(linear(h, at + "down"), at + "mlp_out_norm")

    x = w["embed"][tokens] * net.embedding_scale
    if net.positions == "learned":
        x = x + w["positions"][net.position_offset : net.position_offset + n]
    for i in range(net.n_layers):
        before = x
        x = x + attention(norm(x, f"layers.{i}.input_norm"), i)
        x = x + mlp(norm(before if net.parallel else x, f"layers.{i}.post_norm"), i)
    return capped(norm(x, "norm") @ w["head"].T, net.logit_softcap)


ACTS = {
    "silu": lambda g: g / (1 + np.exp(-g)),
    "relu2": lambda g: np.maximum(g, 0) ** 2,
    "relu": lambda g: np.maximum(g, 0),
    "gelu": lambda g: 0.5 * g * (1 + np.vectorize(math.erf)(g / np.sqrt(2))),
    "gelu_tanh": lambda g: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))),
}


def random_tokens(net: Net, n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, net.vocab_size, n).astype(np.int32)


# Bits of keys and values with float weights and with codes.
DIGESTED = {
    "nine_heads": (8, 8),
    "head_80_partial": (8, 4),
    "bitnet": (8, 8),
    "biases": (16, 16),
    "odd_sizes": (4, 4),
    "qk_norm": (2, 2),
    "sandwich": (16, 8),
    "post": (16, 8),
    "layer_norm": (8, 16),
    "parallel": (8, 4),
    "sinks": (16, 8),
    "sinks_capped": (8, 4),
}


def digest() -> str:
    """A fingerprint of logits and samples over several networks, for comparison between processes."""
    total = hashlib.sha256()
    for name, kinds in DIGESTED.items():
        for bits, kv_bits in zip((0, 4), kinds):
            wide = name == "biases"
            net = make(replace(NETS[name], bits=bits, activation_bits=16 if wide else 8, kv_bits=kv_bits))
            decoder, tokens = build(net), random_tokens(net, 290)
            cache = _native.KvCache(decoder, 300)
            total.update(decoder.logits(tokens[:280], [cache], [280]).tobytes())
            sampler = _native.Sampler(temperature=0.9, top_p=0.95, seed=3)
            for token in tokens[280:]:
                ids, logprobs = decoder.sample(np.array([token]), [cache], [1], [sampler])
                total.update(ids.tobytes() + logprobs.tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    print(digest())
