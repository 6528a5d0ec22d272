"""Guesses of what a sequence says next, so that one step of the model yields several tokens.

A wrong guess costs time and never changes a token: the step samples at every guessed position and keeps what
plain decoding would have said. So the only question is how many tokens to guess. A step that carries n
guesses takes seconds(n), which the engine measures; guess j comes true only if all before it do. The number
with the most expected tokens per second wins, and often that is none (the idea of SpecDec++,
arXiv:2405.19715, with the probability learned from what came true instead of by a trained head).

Here: prompt lookup (n-grams of the sequence itself). A smaller model that guesses is in draft_model.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

MAX_DRAFT = 24  # guesses per step; beyond, a step that fails is dear and one that succeeds gains little
HOPELESS = 0.01  # no guess is made that less probably is reached and true
OTHERS = 8.0  # guesses of its own that a sequence needs to count as much as all the others
MAX_CANDIDATES = 8  # earlier places compared; the newest first, as in LZ77
MAX_MATCH = 24  # tokens compared backwards; longer matches are as sure as this


class Speculator(Protocol):
    """What the engine asks before each step and tells after it. Never changes a token, only the speed."""

    def begin(self, runs: int, seconds: Callable[[int], float]) -> None:
        """A step of `runs` decoding sequences is planned; seconds(n): its time with n guesses in all."""

    def propose(self, request_id: str, tokens: Sequence[int], limit: int) -> list[int]:
        """At most `limit` guesses for what follows `tokens` (all of the sequence, prompt included)."""

    def feedback(self, request_id: str, proposed: int, accepted: int) -> None:
        """What came of the guesses for this sequence in the step."""

    def finish(self, request_id: str) -> None:
        """The sequence has ended: forget it."""


class StepGain:
    """Expected tokens per second of the step being planned, with more or fewer guesses."""

    def __init__(self) -> None:
        self.begin(1, lambda guesses: 1.0 + 0.1 * guesses)

    def begin(self, runs: int, seconds: Callable[[int], float]) -> None:
        self._expected, self._guesses, self._of = float(max(runs, 1)), 0, seconds
        self._known: list[float] = []

    def _seconds(self, guesses: int) -> float:
        """Memoised: the sequences of a step ask for the same few."""
        known = self._known
        while len(known) <= guesses:
            known.append(self._of(len(known)))
        return known[guesses]

    def rate(self, chances: Sequence[float], draft_seconds: float = 0.0) -> float:
        """Tokens per second with these guesses added.

        chances: probability of each guess, given that those before it came true.
        draft_seconds: per guess, to make it.
        """
        gain = sum(accumulate(chances, operator.mul))
        seconds = self._seconds(self._guesses + len(chances)) + len(chances) * draft_seconds
        return (self._expected + gain) / seconds

    def best_length(self, chances: Iterable[float], draft_seconds: float = 0.0) -> int:
        """How many of the guesses give the highest rate; 0 if none pays."""
        guesses, expected = self._guesses, self._expected
        best, best_rate = 0, expected / self._seconds(guesses)
        reached = 1.0
        for k, chance in enumerate(chances, 1):
            reached *= chance
            if reached < HOPELESS:
                break
            expected += reached
            rate = expected / (self._seconds(guesses + k) + k * draft_seconds)
            if rate > best_rate:
                best, best_rate = k, rate
        return best

    def take(self, chances: Sequence[float]) -> None:
        """These guesses are made: further ones come on top of them."""
        self._guesses += len(chances)
        self._expected += sum(accumulate(chances, operator.mul))


class Chances:
    """Probability that a guess comes true, by class of guess, learned as tokens come.

    Every sequence starts from what all sequences have shown and soon goes by its own: some texts are copied
    and some are not. Old observations fade.
    """

    def __init__(self, expected: Sequence[float]) -> None:
        """expected: the probability of each class before anything is known."""
        self._prior = list(expected)
        self._true = [4.0 * p for p in expected]
        self._seen = [4.0] * len(expected)

    def own(self) -> OwnChances:
        return OwnChances(self, [0.0] * len(self._prior), [0.0] * len(self._prior))

    def record(self, kind: int, came_true: bool) -> None:
        self._true[kind] = 0.998 * self._true[kind] + came_true
        self._seen[kind] = 0.998 * self._seen[kind] + 1

    def of(self, kind: int) -> float:
        return self._true[kind] / self._seen[kind]


@dataclass
class OwnChances:
    """The chances of one sequence."""

    shared: Chances
    true: list[float]
    seen: list[float]

    def record(self, kind: int, came_true: bool) -> None:
        self.shared.record(kind, came_true)
        self.true[kind] = 0.9 * self.true[kind] + came_true
        self.seen[kind] = 0.9 * self.seen[kind] + 1

    def of(self, kind: int) -> float:
        return (self.true[kind] + OTHERS * self.shared.of(kind)) / (self.seen[kind] + OTHERS)


# Class of a match by its length. A length of 0 or 1 is an old match that a differing token has just
# interrupted: where a word was replaced, the copy goes on behind it.
_CLASS = [0, 1, 2, 3, 4, 5, 5, 6, 6, 6, *[7] * 6, *[8] * (MAX_MATCH + MAX_DRAFT - 15)]
_EXPECTED = [0.3, 0.4, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9]


@dataclass
class _History:
    """One sequence: where its pairs of tokens stand, and the earlier place it now repeats."""

    chances: OwnChances
    seen: int = 0  # tokens in the index
    follows: dict[int, int] = field(
        default_factory=dict
    )  # pair of tokens -> the position behind its last one
    before: list[int] = field(
        default_factory=list
    )  # position -> the one behind the same pair, earlier; or -1
    at: int = -1  # the token here is guessed to come next; -1: no guess
    length: int = 0  # tokens before `at` that equal the end of the sequence


class NgramSpeculator:
    """Prompt lookup: where the end of a sequence stood before, what followed then is guessed again.

    The index of a sequence grows by one entry per token and a guess looks at no more than MAX_CANDIDATES
    places, so the whole is linear in the tokens. It also learns at steps without guesses: the token that came
    is compared with the one that would have been guessed.
    """

    def __init__(self, max_draft: int = MAX_DRAFT) -> None:
        self._max_draft = min(max_draft, MAX_DRAFT)
        self._histories: dict[str, _History] = {}
        self._chances = Chances(_EXPECTED)
        self._gain = StepGain()

    def begin(self, runs: int, seconds: Callable[[int], float]) -> None:
        self._gain.begin(runs, seconds)

    def propose(self, request_id: str, tokens: Sequence[int], limit: int) -> list[int]:
        history = self._histories.get(request_id)
        if history is None:
            history = self._histories[request_id] = _History(self._chances.own())
        _advance(history, tokens)
        _find(history, tokens)
        if history.at < 0:
            return []
        # Every guess that comes true makes the match longer by one.
        length = min(history.length, MAX_MATCH)
        kinds = _CLASS[length : length + max(0, min(limit, self._max_draft))]
        chance = history.chances.of
        k = self._gain.best_length(map(chance, kinds))
        if not k:
            return []
        self._gain.take([chance(kind) for kind in kinds[:k]])
        # A match that runs into the end goes on with its own guesses: a period repeats.
        period = len(tokens) - history.at
        return [tokens[history.at + i % period] for i in range(k)]

    def feedback(self, request_id: str, proposed: int, accepted: int) -> None:
        """Nothing: the tokens themselves tell, at the next guess."""

    def finish(self, request_id: str) -> None:
        self._histories.pop(request_id, None)


def _advance(history: _History, tokens: Sequence[int]) -> None:
    """Take the tokens that are new into the index, and learn from them whether the guess came true."""
    follows, before = history.follows, history.before
    previous = tokens[history.seen - 1] if history.seen else 0
    for i in range(history.seen, len(tokens)):
        token = tokens[i]
        if history.at >= 0:
            came_true = tokens[history.at] == token
            history.chances.record(_CLASS[min(history.length, MAX_MATCH)], came_true)
            history.length = history.length + 1 if came_true else 0
            history.at += 1
        pair = previous << 32 | token
        before.append(follows.get(pair, -1) if i else -1)
        if i:
            follows[pair] = i + 1
        previous = token
    history.seen = len(tokens)


def _find(history: _History, tokens: Sequence[int]) -> None:
    """Point at what followed the longest earlier match of the end of `tokens`; the newest of equals."""
    end = len(tokens)
    if not end or (history.at >= 0 and history.length >= MAX_MATCH):
        return
    place = history.before[end - 1]
    for _ in range(MAX_CANDIDATES):
        if place < 0:
            return
        length = 2
        while (
            length < MAX_MATCH and length < place and tokens[place - 1 - length] == tokens[end - 1 - length]
        ):
            length += 1
        if length > history.length:
            history.at, history.length = place, length
        place = history.before[place - 1]
