"""Divergence, agreement and perplexity against a plain computation, and what cannot be compared."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lowbit.engine import LanguageModel, load
from lowbit.errors import RequestError, UnsupportedError
from lowbit.measure import compare
from lowbit.quantize import quantize_array

MODULE = sys.modules["lowbit.measure.compare"]


class Cache:
    def __init__(self, decoder, capacity):
        self.length = 0

    def truncate(self, n):
        self.length = n


class Decoder:
    """Logits of a position: a fixed row, the same for all."""

    def __init__(self, probabilities):
        self.row = np.log(np.asarray(probabilities, np.float32)) + np.float32(5)  # not normalized

    def logits(self, tokens, caches, counts, all):
        assert all and tokens.dtype == np.int32 and counts == [len(tokens)]
        caches[0].length += len(tokens)
        return np.tile(self.row, (len(tokens), 1))


def model_of(probabilities, context=8):
    config = SimpleNamespace(vocab_size=len(probabilities), eos_ids=())
    return LanguageModel(
        SimpleNamespace(
            config=config,
            tokenizer=None,
            decoder=Decoder(probabilities),
            context=context,
            bits_per_weight=4.0,
            nbytes=1,
        )
    )


@pytest.fixture
def fake_cache(monkeypatch):
    monkeypatch.setattr(MODULE, "new_cache", Cache)


P, Q = (0.5, 0.25, 0.25), (0.25, 0.5, 0.25)


def test_known_divergence(fake_cache):
    found = compare(model_of(P), [model_of(P), model_of(Q)], [0, 1, 2, 0] * 5, context=4)
    same, other = found.models
    assert same.kl_nats_per_token == 0 and same.top1_agreement == 1
    assert other.kl_nats_per_token == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert other.kl_99 == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert other.top1_agreement == 0
    assert (found.tokens, found.windows, found.context) == (20, 5, 4)
    # Scored are tokens 1, 2, 0 of each window.
    assert found.reference_perplexity == pytest.approx((0.25 * 0.25 * 0.5) ** (-1 / 3), rel=1e-6)
    assert other.perplexity == pytest.approx((0.5 * 0.25 * 0.25) ** (-1 / 3), rel=1e-6)
    assert math.isnan(other.kl_standard_error)  # 20 positions are less than two blocks


def perturbed(tiny_model, folder, bits):
    """The tiny model with its first layer's matrices in `bits` bits, as a transformers directory."""
    from shutil import copytree

    from safetensors.numpy import load_file, save_file

    copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if "layers.0" in name and values.ndim == 2:
            tensors[name] = quantize_array(values, f"int{bits}-g32").dequantize()
    save_file(tensors, folder / "model.safetensors")
    return folder


def plain(reference, model, windows):
    """The same figures, straight from all logits in float64."""
    kls, agreed, nll = [], [], []
    for window in windows:
        log_ps = []
        for one in (reference, model):
            logits = one.decoder.logits(window, [one.model.cache()], [len(window)], all=True)
            logits = logits.astype(np.float64)
            log_ps.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        p, q = log_ps
        kls += list((np.exp(p) * (p - q)).sum(axis=1))
        agreed += list(p.argmax(1) == q.argmax(1))
        nll += list(-q[np.arange(len(window) - 1), window[1:]])
    return np.array(kls), np.mean(agreed), math.exp(np.mean(nll))


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 12 * 260 * 7])
def test_against_all_logits(tiny_model, tmp_path, monkeypatch, chunk_bytes):
    """Whole windows at once and 7 positions at a time: the same figures to the last bit of the sums."""
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(MODULE, "ROWS_BYTES", 5 * 8 * 260)
    reference = load(tiny_model, activations="int16")
    model = load(perturbed(tiny_model, tmp_path / "m", 3), activations="int16")
    ids = np.random.default_rng(1).integers(0, 256, 200).astype(np.int32)
    seen = []
    found = compare(reference, [model], ids.tolist(), context=64, progress=lambda *step: seen.append(step))
    kls, agreed, perplexity = plain(reference, model, ids[:192].reshape(3, 64))
    one = found.models[0]
    assert 1e-4 < one.kl_nats_per_token < 5
    assert one.kl_nats_per_token == pytest.approx(kls.mean(), rel=1e-9)
    assert one.kl_99 == pytest.approx(np.quantile(kls, 0.99), rel=1e-9)
    blocks = kls.reshape(3, 64).mean(axis=1)
    assert one.kl_standard_error == pytest.approx(blocks.std(ddof=1) / 3**0.5, rel=1e-6)
    assert one.top1_agreement == agreed < 1
    assert one.perplexity == pytest.approx(perplexity, rel=1e-9)
    assert [step[:2] for step in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1][2] == one.kl_nats_per_token


def test_more_bits_lose_less(tiny_model, tmp_path):
    models = [load(perturbed(tiny_model, tmp_path / str(bits), bits)) for bits in (2, 3, 5)]
    found = compare(load(tiny_model), models, "The sea is wide and the night is long. " * 5, context=32)
    losses = [one.kl_nats_per_token for one in found.models]
    assert losses[0] > 2 * losses[1] > 4 * losses[2] > 0


def test_default_context_is_the_smallest(fake_cache):
    found = compare(model_of(P, 8), [model_of(Q, 6)], [0] * 30, max_tokens=19)
    assert found.context == 6 and found.windows == 3


@pytest.mark.parametrize(
    ("other", "arguments", "words"),
    [
        ((0.5, 0.5), {}, "model 1 has a vocabulary of 2 tokens and the reference one of 3"),
        (Q, {"context": 9}, "context=9 is outside 2 to 8"),
        (Q, {"max_tokens": 1}, "max_tokens=1"),
        (Q, {"max_tokens": 5}, "5 tokens, less than one window of 8"),
    ],
)
def test_refusals(fake_cache, other, arguments, words):
    with pytest.raises(RequestError, match=words):
        compare(model_of(P), [model_of(other)], [0] * 30, **arguments)


def test_other_tokenizer(tiny_model):
    model, other = load(tiny_model), load(tiny_model)
    real = other.tokenizer
    other.tokenizer = SimpleNamespace(encode=lambda text, add_special: real.encode(text)[::-1])
    with pytest.raises(RequestError, match="cut the text differently"):
        compare(model, [other], "abcdef" * 30, context=16)


def test_not_finite(fake_cache):
    broken = model_of(Q)
    broken.decoder.row[1] = np.nan
    with pytest.raises(UnsupportedError, match="not finite"):
        compare(model_of(P), [broken], [0] * 8)
