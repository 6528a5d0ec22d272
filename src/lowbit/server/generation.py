"""Token ids from the engine to text, stop strings, log-probabilities and an end: the state of one answer.

`push` runs for every frame of the engine on the event loop, so it does only what each token needs; the writer
of the answer is woken once per frame, whatever the frame held.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lowbit.engine.request import derived_seed
from lowbit.engine.text import TextAssembler
from lowbit.server import wire
from lowbit.server.errors import ApiError

if TYPE_CHECKING:
    from lowbit.server.models import ServedModel

# How the engine's reasons read in OpenAI's words.
FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


class TextParser(Protocol):
    """Splits text into what is shown and what calls a tool, see tool_calls.py."""

    @property
    def satisfied(self) -> bool: ...
    def push(self, piece: str) -> str: ...
    def finish(self) -> str: ...
    def take_calls(self) -> list[Any]: ...


@dataclass
class Job:
    """What a request asks for, checked: made by jobs.py.

    prompts: token ids, each continued n times. parameters: fields of SamplingParameters, without the seed.
    logprobs: likeliest tokens to report per token, or None. echo: the prompt is part of the text.
    silent: a token is computed but none returned (max_tokens=0). constraint: see wire.Add.
    continuing: the text goes on from the prompt's. parser: makes the TextParser of each answer.
    echoed: fields of the request that /v1/responses repeats.
    """

    prompts: list[list[int]]
    parameters: dict[str, Any]
    seed: int
    n: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    echo: bool = False
    silent: bool = False
    constraint: tuple[str, str] | None = None
    priority: int = 0
    progress: bool = False
    continuing: bool = False
    skip_special: bool = True
    parser: Any = None
    echoed: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Scored:
    """A token with its log-probability and the likeliest in its place; None: the first of a prompt."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]] = field(default_factory=list)


class Choice:
    """One continuation. What is new since the last `take` waits in it.

    text: everything so far, if the answer is not streamed. scored: tokens with log-probabilities, likewise.
    """

    __slots__ = (
        "_assembler",
        "_generation",
        "_name",
        "_parser",
        "_pieces",
        "_scored",
        "_stopped",
        "calls",
        "finish",
        "index",
        "last",
        "progress",
        "prompt",
        "prompt_scored",
        "timings",
        "tokens",
    )

    def __init__(self, generation: Generation, index: int, prompt: list[int]) -> None:
        job = generation.job
        self.index = index
        self.prompt = prompt
        self.finish: str | None = None
        self.timings: dict[str, Any] | None = None
        self.tokens = 0
        self.calls: list[Any] = []
        self.prompt_scored: list[Scored] | None = None
        self.progress: int | None = None
        self.last = 0.0
        self._generation = generation
        self._name = ""
        self._stopped = False
        tokenizer = generation.model.tokenizer
        pieces = tokenizer.stream(skip_special=job.skip_special, continuing=job.continuing)
        self._assembler = TextAssembler(pieces, job.stop)
        self._parser: TextParser | None = job.parser() if job.parser is not None else None
        self._pieces: list[str] = []
        self._scored: list[Scored] = []

    def submit(self) -> None:
        generation, job = self._generation, self._generation.job
        self._name = generation.model.engine.submit(
            self,
            prompt=self.prompt,
            parameters={**job.parameters, "seed": derived_seed(job.seed, self.index)},
            tenant=generation.tenant,
            priority=job.priority,
            constraint=job.constraint,
            echo=(job.logprobs or 0) if job.echo and job.logprobs is not None else None,
            progress=job.progress,
        )

    def push(self, delta: wire.Delta) -> None:
        """Take what a step made."""
        generation = self._generation
        if delta.finish == "refused":
            message = delta.error or "refused"
            error = ApiError(delta.status or 400, message, retry_after=delta.retry_after)
            if delta.status == 429:
                error.code = "queue_full"
            generation.fail(error)
            return
        if delta.timings is not None:
            self.timings = delta.timings
        if delta.scores is not None:
            self._score_prompt(delta)
        if delta.progress >= 0:
            self.progress = delta.progress
        if delta.ids and not self._stopped:
            self._push_tokens(delta)
        if delta.finish is not None:
            self._end(delta)
        generation.woken(self)

    def fail(self, error: ApiError) -> None:
        self._generation.fail(error)

    def cancel(self) -> None:
        if self._name:
            self._generation.model.engine.cancel(self._name)

    def take(self) -> tuple[str, list[Scored]]:
        """The text and scored tokens since the last call."""
        text = "".join(self._pieces)
        scored = self._scored
        self._pieces = []
        if scored:
            self._scored = []
        return text, scored

    def take_calls(self) -> list[Any]:
        """The tool calls completed since the last call."""
        if self._parser is None:
            return []
        calls = self._parser.take_calls()
        self.calls += calls
        return calls

    @property
    def waiting(self) -> int:
        """Pieces of text that nobody has taken."""
        return len(self._pieces)

    def _push_tokens(self, delta: wire.Delta) -> None:
        job = self._generation.job
        now = time.monotonic()
        counters = self._generation.counters
        if self.tokens:
            counters.tokens(now - self.last, len(delta.ids))
        else:
            counters.first_token_seconds.observe(now - self._generation.arrived)
        self.last = now
        if job.silent:
            return
        for i, token in enumerate(delta.ids):
            self.tokens += 1
            piece = self._assembler.push(token)
            if self._parser is not None and piece:
                piece = self._parser.push(piece)
            if piece:
                self._pieces.append(piece)
            if self._assembler.stopped or (self._parser is not None and self._parser.satisfied):
                self._stopped = True  # the engine's last frame follows, with the timings
                self._generation.model.engine.stop_request(self._name)
                return
            if job.logprobs is not None:
                self._scored.append(Scored(token, delta.logprobs[i], delta.tops[i] if delta.tops else []))

    def _end(self, delta: wire.Delta) -> None:
        reason = delta.finish or ""
        if reason not in FINISH:
            message = delta.error or f"the engine ended the request: {reason}"
            if self._generation.job.constraint is not None and "grammar" in message:
                error = ApiError(400, message, code="constraint_failed")
            else:  # the model's numbers
                error = ApiError(500, message, code="engine_error")
            self._generation.fail(error)
            return
        job = self._generation.job
        self._generation.finished()
        if job.silent:
            self.finish = "length"
            return
        rest = "" if self._stopped else self._assembler.finish()
        if self._parser is not None:
            rest = self._parser.push(rest) + self._parser.finish()
        if rest:
            self._pieces.append(rest)
        stopped = self._stopped or self._assembler.stopped
        self.finish = "stop" if stopped else FINISH[reason]

    def _score_prompt(self, delta: wire.Delta) -> None:
        scores = delta.scores or []
        tops = delta.score_tops or [[] for _ in scores]
        first = Scored(self.prompt[0], None)
        rest = zip(self.prompt[1:], scores, tops)
        self.prompt_scored = [first, *(Scored(token, score, top) for token, score, top in rest)]


class Generation:
    """All continuations of one HTTP request."""

    def __init__(self, model: ServedModel, job: Job, tenant: str) -> None:
        self.model = model
        self.job = job
        self.tenant = tenant
        self.counters = model.counters
        self.arrived = self.spoken = time.monotonic()
        self.created = int(time.time())
        self.error: ApiError | None = None
        self.accepted = False
        self.wake = asyncio.Event()
        self.ended = False
        self.left: str | None = None  # why nobody waits for the answer any more
        self.ping = False  # the stream has been silent for long
        self.writing_since: float | None = None  # when the write began that is not done yet
        self.abort_connection: Callable[[], None] = lambda: None
        self.choices = [Choice(self, i, job.prompts[i // job.n]) for i in range(len(job.prompts) * job.n)]
        self._unfinished = len(self.choices)
        self.done = False  # every choice has its last token
        self._dirty: dict[Choice, None] = {}
        # First continuations whose prompt is still being read; the others of their prompt wait.
        self._alone = set(range(0, len(self.choices), job.n)) if job.n > 1 else set()

    def start(self) -> None:
        """Send the first continuation of each prompt; the others follow once its prompt is in the cache."""
        self.model.generations.add(self)
        for choice in self.choices[:: self.job.n]:
            choice.submit()

    def woken(self, choice: Choice) -> None:
        """Something is new in `choice`."""
        self.accepted = True
        if self._alone and choice.index in self._alone and (choice.tokens or choice.finish):
            self._start_others(choice)
        self._dirty[choice] = None
        self.wake.set()

    def take_dirty(self) -> list[Choice]:
        """The choices with something new, in order of arrival."""
        dirty = list(self._dirty)
        self._dirty.clear()
        return dirty

    def fail(self, error: ApiError) -> None:
        """End with an error, unless it has ended."""
        if self.error is None and not self.done:
            self.error = error
            self._cancel()
            self.wake.set()

    def finished(self) -> None:
        """One more choice has its last token."""
        self._unfinished -= 1
        self.done = self._unfinished == 0

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self.done or self.error is not None or self.left is not None

    def leave(self, reason: str) -> None:
        """Nobody waits for the answer any more: the engine forgets it at its next step."""
        if not self.over:
            self.left = reason
            self._cancel()
            self.wake.set()

    def close(self) -> None:
        """The answer is written or has failed: count it."""
        if self.ended:
            return
        self.ended = True
        self._cancel()
        self.model.generations.discard(self)
        seconds = time.monotonic() - self.arrived
        for choice in self.choices:
            timings = choice.timings
            if timings is not None and "queued_seconds" in timings:
                self.counters.queue_seconds.observe(timings["queued_seconds"])
            why = choice.finish or self.left or "error"
            self.counters.finish(why, seconds, len(choice.prompt), choice.tokens)

    def _start_others(self, first: Choice) -> None:
        self._alone.discard(first.index)
        try:
            for choice in self.choices[first.index + 1 : first.index + self.job.n]:
                choice.submit()
        except ApiError as error:
            self.fail(error)

    def _cancel(self) -> None:
        for choice in self.choices:
            if choice.finish is None:
                choice.cancel()
