"""One sequence: tokens, their keys and values, and the next token."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.engine.parameters import SamplingParameters
from lowbit.errors import RequestError, UnsupportedError

# Tokens of a prompt that one native call takes. Bounds the memory of activations and the time
# until Ctrl-C is noticed; the result does not depend on it.
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class TokenLogprob:
    """A sampled token, the natural log of its probability, and the likeliest tokens of the step."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@contextmanager
def native_step(operation: str) -> Iterator[None]:
    """Around a native call: its RuntimeError (logits that are not finite) becomes ours."""
    try:
        yield
    except RuntimeError as error:
        raise UnsupportedError(
            f"{operation}: {error}; the weights overflow in this format or with these activations: "
            "try --activations int16, or another format"
        ) from error


def new_cache(decoder: Any, capacity: int) -> Any:
    from lowbit import _native

    return _native.KvCache(decoder, capacity)


def new_sampler(parameters: SamplingParameters, eos: Collection[int] = ()) -> Any:
    """eos: tokens that parameters.min_tokens holds back."""
    from lowbit import _native

    p = parameters  # may hold NumPy scalars
    return _native.Sampler(
        temperature=float(p.temperature),
        top_k=int(p.top_k),
        top_p=float(p.top_p),
        min_p=float(p.min_p),
        repetition_penalty=float(p.repetition_penalty),
        presence_penalty=float(p.presence_penalty),
        frequency_penalty=float(p.frequency_penalty),
        seed=int(p.seed),
        top_logprobs=int(p.logprobs or 0),
        logit_bias={int(token): float(bias) for token, bias in p.logit_bias.items()},
        forbid=sorted(eos) if p.min_tokens else [],
        forbid_until=int(p.min_tokens),
    )


def check_prompt(n_tokens: int, context: int) -> None:
    """Raise RequestError unless a prompt of `n_tokens` leaves room for one new token."""
    if n_tokens == 0:
        raise RequestError("generate: the prompt has 0 tokens; give at least one")
    if n_tokens >= context:
        raise RequestError(
            f"generate: the prompt has {n_tokens} tokens and the context holds {context}, one of them to "
            f"be generated; shorten the prompt to {context - 1} tokens, or raise the context (--context)"
        )


class TokenSequence:
    """The tokens whose keys and values are kept, so that a longer prompt with the same beginning
    computes only what is new."""

    def __init__(self, decoder: Any, capacity: int) -> None:
        self._decoder = decoder
        self.capacity = capacity
        self.cache = new_cache(decoder, capacity)
        self.tokens: list[int] = []
        self.reused = 0

    def generate(
        self, prompt: Sequence[int], parameters: SamplingParameters, eos: Collection[int] = ()
    ) -> Iterator[TokenLogprob]:
        """Yield sampled tokens after `prompt`, until the context holds no further one.

        eos: tokens that do not come before parameters.min_tokens others.

        The caller ends the iteration (end of text, stop string, max_tokens).
        """
        reused = self._reuse(prompt)
        sampler = new_sampler(parameters, eos)
        sampler.observe(np.asarray(prompt, dtype=np.int32))
        pending = list(prompt[reused:])
        while len(pending) > PREFILL_CHUNK:
            self._append(pending[:PREFILL_CHUNK])
            pending = pending[PREFILL_CHUNK:]
        while len(self.tokens) + len(pending) < self.capacity:
            batch = np.asarray(pending, dtype=np.int32)
            with native_step("generate"):
                ids, logprobs = self._decoder.sample(batch, [self.cache], [len(pending)], [sampler])
            self.tokens += pending
            token = int(ids[0])
            top = tuple(sampler.top()) if parameters.logprobs else ()
            yield TokenLogprob(token, float(logprobs[0]), top)
            pending = [token]

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Keep the longest common beginning; the last token of a prompt is always computed."""
        limit = min(len(self.tokens), len(prompt) - 1)
        common = 0
        while common < limit and self.tokens[common] == prompt[common]:
            common += 1
        common = self.cache.truncate(common)  # with 4 and 2 bits perhaps fewer: where a page begins
        del self.tokens[common:]
        self.reused = common
        return common

    def _append(self, tokens: list[int]) -> None:
        with native_step("generate"):
            self._decoder.logits(np.asarray(tokens, dtype=np.int32), [self.cache], [len(tokens)])
        self.tokens += tokens
