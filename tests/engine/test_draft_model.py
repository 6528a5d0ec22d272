"""Guesses of a second model: they are its own greedy text, whatever became of the earlier ones."""

from types import SimpleNamespace

import pytest

from lowbit.engine import SamplingParameters, draft_model, load
from lowbit.engine.draft_model import DraftModelSpeculator
from lowbit.errors import UnsupportedError

CHEAP = lambda guesses: 1.0 + 0.01 * guesses  # noqa: E731
DEAR = lambda guesses: 1.0 + guesses  # noqa: E731


@pytest.fixture(scope="module")
def model(tiny_model):
    return load(tiny_model)


def drafter(model, seconds=CHEAP, **options):
    s = DraftModelSpeculator(model, model, **options)
    s.begin(1, seconds)
    return s


def greedy(model, tokens, n):
    return model.generate_ids(tokens, SamplingParameters(max_tokens=n, ignore_eos=True))


def test_guesses_are_the_greedy_text(model):
    tokens = list(b"The quick brown fox")
    s = drafter(model)
    guesses = s.propose("a", tokens, 8)
    assert guesses and guesses == greedy(model, tokens, 8)[: len(guesses)]
    s.begin(1, CHEAP)
    tokens += greedy(model, tokens, len(guesses) + 1)  # all came true, and one more
    again = s.propose("a", tokens, 8)
    assert again and again == greedy(model, tokens, 8)[: len(again)]


def test_after_a_wrong_guess_the_cache_holds_the_true_tokens(model):
    tokens = list(b"The quick brown fox")
    s = drafter(model)
    guesses = s.propose("a", tokens, 8)
    for kept in (0, 1, 2):
        other = [*tokens, *guesses[:kept], 7]
        s.begin(1, CHEAP)
        again = s.propose("a", other, 8)
        assert again == greedy(model, other, 8)[: len(again)]
        assert s._drafts["a"].fed[: len(other)] == other
        assert s._drafts["a"].cache.length == len(s._drafts["a"].fed)
        tokens, guesses = other, again


def test_a_long_prompt_is_read_in_pieces(model, monkeypatch):
    monkeypatch.setattr(draft_model, "CHUNK", 8)
    tokens = list(b"The quick brown fox jumps")
    s = drafter(model)
    assert [s.propose("a", tokens, 4) for _ in range(2)] == [[], []]
    guesses = s.propose("a", tokens, 4)
    assert guesses == greedy(model, tokens, 4)[: len(guesses)] != []


def test_it_rests_where_it_does_not_pay(model):
    s = drafter(model)
    s._seconds = 10.0  # a guess costs as much as ten steps
    tokens = list(b"The quick brown fox")
    for _ in range(draft_model.TRIALS + 1):
        s.begin(1, DEAR)
        s.propose("a", tokens, 8)
        tokens += greedy(model, tokens, 1)
    assert s._drafts["a"].cache is None
    fed = []
    s._decoder = SimpleNamespace(sample=lambda *a: fed.append(a), logits=lambda *a: fed.append(a))
    for request in ("a", "b", "c"):  # others are not even tried now
        s.begin(1, DEAR)
        assert s.propose(request, tokens, 8) == []
    assert not fed


def test_it_comes_back_when_it_pays(model):
    s = drafter(model)
    s._seconds = 10.0
    tokens = list(b"The quick brown fox")
    for _ in range(draft_model.TRIALS + 1):
        s.begin(1, DEAR)
        s.propose("a", tokens, 8)
    s._seconds = 0.01
    s.begin(1, CHEAP)
    guesses = s.propose("a", tokens, 8)
    assert guesses and guesses == greedy(model, tokens, 8)[: len(guesses)]


def test_the_context_of_the_draft_is_the_limit(model):
    s = drafter(model)
    tokens = [65] * (model.context - 2)
    for _ in range(3):
        guesses = s.propose("a", tokens, 8)
    assert len(guesses) <= 2
    assert s.propose("b", [65] * model.context, 8) == []
    assert s.propose("b", [65] * (model.context + 5), 8) == []


def test_a_draft_that_fails_is_left_alone(model):
    """Its logits may not be finite where those of the model are."""
    s, tokens, calls = drafter(model), list(b"abc"), []

    def fails(*arguments):
        calls.append(1)
        raise RuntimeError("logits are not finite")

    s._decoder = SimpleNamespace(logits=model.decoder.logits, sample=fails)
    s._catch_up = lambda draft, tokens: True
    for _ in range(3):
        s.begin(1, CHEAP)
        assert s.propose("a", tokens, 4) == []
    assert len(calls) == 1 and s._drafts["a"].cache is None
    s.propose("b", tokens, 4)
    assert len(calls) == 2


def test_sequences_are_forgotten(model):
    s = drafter(model)
    s.propose("a", list(b"abc"), 4)
    s.finish("a")
    s.finish("never seen")
    assert not s._drafts


def test_other_vocabulary(model):
    other = SimpleNamespace(config=SimpleNamespace(vocab_size=7))
    with pytest.raises(UnsupportedError, match=r"260 tokens and the model 7; take a draft"):
        DraftModelSpeculator(model, other)
