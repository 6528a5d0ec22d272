"""Guesses from a smaller model: fewer bits of the same weights will do (self-speculation).

It drafts greedily, on keys and values of its own, and stops as soon as the next guess is not worth its
time: the chance that a guess comes true is learned by how sure the small model was of it (SpecDec++,
arXiv:2405.19715). Where even the first is not worth it, it is not run, but for a few trials.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowbit.engine.parameters import SamplingParameters
from lowbit.engine.sequence import native_step, new_cache, new_sampler
from lowbit.engine.speculation import Chances, OwnChances, StepGain
from lowbit.errors import UnsupportedError

MAX_DRAFT = 8
CHUNK = 128  # tokens that the draft reads in one step: bounds what other sequences wait for it
TRIALS = 8  # guesses in a row that are made although they are not expected to pay
TRIED_SEQUENCES = (
    16  # one new sequence of so many is tried where others have shown that drafting does not pay
)
_CLASSES = 10  # by the draft's own probability of its guess
_ANY = _CLASSES  # a guess that is not made yet


@dataclass
class _Draft:
    """One sequence as the draft model sees it."""

    chances: OwnChances
    trials: int  # left
    cache: Any = None
    fed: list[int] = field(default_factory=list)  # tokens whose keys and values the cache holds
    guesses: list[int] = field(default_factory=list)  # the last ones
    kinds: list[int] = field(default_factory=list)  # the class of each
    guessed_at: int = 0  # position of the first
    failed: bool = False  # the draft model cannot go on


class DraftModelSpeculator:
    """A second model drafts, the first one verifies. Both must have one vocabulary.

    draft, target: LanguageModel.
    """

    def __init__(self, draft: Any, target: Any, max_draft: int = MAX_DRAFT) -> None:
        if draft.config.vocab_size != target.config.vocab_size:
            raise UnsupportedError(
                f"speculation: the draft model has {draft.config.vocab_size} tokens and the model "
                f"{target.config.vocab_size}; take a draft with the same tokenizer, such as fewer bits of "
                "the same model"
            )
        self._decoder = draft.decoder
        self._context: int = draft.context
        self._max_draft = max_draft
        self._sampler = new_sampler(SamplingParameters())
        self._drafts: dict[str, _Draft] = {}
        self._chances = Chances([(i + 0.5) / _CLASSES for i in range(_CLASSES)] + [0.7])
        self._gain = StepGain()
        self._sequences = 0
        self._seconds = 0.0  # per guess; 0 until one is made

    def begin(self, runs: int, seconds: Callable[[int], float]) -> None:
        self._gain.begin(runs, seconds)

    def propose(self, request_id: str, tokens: Sequence[int], limit: int) -> list[int]:
        draft = self._drafts.get(request_id)
        if draft is None:
            trials = 0 if self._sequences % TRIED_SEQUENCES else TRIALS
            draft = self._drafts[request_id] = _Draft(self._chances.own(), trials)
            self._sequences += 1
        self._learn(draft, tokens)
        limit = min(limit, self._max_draft, self._context - len(tokens))
        if limit < 1 or draft.failed or not self._worth(draft, limit):
            return []
        try:
            return self._draft(draft, tokens, limit)
        except UnsupportedError:  # its logits are not finite: the answer goes on without guesses
            draft.failed, draft.cache = True, None
            return []

    def _draft(self, draft: _Draft, tokens: Sequence[int], limit: int) -> list[int]:
        if not self._catch_up(draft, tokens):
            return []
        draft.guessed_at = len(tokens)
        last, chances = tokens[-1], list[float]()
        while len(chances) < limit:
            last, kind = self._guess(draft, last)
            draft.guesses.append(last)
            draft.kinds.append(kind)
            chances.append(draft.chances.of(kind))
            further = [*chances, draft.chances.of(_ANY)]
            if self._gain.rate(further, self._seconds) <= self._gain.rate(chances, self._seconds):
                break
        k = self._gain.best_length(chances)  # the time to draft them is spent
        self._gain.take(chances[:k])
        return draft.guesses[:k]

    def feedback(self, request_id: str, proposed: int, accepted: int) -> None:
        """Nothing: the tokens themselves tell, at the next guess."""

    def finish(self, request_id: str) -> None:
        self._drafts.pop(request_id, None)

    def _learn(self, draft: _Draft, tokens: Sequence[int]) -> None:
        """Compare the last guesses, those that were not sent included, with the tokens that came."""
        came = tokens[draft.guessed_at :]
        for guess, kind, token in zip(draft.guesses, draft.kinds, came):
            draft.chances.record(kind, guess == token)
            draft.chances.record(_ANY, guess == token)
            if guess != token:
                break
        draft.guesses, draft.kinds = [], []

    def _worth(self, draft: _Draft, limit: int) -> bool:
        """Whether to draft for this sequence now: where it is expected to pay, and in a few trials."""
        if self._gain.best_length([draft.chances.of(_ANY)] * limit, self._seconds):
            draft.trials = TRIALS
        elif draft.trials:
            draft.trials -= 1
        else:
            draft.cache, draft.fed, draft.guessed_at = None, [], 0
            return False
        return True

    def _catch_up(self, draft: _Draft, tokens: Sequence[int]) -> bool:
        """Feed what the cache lacks, all but the last token; False if that takes another step."""
        if draft.cache is None:
            draft.cache = new_cache(self._decoder, self._context)
        fed = draft.fed
        start = min(draft.guessed_at, len(fed))
        while start < len(fed) and start < len(tokens) - 1 and fed[start] == tokens[start]:
            start += 1
        start = draft.cache.truncate(start)
        del fed[start:]
        missing = list(tokens[start : min(start + CHUNK, len(tokens) - 1)])
        if missing:
            with native_step("speculation"):
                self._decoder.logits(np.asarray(missing, np.int32), [draft.cache], [len(missing)])
            fed += missing
        return len(fed) == len(tokens) - 1

    def _guess(self, draft: _Draft, last: int) -> tuple[int, int]:
        """The likeliest token after `last`, and the class of its probability."""
        started = time.perf_counter()
        with native_step("speculation"):
            ids, logprobs = self._decoder.sample(
                np.asarray([last], np.int32), [draft.cache], [1], [self._sampler]
            )
        draft.fed.append(last)
        spent = time.perf_counter() - started
        self._seconds = 0.9 * self._seconds + 0.1 * spent if self._seconds else spent
        return int(ids[0]), min(int(math.exp(float(logprobs[0])) * _CLASSES), _CLASSES - 1)
