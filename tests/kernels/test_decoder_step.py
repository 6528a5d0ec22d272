"""The native decoder step against a float64 decoder in NumPy, and against itself cut in other ways."""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from lowbit import _native
from lowbit.packed.layout import pack_codes, pack_groups, pack_values


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
    bits: int = 0  # of the codes; 0: float32 weights
    norm_eps: float = 1e-5
    factor: float = 1.0
    weights: dict = field(default_factory=dict, compare=False)

    def inverse_frequencies(self) -> np.ndarray:
        n = self.rotary_dim
        return (10000.0 ** (-np.arange(0, n, 2) / max(n, 1))).astype(np.float32)


NETS = {
    "plain": Net(),
    "one_kv_head": Net(n_kv_heads=1),
    "nine_heads": Net(n_heads=9, n_kv_heads=3, head_dim=8, rotary_dim=8),
    "head_80_partial": Net(head_dim=80, rotary_dim=20, n_kv_heads=4),
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
    for name in (
        "n_layers",
        "hidden_size",
        "intermediate_size",
        "n_heads",
        "n_kv_heads",
        "head_dim",
        "vocab_size",
    ):
        setattr(spec, name, getattr(net, name))
    for name in ("norm_eps", "activation", "qk_norm", "sub_norm", "activation_bits", "rotary_dim"):
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


def reference(net: Net, tokens: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocab] in float64, with keys and values rounded to float16."""
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
    position = np.arange(n)
    for i in range(net.n_layers):
        at = f"layers.{i}."
        h = norm(x, w[at + "input_norm"])
        q, k = linear(h, at + "q").reshape(n, heads, dim), linear(h, at + "k").reshape(n, kv, dim)
        v = linear(h, at + "v").reshape(n, kv, dim)
        if net.qk_norm:
            q, k = norm(q, w[at + "q_norm"]), norm(k, w[at + "k_norm"])
        if net.rope_layers[i] and net.rotary_dim:
            q, k = rotate(q), rotate(k)
        k, v = (np.repeat(a.astype(np.float16).astype(np.float64), heads // kv, 1) for a in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) * dim**-0.5
        distance = position[:, None] - position
        seen = (distance >= 0) & ((net.windows[i] == 0) | (distance < net.windows[i]))
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        h = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v).reshape(n, -1)
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


def all_logits(decoder, tokens, chunks=None, capacity=1024):
    """Logits of every token, fed in pieces of the given lengths (repeated)."""
    cache = _native.KvCache(decoder, capacity)
    out, start, turn = [], 0, 0
    chunks = chunks or [len(tokens)]
    while start < len(tokens):
        n = min(chunks[turn % len(chunks)], len(tokens) - start)
        out.append(decoder.logits(tokens[start : start + n], [cache], [n], all=True))
        start, turn = start + n, turn + 1
    assert cache.length == len(tokens)
    return np.concatenate(out)


def difference(a, b) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("name", NETS)
def test_logits_match_a_float64_decoder(name):
    net = make(NETS[name])
    tokens = random_tokens(net, 90)
    got, want = all_logits(build(net), tokens), reference(net, tokens)
    # Rounding of float32 sums, and now and then of a key or value to the other 16-bit neighbour (2**-11).
    assert difference(got, want) < 2e-4
    assert difference(all_logits(build(make(NETS[name], seed=5)), tokens), want) > 0.1, (
        "the test sees nothing"
    )


def test_contexts_of_several_segments():
    net = make(Net(windows=(0, 300), n_heads=3, n_kv_heads=1, head_dim=8, rotary_dim=8, n_layers=2))
    tokens = random_tokens(net, 700)
    whole = all_logits(build(net), tokens)
    assert difference(whole, reference(net, tokens)) < 2e-4
    # One token at a time near segment borders, whole passes elsewhere.
    cut = all_logits(build(net), tokens, [250, *[1] * 12, 200, 37, *[1] * 14])
    assert np.array_equal(whole, cut)


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", ["nine_heads", "head_80_partial", "windows", "bitnet", "biases"])
def test_chunking_does_not_change_a_bit(name, bits):
    net = make(replace(NETS[name], bits=bits, activation_bits=16 if bits else 8))
    decoder, tokens = build(net), random_tokens(net, 150)
    whole = all_logits(decoder, tokens)
    for chunks in ([1], [2], [3, 1, 40, 64], [149, 1], [17]):
        assert np.array_equal(whole, all_logits(decoder, tokens, chunks)), chunks


def test_companions_do_not_change_a_bit():
    net = make(replace(NETS["nine_heads"], bits=4))
    decoder = build(net)
    prompts = [random_tokens(net, n, seed=n) for n in (1, 7, 70, 130)]
    nexts = [random_tokens(net, 3, seed=50 + i) for i in range(4)]
    alone = []
    for prompt, tokens in zip(prompts, nexts):
        cache = _native.KvCache(decoder, 256)
        rows = [decoder.logits(prompt, [cache], [len(prompt)])[0]]
        rows += [decoder.logits(tokens[i : i + 1], [cache], [1])[0] for i in range(3)]
        alone.append(rows)
    caches = [_native.KvCache(decoder, 256) for _ in prompts]
    together = [decoder.logits(np.concatenate(prompts), caches, [len(p) for p in prompts])]
    together += [decoder.logits(np.array([t[i] for t in nexts], np.int32), caches, [1] * 4) for i in range(3)]
    assert np.array_equal(np.array(alone).swapaxes(0, 1), np.array(together))


def test_prompts_longer_than_a_pass():
    net = make(replace(NETS["one_kv_head"], bits=4))
    decoder, tokens = build(net), random_tokens(net, 1100)
    cache = _native.KvCache(decoder, 1200)
    last = decoder.logits(tokens, [cache], [len(tokens)])
    whole = all_logits(decoder, tokens, [1100], 1200)
    assert np.array_equal(last[0], whole[-1])
    assert np.array_equal(whole, all_logits(decoder, tokens, [333, 1], 1200))


def digest() -> str:
    """A fingerprint of logits and samples over several networks, for comparison between processes."""
    total = hashlib.sha256()
    for name in ("nine_heads", "head_80_partial", "bitnet", "biases", "odd_sizes", "qk_norm"):
        for bits in (0, 4):
            net = make(replace(NETS[name], bits=bits, activation_bits=16 if name == "biases" else 8))
            decoder, tokens = build(net), random_tokens(net, 290)
            cache = _native.KvCache(decoder, 300)
            total.update(decoder.logits(tokens[:280], [cache], [280]).tobytes())
            sampler = _native.Sampler(temperature=0.9, top_p=0.95, seed=3)
            for token in tokens[280:]:
                ids, logprobs = decoder.sample(np.array([token]), [cache], [1], [sampler])
                total.update(ids.tobytes() + logprobs.tobytes())
    return total.hexdigest()


def test_instruction_sets_and_threads_give_the_same_bits():
    script = (
        "import importlib.util, sys;"
        f"spec = importlib.util.spec_from_file_location('step', {str(Path(__file__))!r});"
        "step = importlib.util.module_from_spec(spec); sys.modules['step'] = step; spec.loader.exec_module(step);"
        "print(step.digest())"
    )
    seen = {}
    for isa, threads in [(isa, 1) for isa in _native.supported_isas()] + [("", 2), ("", 3), ("scalar", 2)]:
        environment = os.environ | {"LOWBIT_ISA": isa, "LOWBIT_THREADS": str(threads)}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        seen[isa, threads] = run.stdout.strip()
    assert len(set(seen.values())) == 1, seen


def test_truncate_and_continue():
    net = make(replace(NETS["windows"], bits=4))
    decoder, tokens = build(net), random_tokens(net, 100)
    whole = all_logits(decoder, tokens)
    cache = _native.KvCache(decoder, 128)
    decoder.logits(random_tokens(net, 120, seed=9), [cache], [120])
    cache.truncate(0)
    decoder.logits(tokens[:60], [cache], [60])
    decoder.logits(random_tokens(net, 20, seed=8), [cache], [20])
    cache.truncate(60)
    assert np.array_equal(whole[60:], decoder.logits(tokens[60:], [cache], [40], all=True))


@pytest.mark.parametrize("n", [2, 3, 130, 600])
def test_score_is_the_log_softmax_of_the_logits(n):
    net = make(replace(NETS["plain"], bits=4))
    decoder, tokens = build(net), random_tokens(net, n)
    logits = all_logits(decoder, tokens).astype(np.float64)
    peak = logits.max(1, keepdims=True)
    logprobs = logits - peak - np.log(np.exp(logits - peak).sum(1, keepdims=True))
    cache = _native.KvCache(decoder, 700)
    got = decoder.score(tokens, cache)
    assert cache.length == n
    np.testing.assert_allclose(got, logprobs[np.arange(n - 1), tokens[1:]], rtol=0, atol=2e-5)


def test_sample_agrees_with_logits():
    net = make(replace(NETS["plain"], bits=4))
    decoder = build(net)
    prompts = [random_tokens(net, n, seed=n) for n in (4, 9, 600)]
    caches = [_native.KvCache(decoder, 640) for _ in prompts]
    samplers = [_native.Sampler(top_logprobs=3), _native.Sampler(temperature=1.0, seed=4), _native.Sampler()]
    counts = [len(p) for p in prompts]
    ids, logprobs = decoder.sample(np.concatenate(prompts), caches, counts, samplers)
    alone = [_native.Sampler(top_logprobs=3), _native.Sampler(temperature=1.0, seed=4), _native.Sampler()]
    for i, prompt in enumerate(prompts):
        row = decoder.logits(prompt, [_native.KvCache(decoder, 640)], [len(prompt)])[0]
        assert alone[i].sample(row) == ids[i]
        assert alone[i].logprob == logprobs[i]
    assert samplers[0].top() == alone[0].top() and len(alone[0].top()) == 3
    assert [c.length for c in caches] == counts


def test_wrong_arguments_are_named():
    net = make(NETS["plain"])
    decoder = build(net)
    cache = _native.KvCache(decoder, 8)
    one = np.array([1], np.int32)
    for tokens, caches, counts, words in [
        ([101], [cache], [1], "101"),
        ([-1], [cache], [1], "-1"),
        ([1, 2], [cache], [1], "counts sum to 1"),
        ([1] * 9, [cache], [9], "capacity=8"),
        ([1, 1], [cache, cache], [1, 1], "twice"),
        ([1], [cache], [1, 1], "1 caches but 2 counts"),
        ([1], [cache], [0], "counts"),
        ([], [], [], "no caches"),
    ]:
        with pytest.raises(ValueError, match=words):
            decoder.logits(tokens, caches, counts)
    other = build(make(NETS["head_48"]))
    with pytest.raises(ValueError, match="another decoder"):
        other.logits(one, [cache], [1])
    with pytest.raises(TypeError):
        decoder.logits(one, [None], [1])
    with pytest.raises(TypeError):
        decoder.logits(np.array([1.5]), [cache], [1])
    with pytest.raises(ValueError, match="samplers"):
        decoder.sample(one, [cache], [1], [])
    assert cache.length == 0, "a refused step leaves the cache alone"
    decoder.logits(one, [cache], [1])
    with pytest.raises(ValueError, match="length=5"):
        cache.truncate(5)
    with pytest.raises(ValueError, match="capacity=0"):
        _native.KvCache(decoder, 0)


def test_incomplete_decoders_are_refused():
    net = make(NETS["plain"])
    for change, words in [({"head_dim": 20}, "head_dim=20"), ({"n_kv_heads": 3}, "n_kv_heads=3")]:
        with pytest.raises(ValueError, match=words):
            build(replace(net, **change))
    for missing in ("layers.1.up", "norm", "layers.0.post_norm", "head"):
        with pytest.raises(ValueError, match=missing):
            build(replace(net, weights={k: v for k, v in net.weights.items() if k != missing}))
    with pytest.raises(ValueError, match=r"layers\.0\.q.*\[64, 48\]"):
        build(replace(net, weights=net.weights | {"layers.0.q": np.zeros((63, 48), np.float32)}))
    with pytest.raises(ValueError, match="ignored"):
        build(replace(net, weights=net.weights | {"layers.0.q_norm": np.ones(16, np.float32)}))
    with pytest.raises(ValueError, match=r"layers\.7"):
        build(replace(net, weights=net.weights | {"layers.7.q": net.weights["layers.0.q"]}))
    with pytest.raises(ValueError, match="not finite"):
        build(replace(net, weights=net.weights | {"norm": np.full(48, np.nan, np.float32)}))


def test_logits_that_are_not_finite_are_an_error_and_change_nothing():
    net = make(NETS["plain"])
    head = net.weights["head"].copy()
    head[7] = np.nan
    decoder = build(replace(net, weights=net.weights | {"head": head}))
    cache, sampler = _native.KvCache(decoder, 8), _native.Sampler()
    with pytest.raises(RuntimeError, match="not finite"):
        decoder.sample([1, 2], [cache], [2], [sampler])
    with pytest.raises(RuntimeError, match="not finite"):
        decoder.score([1, 2], cache)
    assert cache.length == 0
