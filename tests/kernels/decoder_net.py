"""Small random networks: built into the native decoder, and run by a float64 decoder in NumPy.

Run as a script it prints a fingerprint of their outputs, for comparison between processes.
"""

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np

from lowbit import _native
from lowbit.packed.layout import pack_codes, pack_groups, pack_values

if __package__:
    from .kv_pages import PAGE, as_codes
else:  # run as a script
    from kv_pages import PAGE, as_codes


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
    qk_norm: bool = False
    sub_norm: bool = False
    biases: bool = False
    windows: tuple[int, ...] = (0, 0)
    rope_layers: tuple[bool, ...] = (True, True)
    activation_bits: int = 8
    kv_bits: int = 16
    bits: int = 0  # of the codes; 0: float32 weights
    norm_eps: float = 1e-5
    factor: float = 1.0
    weights: dict = field(default_factory=dict, compare=False)

    def inverse_frequencies(self) -> np.ndarray:
        n = self.rotary_dim
        return (10000.0 ** (-np.arange(0, n, 2) / max(n, 1))).astype(np.float32)


SPEC_FIELDS = (
    *("n_layers", "hidden_size", "intermediate_size", "n_heads", "n_kv_heads", "head_dim", "vocab_size"),
    *("norm_eps", "activation", "qk_norm", "sub_norm", "activation_bits", "kv_bits", "rotary_dim"),
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
    for i in range(net.n_layers):
        at = f"layers.{i}."
        for name, shape in shapes.items():
            w[at + name] = rng.normal(size=shape) / np.sqrt(shape[1])
            if net.biases:
                w[at + name + "_bias"] = 0.3 * rng.normal(size=shape[0])
        w[at + "input_norm"], w[at + "post_norm"] = rng.uniform(0.5, 1.5, (2, h))
        if net.qk_norm:
            w[at + "q_norm"], w[at + "k_norm"] = rng.uniform(0.5, 1.5, (2, net.head_dim))
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
    decoder.set_windows(list(net.windows))
    decoder.finish()
    return decoder


def seen_keys(n: int, window: int) -> np.ndarray:
    """Which key (column) each query (row) sees."""
    distance = np.arange(n)[:, None] - np.arange(n)
    return (distance >= 0) & ((window == 0) | (distance < window))


def attend_floats(net: Net, q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int) -> np.ndarray:
    """Attention [n, heads, dim] with keys and values rounded to float16."""
    k, v = (
        np.repeat(a.astype(np.float16).astype(np.float64), net.n_heads // net.n_kv_heads, 1) for a in (k, v)
    )
    scores = np.einsum("ihd,jhd->hij", q, k) * net.head_dim**-0.5
    scores = np.where(seen_keys(len(q), window), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v)


def round_groups(x: np.ndarray, size: int) -> np.ndarray:
    """x with each run of `size` channels rounded to 127 steps of its largest magnitude either way."""
    out = np.empty_like(x)
    for at in range(0, x.shape[-1], size):
        part = x[..., at : at + size]
        scale = np.maximum(np.abs(part).max(-1, keepdims=True), 1e-18) / 127
        out[..., at : at + size] = np.rint(part / scale) * scale
    return out


def attend_integers(net: Net, q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int) -> np.ndarray:
    """Attention [n, heads, dim] as attention_integer.cc defines it.

    Queries and keys have 8 bits per 64 channels, values per head; in each segment of 256 keys the weights
    times the values' scales have 8 bits of the largest.
    """
    n, group = len(q), net.n_heads // net.n_kv_heads
    scales = np.maximum(np.abs(v).max(-1), 1e-18) / 127  # [n, kv heads]
    q, k = round_groups(q * net.head_dim**-0.5, 64), round_groups(k, 64)
    v, scales = (np.repeat(a, group, 1) for a in (round_groups(v, net.head_dim), scales))
    scores = np.einsum("ihd,jhd->hij", q, np.repeat(k, group, 1)) + np.log(scales).T[:, None]
    scores = np.where(seen_keys(n, window), scores, -np.inf)
    mixed, total = np.zeros((n, net.n_heads, net.head_dim)), np.zeros((n, net.n_heads))
    top = scores.max(-1, keepdims=True)  # folding segments multiplies by exp(their own maximum - this)
    for at in range(0, n, 256):
        part = scores[..., at : at + 256]
        peak = part.max(-1, keepdims=True)
        weights = 255 * np.exp(part - np.where(np.isfinite(peak), peak, 0))
        fade = np.exp(peak - top)
        values, inverses = v[at : at + 256] / scales[at : at + 256, :, None], 1 / scales[at : at + 256]
        mixed += np.einsum("hij,jhd->ihd", np.rint(weights) * fade, values)
        total += np.einsum("hij,jh->ih", weights * fade, inverses)
    return mixed / total[..., None]


def attend_pages(net: Net, q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int) -> np.ndarray:
    """Attention [n, heads, dim]: earlier pages of 64 positions as codes, a query's own page in float16."""
    n, group = len(q), net.n_heads // net.n_kv_heads
    pages = np.arange(n) // PAGE
    own = pages[:, None] == pages
    seen_k, seen_v = as_codes(k, v, net.kv_bits)
    near_k, near_v = (a.astype(np.float16).astype(np.float64) for a in (k, v))
    seen_k, seen_v, near_k, near_v = (np.repeat(a, group, 1) for a in (seen_k, seen_v, near_k, near_v))
    scores = (
        np.where(own, np.einsum("ihd,jhd->hij", q, near_k), np.einsum("ihd,jhd->hij", q, seen_k))
        * net.head_dim**-0.5
    )
    scores = np.where(seen_keys(n, window), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", p * own, near_v) + np.einsum("hij,jhd->ihd", p * ~own, seen_v)


ATTEND = {16: attend_floats, 8: attend_integers, 4: attend_pages, 2: attend_pages}


def reference(net: Net, tokens: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocab] in float64, with keys and values rounded as net.kv_bits says."""
    w = {name: x.astype(np.float64) for name, x in net.weights.items()}
    n, heads, kv, dim = len(tokens), net.n_heads, net.n_kv_heads, net.head_dim
    angles = (np.arange(n, dtype=np.float32)[:, None] * net.inverse_frequencies()).astype(np.float64)
    cosine, sine = np.cos(angles)[:, None] * net.factor, np.sin(angles)[:, None] * net.factor

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + net.norm_eps) * weight

    def linear(x, name):
        return x @ w[name].T + w.get(name + "_bias", 0.0)

    def rotate(x):
        half = net.rotary_dim // 2
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([a * cosine - b * sine, b * cosine + a * sine, rest], -1)

    acts = {
        "silu": lambda g: g / (1 + np.exp(-g)),
        "relu2": lambda g: np.maximum(g, 0) ** 2,
        "gelu_tanh": lambda g: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))),
    }
    x = w["embed"][tokens]
    for i in range(net.n_layers):
        at = f"layers.{i}."
        h = norm(x, w[at + "input_norm"])
        q, k = linear(h, at + "q").reshape(n, heads, dim), linear(h, at + "k").reshape(n, kv, dim)
        v = linear(h, at + "v").reshape(n, kv, dim)
        if net.qk_norm:
            q, k = norm(q, w[at + "q_norm"]), norm(k, w[at + "k_norm"])
        if net.rope_layers[i] and net.rotary_dim:
            q, k = rotate(q), rotate(k)
        h = ATTEND[net.kv_bits](net, q, k, v, net.windows[i]).reshape(n, -1)
        if net.sub_norm:
            h = norm(h, w[at + "attn_sub_norm"])
        x = x + linear(h, at + "o")
        h = norm(x, w[at + "post_norm"])
        h = acts[net.activation](linear(h, at + "gate")) * linear(h, at + "up")
        if net.sub_norm:
            h = norm(h, w[at + "ffn_sub_norm"])
        x = x + linear(h, at + "down")
    return norm(x, w["norm"]) @ w["head"].T


def random_tokens(net: Net, n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, net.vocab_size, n).astype(np.int32)


def digest() -> str:
    """A fingerprint of logits and samples over several networks, for comparison between processes."""
    total = hashlib.sha256()
    for name in ("nine_heads", "head_80_partial", "bitnet", "biases", "odd_sizes", "qk_norm"):
        for bits in (0, 4):
            wide = name == "biases"
            kv_bits = {"biases": 16, "odd_sizes": 4, "qk_norm": 2, "head_80_partial": 4 if bits else 8}.get(
                name, 8
            )
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
