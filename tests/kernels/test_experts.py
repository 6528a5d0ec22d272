"""Layers with experts: values, independence of companions, and scores that are hostile to a router."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lowbit import _native
from lowbit.packed import PackedMatrix

from .expert_net import NETS, build, chosen, logits, make, random_tokens, reference
from .test_side_terms import (
    codes_term,
    columns_term,
    entries_term,
    gathered_term,
    low_rank_term,
    rows_term,
)

# Float weights: sums of up to 80 float32 products in another order, through two layers.
TOLERANCE = 2e-5


@pytest.fixture
def threads():
    before = _native.threads()
    yield _native.set_threads
    _native.set_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3, 40])
@pytest.mark.parametrize("name", NETS)
def test_equals_the_definition(name, count):
    net = make(NETS[name])
    tokens = random_tokens(net, count)
    wanted = reference(net, tokens)
    np.testing.assert_allclose(
        logits(build(net), tokens), wanted, atol=TOLERANCE * np.abs(wanted).max(), rtol=0
    )


def test_a_definition_that_is_another_one_differs():
    """Experts in another order, a weight that is forgotten, one expert less: all far beyond the tolerance."""
    net = make(NETS["plain"])
    tokens = random_tokens(net, 8)
    wanted = reference(net, tokens)
    for changed in (
        replace(net, router_renormalize=False),
        replace(net, experts_per_token=1),
        make(NETS["plain"], seed=1),
    ):
        other = logits(build(changed), tokens)
        assert np.abs(other - wanted).max() > 100 * TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize("bits", [0, 2, 4, 8])
@pytest.mark.parametrize("name", ["many", "topk_first", "dense_first", "odd_sizes"])
def test_companions_change_nothing(name, bits, threads):
    """One by one, in chunks, together, beyond a pass, beside others, with any number of threads."""
    net = make(replace(NETS[name], bits=bits, activation_bits=8))
    tokens = random_tokens(net, 600)
    threads(1)
    decoder = build(net)
    whole = logits(decoder, tokens)
    for count in (1, 2, 3):
        threads(count)
        np.testing.assert_array_equal(logits(decoder, tokens), whole)
        np.testing.assert_array_equal(logits(decoder, tokens, [1, 2, 3, 94, 200, 300]), whole)
        some = tokens[:12]
        np.testing.assert_array_equal(logits(decoder, some, [1] * 12), whole[:12])
        caches = [_native.KvCache(decoder, 4) for _ in range(3)]
        rows = decoder.logits(tokens[:12], caches, [4, 4, 4], all=True)
        np.testing.assert_array_equal(rows, whole[:12])


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_give_nearly_what_their_values_do(bits):
    """16-bit activations leave the error of their rounding: 2**-15 of the largest of 64."""
    net = make(replace(NETS["many"], bits=bits))
    rounded = {n: _decoded(n, x, bits) for n, x in net.weights.items()}
    tokens = random_tokens(net, 50)
    ours, wanted = logits(build(net), tokens), reference(replace(net, weights=rounded), tokens)
    np.testing.assert_allclose(ours, wanted, atol=2e-3 * np.abs(wanted).max(), rtol=0)


def _decoded(name, x, bits):
    if x.ndim != 2 or name.endswith(("router", ".q", ".k", ".v", ".o")):
        return x
    top = 2 ** (bits - 1)
    scale = (np.abs(x).max(1) / (top - 1)).astype(np.float32)[:, None]
    return np.clip(np.rint(x / scale), -top, top - 1) * scale


def _routed(net, layer_bias):
    """Every layer's router reads nothing and gives every token these scores."""
    weights = dict(net.weights)
    for i in range(net.n_layers):
        weights[f"layers.{i}.router"] = np.zeros_like(weights[f"layers.{i}.router"])
        weights[f"layers.{i}.router_bias"] = np.asarray(layer_bias, np.float32)
    return replace(net, weights=weights)


@pytest.mark.parametrize("count", [1, 2, 7, 500])
def test_all_tokens_go_to_one_expert(count):
    net = _routed(make(NETS["one_of_many"]), np.eye(33)[20] * 50)
    tokens = random_tokens(net, count)
    wanted = reference(net, tokens)
    np.testing.assert_allclose(
        logits(build(net), tokens), wanted, atol=TOLERANCE * np.abs(wanted).max(), rtol=0
    )


@pytest.mark.parametrize("count", [1, 2, 30])
@pytest.mark.parametrize("scores", [[0, 0, 0, 0, 0], [1, 3, 3, 3, 1], [-0.0, 0.0, 0.0, -0.0, 0.0]])
def test_ties_take_the_lower_index(scores, count):
    net = _routed(make(NETS["plain"]), scores)
    best, share = chosen(net, np.array([scores], np.float64))
    assert list(best[0]) == ([1, 2] if scores[1] == 3 else [0, 1]) and share[0, 0] == 0.5
    tokens = random_tokens(net, count)
    ours, wanted = logits(build(net), tokens), reference(net, tokens)
    np.testing.assert_allclose(ours, wanted, atol=TOLERANCE * np.abs(wanted).max(), rtol=0)
    # What was not chosen is not read: other weights there change no bit.
    other = {
        name: x * 7 if ".experts." in name and int(name.split(".")[3]) not in best else x
        for name, x in net.weights.items()
    }
    np.testing.assert_array_equal(logits(build(replace(net, weights=other)), tokens), ours)


@pytest.mark.parametrize("bias", [np.finfo(np.float32).max, -np.finfo(np.float32).max, 1e30])
def test_extreme_scores(bias):
    """Differences that overflow, or vanish beside their size: finite, and every token has its experts."""
    net = _routed(make(replace(NETS["plain"], router_renormalize=False)), [bias, 0, -bias, 1, 2])
    tokens = random_tokens(net, 20)
    ours, wanted = logits(build(net), tokens), reference(net, tokens)
    np.testing.assert_allclose(ours, wanted, atol=TOLERANCE * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("bits", [0, 4])
def test_a_token_that_is_not_finite_stays_alone(bits):
    """Squares of 1e30 overflow: that row is lost, and nothing else changes by a bit."""
    net = make(replace(NETS["many"], bits=bits))
    tokens = random_tokens(net, 30)
    tokens[tokens == 5] = 6
    whole = logits(build(net), tokens)
    weights = dict(net.weights)
    embedding = weights["embed"] = weights["embed"].copy()
    embedding[5] = 3e38
    decoder = build(replace(net, weights=weights))  # a row of codes has a scale of its own
    mixed = tokens.copy()
    mixed[[3, 17]] = 5
    ours = logits(decoder, mixed)
    keep = np.ones(30, bool)
    keep[[3, 17]] = False
    np.testing.assert_array_equal(ours[keep], whole[keep])
    for at in (3, 17):
        alone = logits(decoder, mixed[at : at + 1])
        np.testing.assert_array_equal(np.isfinite(alone[0]), np.isfinite(ours[at]))


@pytest.mark.parametrize("beside", ["excluded", "entries", "low rank", "rows", "gathered"])
def test_experts_with_terms_beside_codes(beside, threads):
    """Products of such matrices have barriers inside, so experts take their turn one by one."""
    net = make(replace(NETS["odd_sizes"], activation_bits=8))
    rng = np.random.default_rng(4)
    add = {
        "excluded": lambda shape: columns_term(rng, shape, 5, True),
        "entries": lambda shape: entries_term(rng, shape, 40),
        "low rank": lambda shape: low_rank_term(rng, shape, 3),
        "rows": lambda shape: rows_term(rng, 8, shape, 9),
        "gathered": lambda shape: gathered_term(rng, 4, shape),
    }[beside]

    def pack(x):
        shape = (*x.shape, 0)
        codes = () if beside == "gathered" else (codes_term(rng, 4, shape),)
        return PackedMatrix(*x.shape, (*codes, add(shape))).native()

    threads(1)
    decoder = build(net, pack)
    tokens = random_tokens(net, 60)
    whole = logits(decoder, tokens)
    assert np.isfinite(whole).all()
    for count in (1, 3):
        threads(count)
        np.testing.assert_array_equal(logits(decoder, tokens), whole)
        np.testing.assert_array_equal(logits(decoder, tokens, [1, 1, 2, 56]), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.1.experts.3.up"), r"layers\.1\.experts\.3\.up.*not set"),
        (lambda w: w.pop("layers.0.router"), r"layers\.0\.router.*not set"),
        (lambda w: w.update({"layers.0.experts.1.down": np.ones((48, 48), np.float32)}), r"shape \[48, 48\]"),
        (lambda w: w.update({"layers.0.experts.5.up": np.ones((40, 48), np.float32)}), "not a matrix"),
        (lambda w: w.update({"layers.0.up": np.ones((80, 48), np.float32)}), "has experts"),
        (lambda w: w.update({"layers.0.router_bias": np.ones(4, np.float32)}), "4 values"),
        (lambda w: w.update({"layers.0.experts.0.gate_bias": np.full(40, np.inf, np.float32)}), "not finite"),
    ],
)
def test_wrong_weights_are_named(change, message):
    net = make(NETS["plain"])
    weights = dict(net.weights)
    change(weights)
    with pytest.raises(ValueError, match=message):
        build(replace(net, weights=weights))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts_per_token": 0}, "experts_per_token=0"),
        ({"experts_per_token": 6}, "experts_per_token=6"),
        ({"expert_size": 0}, "expert_size=0"),
        ({"sparse_layers": (True,)}, "sparse_layers has 1"),
        ({"n_experts": 0}, "n_experts"),
        ({"router_order": "best"}, "router_order 'best'"),
    ],
)
def test_wrong_descriptions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build(replace(make(NETS["plain"]), **fields))


def test_every_instruction_set_gives_the_same_bits():
    script = str(Path(__file__).with_name("expert_net.py"))
    seen = {}
    for isa, count in [(isa, 1) for isa in _native.supported_isas()] + [("", 2), ("scalar", 3)]:
        environment = os.environ | {"LOWBIT_ISA": isa, "LOWBIT_THREADS": str(count)}
        run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        seen[isa, count] = run.stdout.strip()
    assert len(set(seen.values())) == 1 and all(seen.values()), seen
