"""What a load consists of: which prompts are sent, how long the answers are, and when.

Prompts are made of common words, of which nearly every tokenizer makes one token each; a short trial tells
how many tokens of a server a word is, so that lengths come out as asked for, whatever the model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lowbit.errors import RequestError
from lowbit.plan.trace import BLOCK_TOKENS, Request

_TEXT = (
    "the of and to in is was for on that with as by at from his were are which this be had or not but one "
    "their first have its new after who they two her she been other when there all during into school time "
    "may years more most only over city some world would where later up such used many can state about "
    "national out known university then between part made will people these team year season game work "
    "group number house life day war high home film music book water family north south west east name "
    "best line small large long both each own end under second three four last same however while since"
)
WORDS = _TEXT.split()  # of which some stand there twice, and come twice as often


@dataclass(frozen=True)
class Span:
    """A number, or a range of them with equal chances: `200`, `100-300`."""

    low: int
    high: int

    @staticmethod
    def parse(text: str) -> Span:
        low, _, high = text.partition("-")
        if not low.isdecimal() or not (high or low).isdecimal() or not 0 < int(low) <= int(high or low):
            raise RequestError(f"{text!r} is no length; write 200 or 100-300")
        return Span(int(low), int(high or low))

    def draw(self, chance: random.Random) -> int:
        return chance.randint(self.low, self.high)


def uniform(count: int, prompt: Span, answer: Span, seed: int, rate: float | None = None) -> list[Request]:
    """`count` requests; with a rate (requests per second) at the moments of a Poisson process."""
    chance = random.Random(seed)
    at, requests = 0.0, []
    for _ in range(count):
        requests.append(Request(prompt.draw(chance), answer.draw(chance), at))
        at += chance.expovariate(rate) if rate else 0.0
    return requests


@dataclass(frozen=True)
class Prompts:
    """Makes the texts. A prompt of w words has `fixed + per_word * w` tokens on this server."""

    seed: int
    per_word: float = 1.0
    fixed: float = 0.0
    shared_tokens: int = 0  # length of a beginning that all prompts have in common

    def text(self, index: int, request: Request) -> str:
        """The prompt of the request number `index`; the same for the same seed."""
        count = max(1, round((request.prompt_tokens - self.fixed) / self.per_word))
        words: list[str] = []
        if self.shared_tokens:
            words += self._words("shared", round(self.shared_tokens / self.per_word))
        for block in request.blocks:
            words += self._words(f"block {block}", round(BLOCK_TOKENS / self.per_word))
        if len(words) < count:
            words += self._words(f"request {index}", count - len(words))
        return " ".join(words[:count])

    def _words(self, name: str, count: int) -> list[str]:
        return random.Random(f"{self.seed} {name}").choices(WORDS, k=count)
