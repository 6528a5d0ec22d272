"""Generation on a whole small model: what must not depend on how it is computed."""

import numpy as np
import pytest

from lowbit import _native
from lowbit.engine import Conversation, SamplingParameters, load, sequence


@pytest.fixture(scope="module")
def model(tiny_model):
    return load(tiny_model)


HOT = {"temperature": 1.0, "seed": 5, "max_tokens": 40}


def test_greedy_takes_the_largest_logit(model):
    ids = list(b"Greedy")
    expected, cache = [], model.model.cache()
    tokens = np.array(ids, np.int32)
    for _ in range(8):
        logits = model.decoder.logits(tokens, [cache], [len(tokens)])[0]
        expected.append(int(logits.argmax()))
        tokens = np.array(expected[-1:], np.int32)
    got = model.generate_ids(ids, SamplingParameters(max_tokens=8, ignore_eos=True))
    assert got == expected


def test_seeds(model):
    a, b = model.generate("abc", **HOT), model.generate("abc", **HOT)
    assert a.token_ids == b.token_ids and a.text == b.text
    assert model.generate("abc", **{**HOT, "seed": 6}).token_ids != a.token_ids


def test_threads_and_chunks_do_not_matter(model, monkeypatch):
    prompt = "The quick brown fox jumps over the lazy dog."
    expected = model.generate(prompt, **HOT).token_ids
    before = _native.threads()
    try:
        _native.set_threads(1)
        assert model.generate(prompt, **HOT).token_ids == expected
    finally:
        _native.set_threads(before)
    for chunk in (1, 7, 32):
        monkeypatch.setattr(sequence, "PREFILL_CHUNK", chunk)
        assert model.generate(prompt, **HOT).token_ids == expected


def test_streamed_pieces_are_the_text(model):
    stream = model.stream("abc", **HOT)
    pieces = list(stream)
    g = stream.generation
    assert "".join(pieces) == g.text == model.tokenizer.decode(g.token_ids)


def test_a_conversation_says_what_a_fresh_prompt_would(model):
    say = SamplingParameters(**{**HOT, "max_tokens": 10})
    talk = Conversation(model)
    "".join(talk.send("one", say))
    "".join(talk.send("two", say))
    assert talk.last.reused_tokens > 0
    assert talk.last.text == model.chat(talk.messages[:-1], **{**HOT, "max_tokens": 10}).text


def test_logprobs_are_those_of_the_model(model):
    g = model.generate("abc", max_tokens=5, logprobs=3)
    logits = model.decoder.logits(np.array(list(b"abc"), np.int32), [model.model.cache()], [3])[0]
    log_p = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    first = g.logprobs[0]
    assert first.token_id == log_p.argmax()
    assert first.logprob == pytest.approx(log_p.max(), abs=1e-4)
    order = np.argsort(-log_p)[:3]
    assert [token for token, _ in first.top] == order.tolist()


def test_penalties_reach_the_sampler(model):
    plain = model.generate("abc", max_tokens=30)
    other = model.generate("abc", max_tokens=30, presence_penalty=100.0)
    assert len(set(other.token_ids)) == len(other.token_ids)
    assert len(set(plain.token_ids)) <= len(set(other.token_ids))


def test_a_real_story(shared_data):
    model = load(shared_data("weights/stories15M"))
    g = model.generate("Once upon a time", max_tokens=24)
    assert g.text.startswith((", there was", " there was")) and g.generated_tokens == 24
    assert model.generate("Once upon a time", max_tokens=24, stop="there").text in (", ", " ")
