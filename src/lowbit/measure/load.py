"""Load on a server that speaks the OpenAI protocol: many requests at once, and how long their users wait.

    target, prompts = prepare(Endpoint.parse("http://127.0.0.1:8080"))
    result = run(target, prompts, uniform(64, Span(200, 200), Span(64, 64), seed=0), concurrency=8)

Requests come at fixed concurrency (the next one when one is done) or at given moments, as in a trace. Then a
request's clock starts when it was due, also if the client was late to send it.
"""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lowbit.errors import RequestError
from lowbit.measure.load_client import Answer, Endpoint, ask, get
from lowbit.measure.load_plan import Prompts
from lowbit.plan.trace import Request

PERCENTILES = (50, 95, 99)
TRIAL_WORDS = (8, 40)  # lengths of the two prompts that tell how many tokens a word is
# What servers call an answer that goes on past the end of the text, until its length is reached.
FULL_LENGTH: tuple[dict[str, Any], ...] = ({"ignore_eos": True}, {"min_tokens": None}, {})


@dataclass(frozen=True)
class Target:
    """A server and how to ask it. `body` goes into every request; `full_length` is one of FULL_LENGTH."""

    endpoint: Endpoint
    model: str
    chat: bool = False
    body: Mapping[str, Any] = field(default_factory=dict)
    full_length: Mapping[str, Any] = field(default_factory=dict)

    @property
    def route(self) -> str:
        return "/chat/completions" if self.chat else "/completions"

    def request(self, prompt: str, answer_tokens: int) -> dict[str, Any]:
        """The JSON to send for one streamed answer of at most `answer_tokens`."""
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        )
        exact = {key: answer_tokens if value is None else value for key, value in self.full_length.items()}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, **asked, "max_tokens": answer_tokens, **options, **exact, **self.body}


@dataclass(frozen=True)
class Goal:
    """What a user wants: most seconds to the first token, and per token after it. None: no matter."""

    first_token_seconds: float | None = None
    token_seconds: float | None = None

    def met(self, answer: Answer) -> bool:
        """Whether a whole answer was as fast as that; one without tokens has no time to miss."""
        pairs = (
            (answer.first_token_seconds, self.first_token_seconds),
            (answer.token_seconds, self.token_seconds),
        )
        return all(limit is None or value is None or value <= limit for value, limit in pairs)


def prepare(
    endpoint: Endpoint,
    *,
    model: str | None = None,
    chat: bool = False,
    body: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> tuple[Target, Prompts]:
    """Find out what the server calls its model, how to get answers of full length and how long a word is.

    Sends a few short requests, which also wake the server. Raises RequestError if it does not answer them.
    """
    return asyncio.run(_prepare(endpoint, model, chat, dict(body or {}), seed))


async def _prepare(
    endpoint: Endpoint, model: str | None, chat: bool, body: dict[str, Any], seed: int
) -> tuple[Target, Prompts]:
    if model is None:
        listed = await get(endpoint, "/models")
        found = listed.get("data") if isinstance(listed, dict) else None
        model = str(found[0]["id"]) if found else "default"
    answer, target = Answer(0.0), Target(endpoint, model, chat, body)
    prompts = Prompts(seed)
    short, long = (prompts.text(-1, Request(words, 1)) for words in TRIAL_WORDS)
    for option in FULL_LENGTH:
        target = Target(endpoint, model, chat, body, option)
        answer = await ask(endpoint, target.route, target.request(short, 2))
        if answer.status not in (400, 422):
            break
    if answer.failure:
        where = f"{endpoint.host}:{endpoint.port}{endpoint.base}{target.route}"
        raise RequestError(f"bench serve: {where} answered a trial with: {answer.failure}")
    second = await ask(endpoint, target.route, target.request(long, 2))
    if second.failure and answer.prompt_tokens:  # too long for this model
        prompts = Prompts(seed, answer.prompt_tokens / TRIAL_WORDS[0])
    elif answer.prompt_tokens and second.prompt_tokens:
        per_word = (second.prompt_tokens - answer.prompt_tokens) / (TRIAL_WORDS[1] - TRIAL_WORDS[0])
        if per_word > 0:
            prompts = Prompts(seed, per_word, answer.prompt_tokens - per_word * TRIAL_WORDS[0])
    return target, prompts


def run(
    target: Target,
    prompts: Prompts,
    requests: Sequence[Request],
    *,
    concurrency: int | None = None,
    goal: Goal | None = None,
    timeout: float = 600.0,
    abandon: float = 0.0,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Send all requests and describe how they were answered; keys end in their units.

    concurrency: so many at once, each of the next when one is done; None: each at its `at_seconds`.
    abandon: the share of requests whose client leaves at a random moment of the answer. Answers that fail are
    counted by what went wrong, and are part of no time. progress(done, all, text) is called twice a second.
    """
    if not requests or not 0 <= abandon <= 1 or (concurrency is not None and concurrency < 1):
        raise RequestError(
            f"load: {len(requests)} requests, concurrency={concurrency}, abandon={abandon}; there must be a "
            "request, a concurrency of at least 1 and a share of 0 to 1"
        )
    load = _Load(target, prompts, requests, timeout, abandon)
    return summarize(*asyncio.run(load.run(concurrency, progress)), goal)


class _Load:
    """One run: what was sent and what came of it so far."""

    def __init__(
        self, target: Target, prompts: Prompts, requests: Sequence[Request], timeout: float, abandon: float
    ):
        self.target, self.prompts, self.requests, self.timeout = target, prompts, requests, timeout
        chance = random.Random(prompts.seed)
        self.leave_after = [
            chance.randint(0, request.answer_tokens) if chance.random() < abandon else None
            for request in requests
        ]
        self.answers: list[Answer] = []
        self.running = 0
        self.late_seconds = 0.0

    async def run(
        self, concurrency: int | None, progress: Callable[[int, int, str], None] | None
    ) -> tuple[list[Answer], dict[str, float]]:
        watch = asyncio.create_task(self._watch(progress)) if progress else None
        started, used = time.perf_counter(), _cpu_seconds()
        if concurrency is None:
            await asyncio.gather(
                *(self._send(i, started + r.at_seconds) for i, r in enumerate(self.requests))
            )
        else:
            order = iter(range(len(self.requests)))
            await asyncio.gather(*(self._client(order) for _ in range(min(concurrency, len(self.requests)))))
        clock = {
            "seconds": time.perf_counter() - started,
            "client_cpu_seconds": _cpu_seconds() - used,
            "late_seconds": self.late_seconds,
        }
        if watch:
            watch.cancel()
        return self.answers, clock

    async def _client(self, order: Any) -> None:
        for index in order:
            await self._send(index, None)

    async def _send(self, index: int, due: float | None) -> None:
        if due is not None:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        request = self.requests[index]
        body = self.target.request(self.prompts.text(index, request), request.answer_tokens)
        if due is not None:
            self.late_seconds = max(self.late_seconds, time.perf_counter() - due)
        self.running += 1
        answer = await ask(
            self.target.endpoint, self.target.route, body,
            started=due, timeout=self.timeout, leave_after=self.leave_after[index],
        )  # fmt: skip
        self.running -= 1
        self.answers.append(answer)

    async def _watch(self, progress: Callable[[int, int, str], None]) -> None:
        started = time.perf_counter()
        while True:
            await asyncio.sleep(0.5)
            tokens = sum(answer.tokens for answer in self.answers)
            rate = tokens / (time.perf_counter() - started)
            failed = sum(answer.failure is not None for answer in self.answers)
            text = f"{self.running} running, {rate:,.0f} tokens/s" + (f", {failed} failed" if failed else "")
            progress(len(self.answers), len(self.requests), text)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def summarize(answers: Sequence[Answer], clock: Mapping[str, float], goal: Goal | None) -> dict[str, Any]:
    """The figures of a run. Times are of whole answers only.

    inter_token_seconds: gaps between arrivals of one answer; text that arrives together is one arrival, so
    that a server which hands out several tokens at once shows its real gaps, and not zeros among them.
    """
    whole = [answer for answer in answers if not answer.failure and not answer.left]
    seconds = clock["seconds"]
    tokens = sum(answer.tokens for answer in whole)
    prompt = sum(answer.prompt_tokens or 0 for answer in whole)
    arrivals = sum(len(answer.arrivals) for answer in whole)
    gaps = [b - a for answer in whole for a, b in zip(answer.arrivals, answer.arrivals[1:])]
    result: dict[str, Any] = {
        "requests": len(answers),
        "completed": len(whole),
        "left": sum(answer.left for answer in answers),
        "failures": dict(Counter(answer.failure for answer in answers if answer.failure)),
        "seconds": seconds,
        "prompt_tokens": prompt,
        "cached_tokens": sum(answer.cached_tokens or 0 for answer in whole),
        "answer_tokens": tokens,
        "tokens_counted_by": "pieces" if any(answer.answer_tokens is None for answer in whole) else "usage",
        "answer_tokens_per_second": tokens / seconds,
        "total_tokens_per_second": (tokens + prompt) / seconds,
        "requests_per_second": len(whole) / seconds,
        "first_token_seconds": spread([answer.first_token_seconds for answer in whole]),
        "token_seconds": spread([answer.token_seconds for answer in whole]),
        "inter_token_seconds": spread(gaps),
        "request_seconds": spread([answer.ended - answer.started for answer in whole]),
        "tokens_per_arrival": tokens / arrivals if arrivals else None,
        "client_cpu_fraction": clock["client_cpu_seconds"] / seconds,
        "late_seconds": clock["late_seconds"],
    }
    if goal is not None:
        met = sum(goal.met(answer) for answer in whole)
        result["goal"] = {
            "first_token_seconds": goal.first_token_seconds,
            "token_seconds": goal.token_seconds,
        }
        result["goodput_requests_per_second"] = met / seconds
        result["goodput_fraction"] = met / max(1, len(answers) - result["left"])
    return result


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, percentiles and the largest of the values that there are; None if there are none."""
    known = np.array([value for value in values if value is not None])
    if not known.size:
        return None
    points = {f"p{p}": float(np.percentile(known, p)) for p in PERCENTILES}
    return {"mean": float(known.mean()), **points, "max": float(known.max())}


def with_shared_prefix(prompts: Prompts, tokens: int) -> Prompts:
    """The same prompts with a beginning of `tokens` tokens in common."""
    return replace(prompts, shared_tokens=tokens)
