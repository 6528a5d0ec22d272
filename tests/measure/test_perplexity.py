"""The protocol of the windows, on a decoder of known probabilities and on a whole small model."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lowbit.engine import LanguageModel, load
from lowbit.errors import RequestError
from lowbit.measure.perplexity import perplexity


class Cache:
    def __init__(self, decoder, capacity):
        self.capacity, self.length = capacity, 0

    def truncate(self, n):
        self.length = n


class Decoder:
    """log p = -token; records the windows."""

    def __init__(self):
        self.windows = []

    def score(self, tokens, cache):
        assert tokens.dtype == np.int32 and cache.length == 0 and cache.capacity >= len(tokens)
        cache.length = len(tokens)
        self.windows.append(tokens.tolist())
        return -tokens[1:].astype(np.float32)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(sys.modules["lowbit.measure.perplexity"], "new_cache", Cache)
    config = SimpleNamespace(vocab_size=100, eos_ids=())
    parts = SimpleNamespace(
        config=config, tokenizer=None, decoder=Decoder(), context=8, bits_per_weight=4.0, nbytes=1
    )
    return LanguageModel(parts)


def test_windows_do_not_overlap_and_the_tail_is_dropped(model):
    result = perplexity(model, [1, 2, 3, 1, 2, 3, 1, 2, 3, 1], context=4)
    assert model.decoder.windows == [[1, 2, 3, 1], [2, 3, 1, 2]]
    assert (result.tokens, result.windows, result.context) == (6, 2, 4)
    assert result.perplexity == pytest.approx(math.exp((2 + 3 + 1 + 3 + 1 + 2) / 6))


def test_max_tokens_and_default_context(model):
    seen = []
    result = perplexity(model, [1] * 30, max_tokens=17, progress=lambda *step: seen.append(step))
    assert result.context == 8 and result.windows == 2
    assert [step[:2] for step in seen] == [(1, 2), (2, 2)] and seen[-1][2] == result.perplexity


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"context": 9}, "context=9 is outside 2 to 8"),
        ({"context": 1}, "context=1"),
        ({"max_tokens": 1}, "max_tokens=1"),
        ({"max_tokens": 5}, "5 tokens, less than one window of 8"),
    ],
)
def test_refusals(model, arguments, words):
    with pytest.raises(RequestError, match=words):
        perplexity(model, [1] * 30, **arguments)


def test_unlikely_text(model):
    assert perplexity(model, [99] * 8).perplexity == pytest.approx(math.exp(99))


def test_agrees_with_the_logits_of_the_same_model(tiny_model):
    model = load(tiny_model, activations="int16")
    ids = np.arange(64, dtype=np.int32) * 7 % 250
    result = perplexity(model, ids.tolist(), context=32)
    total = 0.0
    for window in (ids[:32], ids[32:]):
        logits = model.decoder.logits(window, [model.model.cache()], [32], all=True).astype(np.float64)
        log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        log_p -= logits.max(1, keepdims=True)
        total -= log_p[np.arange(31), window[1:]].sum()
    assert result.perplexity == pytest.approx(math.exp(total / 62), rel=1e-5)
