"""Small random networks with experts, whose attention adds nothing: native, and in NumPy in float64.

Run as a script it prints a fingerprint of their outputs, for comparison between processes.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from lowbit import _native

if __package__:
    from .decoder_net import matrix
else:  # run as a script
    from decoder_net import matrix


@dataclass(frozen=True)
class ExpertNet:
    """The fields are those of DecoderSpec."""

    n_layers: int = 2
    hidden_size: int = 48
    intermediate_size: int = 80
    vocab_size: int = 101
    activation: str = "silu"
    activation_bits: int = 16
    n_experts: int = 5
    experts_per_token: int = 2
    expert_size: int = 40
    router_order: str = "softmax_topk"
    router_renormalize: bool = True
    sparse_layers: tuple[bool, ...] = (True, True)
    biases: bool = False
    bits: int = 0  # of the codes; 0: float32 weights
    weights: dict = field(default_factory=dict, compare=False)


SPEC_FIELDS = (
    *("n_layers", "hidden_size", "intermediate_size", "vocab_size", "activation", "activation_bits"),
    *("n_experts", "experts_per_token", "expert_size", "router_order", "router_renormalize"),
)
NETS = {
    "plain": ExpertNet(),
    "not_renormalized": ExpertNet(router_renormalize=False),
    "topk_first": ExpertNet(router_order="topk_softmax", router_renormalize=False, biases=True),
    "one_expert": ExpertNet(n_experts=1, experts_per_token=1),
    "every_expert": ExpertNet(n_experts=4, experts_per_token=4, router_renormalize=False),
    "one_of_many": ExpertNet(n_experts=33, experts_per_token=1, router_renormalize=False),
    "many": ExpertNet(n_experts=64, experts_per_token=8, expert_size=24),
    "odd_sizes": ExpertNet(hidden_size=50, expert_size=77, vocab_size=37, experts_per_token=3),
    "dense_first": ExpertNet(sparse_layers=(False, True), biases=True),
    "dense_last": ExpertNet(sparse_layers=(True, False), activation="gelu_tanh"),
}
PARTS = {"gate": ("expert_size", "hidden_size"), "up": ("expert_size", "hidden_size")}
PARTS["down"] = ("hidden_size", "expert_size")


def make(net: ExpertNet, seed: int = 0) -> ExpertNet:
    """The network with random weights: native name -> float32 array."""
    rng = np.random.default_rng(seed)
    h, m = net.hidden_size, net.intermediate_size
    w = {name: rng.normal(size=(net.vocab_size, h)) for name in ("embed", "head")}
    w["norm"] = rng.uniform(0.5, 1.5, h)

    def add(name, rows, columns):
        w[name] = rng.normal(size=(rows, columns)) * 1.5 / np.sqrt(columns)
        if net.biases:
            w[name + "_bias"] = 0.3 * rng.normal(size=rows)

    for i, sparse in enumerate(net.sparse_layers):
        at = f"layers.{i}."
        for name in ("q", "k", "v", "o"):
            w[at + name] = np.zeros((8, h) if name != "o" else (h, 8))
        w[at + "input_norm"], w[at + "post_norm"] = rng.uniform(0.5, 1.5, (2, h))
        if sparse:
            add(at + "router", net.n_experts, h)
            for j in range(net.n_experts):
                for part, (rows, columns) in PARTS.items():
                    add(f"{at}experts.{j}.{part}", getattr(net, rows), getattr(net, columns))
        else:
            for part, shape in (("gate", (m, h)), ("up", (m, h)), ("down", (h, m))):
                add(at + part, *shape)
    return replace(net, weights={name: x.astype(np.float32) for name, x in w.items()})


def build(net: ExpertNet, of_expert: Callable[[np.ndarray], _native.Matrix] | None = None) -> _native.Decoder:
    """of_expert: what packs the matrices of experts; None: codes of net.bits."""
    spec = _native.DecoderSpec()
    for name in SPEC_FIELDS:
        setattr(spec, name, getattr(net, name))
    spec.n_heads = spec.n_kv_heads = 1
    spec.head_dim, spec.attention_scale, spec.norm_eps = 8, 1.0, 1e-5
    spec.sparse_layers = list(net.sparse_layers)
    decoder = _native.Decoder(spec)
    for name, x in net.weights.items():
        if x.ndim == 2:
            plain = name.endswith(("router", ".q", ".k", ".v", ".o"))
            pack = of_expert if of_expert is not None and ".experts." in name else None
            decoder.set_matrix(name, pack(x) if pack else matrix(x, 0 if plain else net.bits))
        else:
            decoder.set_vector(name, x)
    decoder.set_rope(np.zeros(0, np.float32), 1.0, [True] * net.n_layers)
    decoder.set_windows([0] * net.n_layers)
    decoder.finish()
    return decoder


def chosen(net: ExpertNet, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Experts [n, k] ascending, of equal scores the lower ones, and their weights; scores [n, experts]."""
    k = net.experts_per_token
    best = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :k], axis=1)
    e = np.exp(scores - scores.max(1, keepdims=True))
    some = np.take_along_axis(e, best, 1)
    whole = net.router_order == "softmax_topk" and not net.router_renormalize
    return best, some / (e if whole else some).sum(1, keepdims=True)


def reference(net: ExpertNet, tokens: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocab] in float64."""
    w = {name: x.astype(np.float64) for name, x in net.weights.items()}
    acts = {
        "silu": lambda g: g / (1 + np.exp(-g)),
        "gelu_tanh": lambda g: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))),
    }

    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def linear(x, name):
        return x @ w[name].T + w.get(name + "_bias", 0.0)

    def mlp(x, at):
        return linear(acts[net.activation](linear(x, at + "gate")) * linear(x, at + "up"), at + "down")

    x = w["embed"][tokens]
    for i, sparse in enumerate(net.sparse_layers):
        at = f"layers.{i}."
        h = norm(x, w[at + "post_norm"])
        if not sparse:
            x = x + mlp(h, at)
            continue
        best, share = chosen(net, linear(h, at + "router"))
        for row in range(len(x)):
            for j, weight in zip(best[row], share[row]):
                x[row] += weight * mlp(h[row], f"{at}experts.{j}.")
    return norm(x, w["norm"]) @ w["head"].T


def random_tokens(net: ExpertNet, n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, net.vocab_size, n).astype(np.int32)


def logits(decoder: _native.Decoder, tokens: np.ndarray, counts: list[int] | None = None) -> np.ndarray:
    """Of every token, fed in runs of the given lengths."""
    cache, rows, at = _native.KvCache(decoder, len(tokens)), [], 0
    for count in counts or [len(tokens)]:
        rows.append(decoder.logits(tokens[at : at + count], [cache], [count], all=True))
        at += count
    return np.concatenate(rows)


def digest() -> str:
    """A fingerprint over several networks and ways of feeding them."""
    total = hashlib.sha256()
    for name in ("many", "topk_first", "odd_sizes", "not_renormalized"):
        for bits, activation_bits in ((0, 8), (4, 8), (3, 16)):
            net = make(replace(NETS[name], bits=bits, activation_bits=activation_bits))
            tokens = random_tokens(net, 170)
            total.update(logits(build(net), tokens, [1, 2, 5, 130, 32]).tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    print(digest())
