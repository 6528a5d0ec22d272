"""What a request may ask of the sampler, validated once."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from lowbit.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_TOP_LOGPROBS = 100
MAX_BIAS = 1000.0


@dataclass(frozen=True)
class SamplingParameters:
    """How tokens are drawn, and when generation ends.

    The order is: logit_bias, penalties, temperature, top_k, top_p, min_p.
    max_tokens: new tokens at most; None: until the context is full.
    min_tokens: before so many, end-of-text is not chosen.
    temperature: 0 is greedy (ties go to the lowest id).
    top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
    repetition_penalty: divides positive and multiplies negative logits of tokens seen; 1 is off.
    presence_penalty, frequency_penalty: subtracted once, or once per occurrence; 0 is off.
    logit_bias: token id to what is added to its logit.
    seed: 64 bits; the same prompt, seed and model give the same tokens.
    stop: strings that end the text; they are not part of it.
    logprobs: None: not returned; n: the chosen token's and those of the n likeliest.
    ignore_eos: go on past the end-of-text token (for measurements).
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        _integer("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _number("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _number("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        for token, bias in self.logit_bias.items():
            _integer("logit_bias token", token, 0, 2**31 - 1)
            _number("logit_bias", bias, -MAX_BIAS, MAX_BIAS)
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"sampling: {len(stop)} stop strings; at most {MAX_STOP_STRINGS} are allowed, pass fewer"
            )
        for text in stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"sampling: stop={text!r} must be a non-empty string; leave it out")


def random_seed() -> int:
    """A fresh seed for callers that want different text each time; report it to be repeatable."""
    return int.from_bytes(os.urandom(4), "little")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise RequestError(f"sampling: {name}={value!r} must be an integer of {low} to {high}")
    if not low <= value.__index__() <= high:
        raise RequestError(f"sampling: {name}={value!r} is outside {low} to {high}; choose a value in it")


def _number(name: str, value: object, low: float, high: float, low_open: bool = False) -> None:
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise RequestError(f"sampling: {name}={value!r} must be a number in {interval}")
    number = value.__float__()
    if not math.isfinite(number) or not low <= number <= high or (low_open and number == low):
        raise RequestError(f"sampling: {name}={value!r} is outside {interval}; choose a value in it")
