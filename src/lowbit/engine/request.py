"""What goes into the engine and what comes out of it, step by step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from lowbit.engine.parameters import MAX_TOP_LOGPROBS, SamplingParameters
from lowbit.errors import RequestError

# Why a request ended: end-of-text; a stop string (the reader of the text decides: EngineCore.cancel) or a
# completed grammar; max_tokens; no room left; taken back; logits that are not finite.
FINISH_REASONS = ("eos", "stop", "length", "context", "cancelled", "error")

_numbers = itertools.count(1)


class Constraint(Protocol):
    """Allowed next tokens; the engine calls `accept` with each token it samples but end-of-text.

    With speculation on, two more methods are used where they are there: forced(limit) -> list[int], guesses
    that are bound to come, and masks(drafts) -> (uint32 [k + 1, words], k), the masks before each guess and
    after the last, and how many of the guesses are allowed.
    """

    @property
    def finished(self) -> bool:
        """True once nothing may follow: the request ends with "stop"."""

    def mask(self) -> np.ndarray:
        """uint32 [ceil(vocab / 32)]: bit t % 32 of word t // 32 allows token t."""

    def accept(self, token_id: int) -> None: ...


@dataclass(frozen=True)
class Request:
    """One prompt to continue. Its tokens depend on prompt_ids, parameters and the model only.

    Several continuations of one prompt are several requests with seeds of their own (see `derived_seed`);
    they share the prompt's keys and values.

    prompt_ids: at least one token id; never cut.
    tenant: whose turn it is counts per tenant; prefixes are shared within a tenant only.
    priority: larger goes first, whatever its tenant has used.
    request_id: unique among the requests in the engine.
    constraint: restricts every sampled token.
    echo_scores: n: also return the log-probability of each prompt token after the first, and the n likeliest
        in its place. The whole prompt is computed then, whatever the prefix cache holds.
    """

    prompt_ids: list[int]
    parameters: SamplingParameters = field(default_factory=SamplingParameters)
    tenant: str = ""
    priority: int = 0
    request_id: str = field(default_factory=lambda: f"request-{next(_numbers)}")
    constraint: Constraint | None = None
    echo_scores: int | None = None

    def __post_init__(self) -> None:
        if self.echo_scores is not None and not 0 <= self.echo_scores <= MAX_TOP_LOGPROBS:
            raise RequestError(
                f"request: echo_scores={self.echo_scores} is outside 0 to {MAX_TOP_LOGPROBS}; "
                "choose a value in it, or None"
            )


@dataclass(slots=True)
class PromptScores:
    """Log-probabilities of a prompt's tokens.

    logprobs: float32 [prompt tokens - 1], of prompt_ids[1:].
    tops: per place the likeliest tokens, likeliest first; empty lists if none were asked for.
    """

    logprobs: np.ndarray
    tops: list[list[tuple[int, float]]]


@dataclass(slots=True)
class Timings:
    """Where the time of a finished request went, and what was saved.

    queued_seconds: from add() to the first step that worked on it; prompt_seconds: from there to the first
    token; generation_seconds: from the first token to the last. cached_tokens: prompt tokens whose keys and
    values were there already. drafted_tokens, accepted_tokens: guesses of speculation and those that held.
    preemptions: how often its keys and values were given up and computed again.
    """

    queued_seconds: float = 0.0
    prompt_seconds: float = 0.0
    generation_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0

    @property
    def first_token_seconds(self) -> float:
        return self.queued_seconds + self.prompt_seconds

    @property
    def tokens_per_second(self) -> float:
        """Rate after the first token; 0 with fewer than two."""
        n, seconds = self.generated_tokens - 1, self.generation_seconds
        return n / seconds if n > 0 and seconds > 0 else 0.0


@dataclass(slots=True)
class Output:
    """What one step added to one request.

    ids: new tokens in order, without end-of-text; several with speculation, none if the step only ended it.
    logprobs: raw natural log-probability of each id; tops: the likeliest tokens at each (empty lists unless
    parameters.logprobs > 0). prompt_scores: once, with the first output, if echo_scores was given.
    finish_reason: one of FINISH_REASONS with the last output; timings comes with it. error: text for "error".
    """

    request_id: str
    ids: list[int]
    logprobs: list[float]
    tops: list[list[tuple[int, float]]]
    prompt_scores: PromptScores | None = None
    finish_reason: str | None = None
    timings: Timings | None = None
    error: str | None = None


def derived_seed(seed: int, index: int) -> int:
    """The seed of continuation `index` (0: `seed` itself) of a request for several."""
    return (seed + index * 0x9E3779B97F4A7C15) % 2**64
