"""What a load consists of: which prompts are sent, how long the answers are, and when.

Prompts are made of common words, of which nearly every tokenizer makes one token each; a short trial tells
how many tokens of a server a word is, so that lengths come out as asked for, whatever the model.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lowbit.errors import RequestError

BLOCK_TOKENS = 512  # of a Mooncake trace: each of its hash ids names a block of so many tokens
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
class Request:
    """One request of a load. at_seconds: when, after the start; 0 in a load of fixed concurrency.

    blocks: names of the parts that the prompt begins with, `BLOCK_TOKENS` long each; requests that name the
    same ones share that beginning.
    """

    prompt_tokens: int
    answer_tokens: int
    at_seconds: float = 0.0
    blocks: tuple[int, ...] = ()


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


def replay(
    path: Path,
    *,
    scale: float = 1.0,
    lengths: float = 1.0,
    longest: int | None = None,
    count: int | None = None,
) -> tuple[list[Request], int]:
    """The requests of a trace, `scale` times as fast, with prompts and answers `lengths` times as long.

    Reads Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) and Mooncake's lines of JSON (timestamp in
    milliseconds, input_length, output_length, hash_ids). Requests of more than `longest` tokens, prompt and
    answer together, are left out, and their number is returned beside the first `count` others.
    """
    requests: list[Request] = []
    left_out = 0
    start: float | None = None
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.read(1)
        file.seek(0)
        entries: Iterable[Any] = csv.DictReader(file)
        read: Callable[[Any], tuple[float, int, int, tuple[int, ...]]] = _azure
        if first == "{":
            entries, read = filter(str.strip, file), _mooncake
        for number, entry in enumerate(entries, 1):
            try:
                moment, prompt, answer, blocks = read(entry)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise RequestError(f"{path.name}: entry {number} is not of a trace ({error!r})") from error
            prompt, answer = (max(1, round(tokens * lengths)) for tokens in (prompt, answer))
            if longest is not None and prompt + answer > longest:
                left_out += 1
                continue
            start = moment if start is None else start
            requests.append(Request(prompt, answer, max(0.0, moment - start) / scale, blocks))
            if len(requests) == count:
                break
    if not requests:
        raise RequestError(f"{path.name}: no requests" + (f" of at most {longest} tokens" if longest else ""))
    return requests, left_out


def _mooncake(line: str) -> tuple[float, int, int, tuple[int, ...]]:
    entry = json.loads(line)
    blocks = tuple(int(block) for block in entry.get("hash_ids", ()))
    return float(entry["timestamp"]) / 1000, int(entry["input_length"]), int(entry["output_length"]), blocks


def _azure(row: dict[str, str]) -> tuple[float, int, int, tuple[int, ...]]:
    # The time zone, if any, is the same in all rows; Python reads six digits of a second, not seven.
    day, _, fraction = row["TIMESTAMP"].split("+")[0].rstrip("Z").partition(".")
    whole = datetime.strptime(day, "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc).timestamp()
    return whole + float(f"0.{fraction or 0}"), int(row["ContextTokens"]), int(row["GeneratedTokens"]), ()


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
