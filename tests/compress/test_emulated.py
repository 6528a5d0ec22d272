"""Rounded activations and caches in the executor: exact where nothing is lost, close where little is."""

import numpy as np
import pytest

pytest.importorskip("torch")

from lowbit.compress.emulated import emulated_logits
from lowbit.compress.views import VIEWS
from lowbit.errors import RequestError
from lowbit.model.reference import reference_logits
from lowbit.quantize.activations import ACTIVATIONS
from lowbit.quantize.kv import KV_METHODS

from . import networks

TOKENS = np.random.default_rng(0).integers(0, 270, (2, 40))
CALIBRATION = np.random.default_rng(1).integers(0, 270, (4, 32))


def divergence(exact, other):
    """KL in nats per token."""
    p, q = (x - x.max(-1, keepdims=True) for x in (exact.astype(np.float64), other.astype(np.float64)))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("case", networks.CASES)
def test_nothing_rounded_is_the_model(case):
    """Without methods, and with a window that holds the whole sequence exactly."""
    checkpoint = networks.Memory(case)
    expected = [reference_logits(checkpoint.config, checkpoint.weights, row) for row in TOKENS]
    for kv in (None, "kivi:window=64"):
        found = emulated_logits(checkpoint, TOKENS, kv=kv)
        assert found.activation_bits == 32 and found.kv_bits == (32 if kv is None else 16)
        np.testing.assert_allclose(found.logits, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("method", ACTIVATIONS)
def test_experts_have_ranges_of_their_own(method):
    """8 bits lose little; an expert that calibration never saw is named, not guessed."""
    checkpoint = networks.Memory("mixtral")
    before = emulated_logits(checkpoint, TOKENS).logits
    calibration = CALIBRATION if ACTIVATIONS[method].calibrated else None
    found = emulated_logits(checkpoint, TOKENS, method, calibration=calibration)
    assert found.activation_bits < 17 and not np.array_equal(found.logits, before)
    same = np.abs(found.logits - before).max(-1) < 0.2 * np.abs(before).max()
    if found.activation_bits >= 8:
        assert same.mean() > 0.6  # the others came to another expert
    if calibration is not None:
        with pytest.raises(RequestError, match=r"no calibration token came to mlp\.experts\.\d"):
            emulated_logits(checkpoint, TOKENS, method, calibration=calibration[:1, :1])


@pytest.fixture(scope="module")
def exact():
    return emulated_logits(networks.Memory("qwen3-windows"), TOKENS).logits


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, exact):
    found = emulated_logits(
        networks.Memory("qwen3-windows"), TOKENS, activations=name, calibration=CALIBRATION
    )
    assert 4 <= found.activation_bits < 9 and found.kv_bits == 32
    kl = divergence(exact, found.logits)
    assert 0 < kl < (0.002 if found.activation_bits > 8 and name != "e4m3" else 1)


@pytest.mark.parametrize("name", KV_METHODS)
def test_caches(name, exact):
    few, many = (
        emulated_logits(networks.Memory("qwen3-windows"), TOKENS, kv=f"{name}:bits={bits}{rest}")
        for bits, rest in (
            (2, ",window=32" if name == "kivi" else ""),
            (8, ",window=32" if name == "kivi" else ""),
        )
    )
    assert few.kv_bits < many.kv_bits and few.activation_bits == 32
    assert 0 < divergence(exact, many.logits) < 0.002
    assert divergence(exact, few.logits) > 10 * divergence(exact, many.logits)


def test_bits_fall_where_they_are_counted():
    checkpoint = networks.Memory("llama")  # inputs of 96, 96, 96 and 160 channels
    found = emulated_logits(checkpoint, TOKENS, activations="token:bits=4", kv="token:bits=4")
    numbers = {96: 6, 160: 1}
    expected = sum((4 + 16 / n) * n * count for n, count in numbers.items()) / sum(
        n * c for n, c in numbers.items()
    )
    assert found.activation_bits == pytest.approx(expected)
    assert found.kv_bits == 4 + 32 / 16


def test_a_view_can_be_run(exact):
    view = VIEWS["hadamard"].apply(networks.Memory("qwen3-windows"))
    found = emulated_logits(view, TOKENS, activations="token:bits=8")
    assert 0 < divergence(exact, found.logits) < 0.002


@pytest.mark.parametrize("settings", [{"activations": "static"}, {"kv": "none"}, {"kv": "kivi:size=3"}])
def test_bad_requests(settings):
    with pytest.raises(RequestError):
        emulated_logits(networks.Memory("llama"), TOKENS, **settings)
