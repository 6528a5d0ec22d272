"""Guesses: what is proposed, how its length follows what came true and what a step costs."""

import random

import pytest

from lowbit.engine.speculation import Chances, NgramSpeculator, StepGain, _advance, _find, _History

FREE = lambda guesses: 1.0  # noqa: E731  (a step whose guesses cost nothing)


def speculator(seconds=FREE, runs=1, **options):
    s = NgramSpeculator(**options)
    s.begin(runs, seconds)
    return s


def test_what_followed_is_guessed_again():
    text = [*range(10, 30), 99, 12, 13]
    assert speculator().propose("a", text, 5) == [14, 15, 16, 17, 18]
    assert speculator().propose("a", text, 2) == [14, 15]
    assert speculator().propose("a", text, 0) == []
    assert len(speculator(max_draft=7).propose("a", text, 100)) == 7


def test_nothing_known_nothing_guessed():
    assert speculator().propose("a", [], 5) == []
    assert speculator().propose("a", [1], 5) == []
    assert speculator().propose("a", [1, 2, 3, 4], 5) == []
    # The only pair occurs once; a single equal token is no match.
    assert speculator().propose("a", [1, 2, 3, 1], 5) == []


def test_the_longest_match_wins_and_the_newest_of_equals():
    #        5 1 2 -> 7     6 1 2 -> 8     9 1 2 -> 4
    text = [5, 1, 2, 7, 0, 6, 1, 2, 8, 0, 9, 1, 2, 4, 0]
    assert speculator().propose("a", [*text, 6, 1, 2], 1) == [8]
    assert speculator().propose("a", [*text, 5, 1, 2], 1) == [7]
    assert speculator().propose("a", [*text, 3, 1, 2], 1) == [4]


def test_a_period_goes_on_beyond_the_end():
    assert speculator().propose("a", [1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]
    assert speculator().propose("b", [4, 4, 4], 3) == [4, 4, 4]


def test_a_replaced_word_does_not_end_the_copy():
    source = list(range(100, 140))
    s = speculator()
    written = source[:20]
    s.propose("a", [*source, 7, *written], 8)
    # Token 120 was replaced by 55; the guess goes on with 121, although no pair has been seen yet.
    assert s.propose("a", [*source, 7, *written, 55], 3)[:1] == [121]


def quadratic(tokens):
    """Longest earlier match of the end, by looking everywhere; as many candidates as there are."""
    best, end = (1, -1), len(tokens)
    for place in range(2, end):
        length = 0
        while length < min(24, place) and tokens[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        if length >= 2:
            best = max(best, (length, place))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_against_looking_everywhere(seed, monkeypatch):
    monkeypatch.setattr("lowbit.engine.speculation.MAX_CANDIDATES", 10**6)
    rng = random.Random(seed)
    tokens = [rng.randrange(4) for _ in range(120)]
    for _ in range(6):
        begin = rng.randrange(100)
        tokens += [*tokens[begin : begin + rng.randrange(2, 20)], rng.randrange(4)]
    for end in range(2, len(tokens)):
        history = _History(Chances([0.5] * 9).own())
        _advance(history, tokens[:end])
        _find(history, tokens[:end])
        length, place = quadratic(tokens[:end])
        assert (max(history.length, 1), history.at) == (length, place)


def test_step_by_step_as_all_at_once():
    rng = random.Random(3)
    tokens = [rng.randrange(3) for _ in range(200)]
    grown, whole = _History(Chances([0.5] * 9).own()), _History(Chances([0.5] * 9).own())
    for end in range(1, len(tokens) + 1):
        _advance(grown, tokens[:end])
    _advance(whole, tokens)
    assert grown.follows == whole.follows and grown.before == whole.before and grown.seen == len(tokens)


def test_work_is_linear_in_the_tokens(monkeypatch):
    """Reads of the token list, counted: a text of one token is the worst case."""

    class Counting(list):
        reads = 0

        def __getitem__(self, i):
            Counting.reads += 1
            return list.__getitem__(self, i)

    def reads(n):
        Counting.reads = 0
        s, tokens = speculator(max_draft=4), Counting([1] * (n // 2))
        for _ in range(n // 2):
            s.propose("a", tokens, 4)
            tokens.append(1)
        return Counting.reads

    assert reads(4000) < 2.2 * reads(2000)


def echo(s, follows, seconds):
    """Say a text that copies a source, each token with probability `follows`. Returns tokens per second."""
    rng = random.Random(5)
    source = list(range(1, 400))
    tokens, spent, at = [*source, 0], 0.0, 0
    while len(tokens) < 4 * len(source):
        s.begin(1, seconds)
        guesses = s.propose("a", tokens, 16)
        spent += seconds(len(guesses))
        for guess in [*guesses, None]:
            token = source[at % len(source)] if rng.random() < follows else rng.randrange(10_000, 20_000)
            at += 1
            tokens.append(token)
            if token != guess:
                break
    return (len(tokens) - len(source)) / spent


class FixedLength(NgramSpeculator):
    """The same guesses, always so many."""

    def propose(self, request_id, tokens, limit):
        self.begin(1, FREE)
        return super().propose(request_id, tokens, limit)


@pytest.mark.parametrize("slope", [0.02, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("follows", [0.0, 0.3, 0.6, 0.8, 0.95, 1.0])
def test_as_fast_as_the_best_fixed_length(slope, follows):
    seconds = lambda guesses: 1.0 + slope * guesses  # noqa: E731
    best = max(echo(FixedLength(max_draft=k), follows, seconds) for k in (0, 1, 2, 4, 8, 16))
    assert echo(NgramSpeculator(), follows, seconds) > 0.93 * best


def test_no_guess_where_it_does_not_pay():
    text = [*range(10, 30), 99, 12, 13]
    # A guess that costs as much as a whole step can at best break even.
    assert speculator(lambda guesses: 1.0 + guesses).propose("a", text, 8) == []
    # Many runs: the average token is cheap already, and the guess only pays if it is cheaper.
    busy = lambda guesses: 1.0 + 0.2 * (64 + guesses)  # noqa: E731
    alone = lambda guesses: 1.0 + 0.2 * (1 + guesses)  # noqa: E731
    assert speculator(busy, runs=64).propose("a", text, 8) == []
    assert speculator(alone, runs=1).propose("a", text, 8) != []


def test_it_learns_without_guessing():
    """Where guesses do not pay, the tokens still tell how good they would have been."""
    s, source = NgramSpeculator(), list(range(1, 200))
    tokens = [*source, 0, *source[:3]]
    for token in source[3:60]:
        s.begin(1, lambda guesses: 1.0 + guesses)
        assert s.propose("a", tokens, 8) == []
        tokens.append(token)
    s.begin(1, lambda guesses: 1.0 + 0.8 * guesses)
    assert len(s.propose("a", tokens, 8)) == 8
    fresh = NgramSpeculator()
    fresh.begin(1, lambda guesses: 1.0 + 0.8 * guesses)
    assert len(fresh.propose("a", tokens, 8)) < 8


def test_best_length_is_the_best():
    rng = random.Random(1)
    for _ in range(200):
        times = [1.0]
        for _ in range(8):
            times.append(times[-1] + rng.random() * 0.6)
        chances = [rng.random() for _ in range(8)]
        draft = rng.random() * 0.3
        gain, other = StepGain(), StepGain()
        runs = rng.randrange(1, 5)
        gain.begin(runs, times.__getitem__)
        k = gain.best_length(chances, draft)
        rates = [gain.rate(chances[:n], draft) for n in range(9)]
        assert rates[k] == max(rates)
        # Guesses of another sequence raise what is expected and cost time alike.
        other.begin(runs, lambda n, t=times: t[min(n, 8)])
        other.take([0.5, 0.5])
        assert other.rate([]) == pytest.approx((runs + 0.75) / times[2])


def test_sequences_are_kept_apart_and_forgotten():
    s = speculator()
    s.propose("a", [1, 2, 3, 4, 1, 2], 2)
    assert s.propose("b", [1, 2], 2) == []
    s.feedback("a", 2, 1)
    s.finish("a")
    s.finish("never seen")
    assert s.propose("a", [1, 2], 2) == []
