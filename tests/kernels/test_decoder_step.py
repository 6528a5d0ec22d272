"""The native decoder step against a float64 decoder in NumPy, and against itself cut in other ways."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lowbit import _native

from .decoder_net import NETS, Net, build, make, random_tokens, reference

# What other families than Llama's bring.
FAMILIES = ["sandwich", "post", "layer_norm", "parallel", "sinks", "sinks_capped"]


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


def mean_difference(a, b) -> float:
    return float(np.abs(a - b).mean() / np.abs(b).mean())


@pytest.mark.parametrize("name", NETS)
def test_attention_in_integers_matches_its_definition(name):
    net = make(replace(NETS[name], kv_bits=8))
    tokens = random_tokens(net, 90)
    got, want = all_logits(build(net), tokens), reference(net, tokens)
    # Now and then float32 and float64 round to neighbouring codes, 1/127 of one channel of one key.
    assert mean_difference(got, want) < 5e-4
    assert difference(got, want) < 5e-3
    assert mean_difference(reference(replace(net, kv_bits=16), tokens), want) > 2e-3, "the test sees nothing"


@pytest.mark.parametrize("kv_bits", [4, 2])
@pytest.mark.parametrize("name", NETS)
def test_pages_of_codes_match_their_definition(name, kv_bits):
    net = make(replace(NETS[name], kv_bits=kv_bits))
    tokens = random_tokens(net, 150)
    got, want = all_logits(build(net), tokens), reference(net, tokens)
    # Now and then float32 and float64 round to neighbouring codes: a fifteenth of a range.
    assert mean_difference(got, want) < 2e-3
    assert mean_difference(reference(replace(net, kv_bits=16), tokens), want) > 8e-3, "the test sees nothing"


@pytest.mark.parametrize("kv_bits", [16, 8, 4, 2])
@pytest.mark.parametrize("more", [{}, {"sinks": True, "attention_softcap": 1.5}], ids=str)
def test_contexts_of_several_segments(kv_bits, more):
    net = Net(
        windows=(0, 300), n_heads=3, n_kv_heads=1, head_dim=8, rotary_dim=8, n_layers=2, kv_bits=kv_bits
    )
    net = make(replace(net, **more))
    tokens = random_tokens(net, 700)
    whole = all_logits(build(net), tokens)
    assert difference(whole, reference(net, tokens)) < ({16: 2e-4, 8: 5e-3}.get(kv_bits, 5e-2))
    # One token at a time near segment borders, whole passes elsewhere.
    cut = all_logits(build(net), tokens, [250, *[1] * 12, 200, 37, *[1] * 14])
    assert np.array_equal(whole, cut)


@pytest.mark.parametrize(("bits", "kv_bits"), [(0, 8), (4, 16), (4, 4), (0, 2)])
@pytest.mark.parametrize(
    "name", ["nine_heads", "head_80_partial", "windows", "bitnet", "biases", "head_128", *FAMILIES]
)
def test_chunking_does_not_change_a_bit(name, bits, kv_bits):
    net = make(replace(NETS[name], bits=bits, activation_bits=16 if bits else 8, kv_bits=kv_bits))
    decoder, tokens = build(net), random_tokens(net, 150)
    whole = all_logits(decoder, tokens)
    for chunks in ([1], [2], [3, 1, 40, 64], [149, 1], [17]):
        assert np.array_equal(whole, all_logits(decoder, tokens, chunks)), chunks


@pytest.mark.parametrize("kv_bits", [16, 8, 4, 2])
@pytest.mark.parametrize("name", ["nine_heads", *FAMILIES])
def test_companions_do_not_change_a_bit(name, kv_bits):
    net = make(replace(NETS[name], bits=4, kv_bits=kv_bits))
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
    net = make(replace(NETS["one_kv_head"], bits=4, kv_bits=8))
    decoder, tokens = build(net), random_tokens(net, 1100)
    cache = _native.KvCache(decoder, 1200)
    last = decoder.logits(tokens, [cache], [len(tokens)])
    whole = all_logits(decoder, tokens, [1100], 1200)
    assert np.array_equal(last[0], whole[-1])
    assert np.array_equal(whole, all_logits(decoder, tokens, [333, 1], 1200))


def test_instruction_sets_and_threads_give_the_same_bits():
    script = Path(__file__).with_name("decoder_net.py")
    seen = {}
    for isa, threads in [(isa, 1) for isa in _native.supported_isas()] + [("", 2), ("", 3), ("scalar", 2)]:
        environment = os.environ | {"LOWBIT_ISA": isa, "LOWBIT_THREADS": str(threads)}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        seen[isa, threads] = run.stdout.strip()
    assert len(set(seen.values())) == 1, seen


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_truncate_and_continue(kv_bits):
    net = make(replace(NETS["windows"], bits=4, kv_bits=kv_bits))
    decoder, tokens = build(net), random_tokens(net, 100)
    whole = all_logits(decoder, tokens)
    cache = _native.KvCache(decoder, 128)
    decoder.logits(random_tokens(net, 120, seed=9), [cache], [120])
    cache.truncate(0)
    decoder.logits(tokens[:60], [cache], [60])
    decoder.logits(random_tokens(net, 20, seed=8), [cache], [20])
    cache.truncate(60)
    assert np.array_equal(whole[60:], decoder.logits(tokens[60:], [cache], [40], all=True))


@pytest.mark.parametrize("name", ["plain", "sandwich"])
@pytest.mark.parametrize("n", [2, 3, 130, 600])
def test_score_is_the_log_softmax_of_the_logits(n, name):
    net = make(replace(NETS[name], bits=4))
    decoder, tokens = build(net), random_tokens(net, n)
    logits = all_logits(decoder, tokens).astype(np.float64)
    peak = logits.max(1, keepdims=True)
    logprobs = logits - peak - np.log(np.exp(logits - peak).sum(1, keepdims=True))
    cache = _native.KvCache(decoder, 700)
    got = decoder.score(tokens, cache)
    assert cache.length == n
    np.testing.assert_allclose(got, logprobs[np.arange(n - 1), tokens[1:]], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["plain", "sandwich"])
def test_sample_agrees_with_logits(name):
    net = make(replace(NETS[name], bits=4))
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


def test_logits_of_a_large_vocabulary_are_capped():
    net = make(Net(vocab_size=9001, logit_softcap=3.0))
    decoder, tokens = build(net), random_tokens(net, 70)
    want = reference(net, tokens)
    assert difference(all_logits(decoder, tokens), want) < 2e-4
    assert np.abs(want).max() <= 3 < np.abs(reference(replace(net, logit_softcap=0.0), tokens)).max()
    sampler, cache = _native.Sampler(), _native.KvCache(decoder, 80)
    ids, _ = decoder.sample(tokens, [cache], [70], [sampler])
    assert ids[0] == all_logits(decoder, tokens)[-1].argmax()


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


def test_descriptions_that_contradict_themselves_are_refused():
    plain, learned = make(NETS["plain"]), make(NETS["layer_norm"])
    for net, change, words in [
        (plain, {"attention_softcap": -1.0}, "attention_softcap"),
        (plain, {"logit_softcap": float("inf")}, "logit_softcap"),
        (plain, {"embedding_scale": float("nan")}, "embedding_scale"),
        (plain, {"norm_place": "post", "parallel": True}, "norm_place=pre"),
        (plain, {"gated": False, "activation": "swiglu_clamped"}, "gated"),
        (plain, {"norm": "batch"}, "'batch' is not one of rms, layer"),
        (plain, {"norm_place": "middle"}, "pre, post, sandwich"),
        (plain, {"positions": "alibi"}, "rope, learned"),
        (plain, {"activation": "tanh"}, "swiglu_clamped"),
        (plain, {"sinks": True}, r"layers\.0\.sinks"),
        (plain, {"norm_place": "sandwich"}, r"layers\.0\.attn_out_norm"),
        (plain, {"norm_place": "post"}, "ignored; set norm_place"),
        (plain, {"gated": False}, "ignored; set gated"),
        (plain, {"positions": "learned"}, "'positions'"),
        (learned, {"positions": "rope"}, "ignored; set positions"),
        (learned, {"norm": "rms"}, "ignored; set norm=layer"),
        (learned, {"position_offset": 1200}, "position_offset=1200"),
        (make(NETS["sinks"]), {"sinks": False}, "ignored; set sinks"),
        (make(NETS["qk_norm"]), {"qk_norm_whole": True}, r"q_norm' has 32 values, .* 128"),
        (make(NETS["sandwich"]), {"local_layers": (True,)}, "set_local_rope: layer_mask has 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            build(replace(net, **change))


def test_texts_longer_than_the_table_of_positions_are_refused():
    net = make(replace(NETS["layer_norm"], position_offset=1198))
    decoder = build(net)
    cache = _native.KvCache(decoder, 8)
    decoder.logits([1, 2], [cache], [2])
    with pytest.raises(ValueError, match="3 positions, and the network has 2"):
        decoder.logits([1], [cache], [1])
    assert cache.length == 2


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


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_keys_and_values_that_are_not_finite_spoil_nobody_else(kv_bits):
    net = make(replace(NETS["plain"], kv_bits=kv_bits))
    embed = net.weights["embed"].copy()
    embed[5] = np.inf
    decoder = build(replace(net, weights=net.weights | {"embed": embed}))
    tokens = random_tokens(net, 40)
    tokens[tokens == 5] = 6
    want = all_logits(decoder, tokens)
    assert np.isfinite(want).all()
    cache = _native.KvCache(decoder, 64)
    decoder.logits(tokens[:20], [cache], [20])
    with pytest.raises(RuntimeError, match="not finite"):
        decoder.score(np.full(20, 5, np.int32), cache)
    assert cache.length == 20
    assert np.array_equal(want[20:], decoder.logits(tokens[20:], [cache], [20], all=True))
