"""The engine: requests in, tokens out, all of them in one native call per step.

Tokens are a function of prompt, parameters and model. What else happens in the engine (companions, chunks,
prefix hits, guesses, preemption) changes when they come and never which.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.engine.budget import StepTimes
from lowbit.engine.config import EngineConfig
from lowbit.engine.generate import LanguageModel
from lowbit.engine.job import Job, StepPlan
from lowbit.engine.parameters import SamplingParameters
from lowbit.engine.pool import PoolMemory
from lowbit.engine.prefix_cache import PrefixCache
from lowbit.engine.request import Output, PromptScores, Request, Timings
from lowbit.engine.scheduler import Scheduler
from lowbit.engine.sequence import check_prompt, new_sampler
from lowbit.errors import BusyError, RequestError, UnsupportedError

RATE_SECONDS = 10.0  # tokens per second are counted over this long


@dataclass(slots=True)
class _State:
    """What the core keeps about a job beside what the scheduler does."""

    sampler: Any
    eos: frozenset[int]
    timings: Timings
    added: float
    started: float = 0.0
    first: float = 0.0
    last: float = 0.0
    scores: list[np.ndarray] | None = None
    score_tops: list[list[tuple[int, float]]] | None = None


class EngineCore:
    """Runs requests on one model. Not for several threads at once: one thread adds, steps and cancels.

    The loop of its owner: `while True: (take requests, add() them); for output in core.step(): deliver`;
    when `idle`, wait for the next request instead of stepping.
    """

    def __init__(self, model: LanguageModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config or EngineConfig()
        self._decoder = model.decoder
        self._clock: Callable[[], float] = time.perf_counter
        self._memory = PoolMemory(self._decoder, self.config, model.context)
        self._times = StepTimes(self.config.target_seconds_between_tokens)
        shares = self.config.prefix_cache and self._memory.shares
        self._prefix = PrefixCache(_salt(model), self._memory.block_positions) if shares else None
        self._speculator = _speculator(self.config.speculation, model)
        self._scheduler = Scheduler(
            self._memory,
            self._times,
            self.config.max_sequences,
            chunk_tokens=self.config.chunk_tokens,
            prefix=self._prefix,
            propose=self._propose if self._speculator is not None else None,
            begin=self._begin_guessing if hasattr(self._speculator, "begin") else None,
        )
        self._jobs: dict[str, Job] = {}
        self._ended: list[Output] = []  # told at the next step
        self._steps = 0
        self._counts = dict.fromkeys(
            ("finished", "prompt_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens"), 0
        )
        self._seconds = {"prompt": 0.0, "decode": 0.0, "mixed": 0.0}
        self._step_counts = {"prompt": 0, "decode": 0, "mixed": 0}
        self._recent: deque[tuple[float, int]] = deque()  # (when, generated tokens)

    # ---- Requests

    def add(self, request: Request) -> None:
        """Take a request in; its tokens come out of later steps.

        Raises RequestError if the prompt does not fit (it is never cut) or the id is in use, BusyError if too
        many tokens are waiting.
        """
        prompt = self.model.encode(request.prompt_ids)
        check_prompt(len(prompt), self.model.context)
        room = self._memory.blocks * self._memory.block_positions
        if len(prompt) >= room:
            raise RequestError(
                f"generate: the prompt has {len(prompt)} tokens and the engine's memory for keys and values "
                f"holds {room}; shorten the prompt, or raise kv_bytes"
            )
        if request.request_id in self._jobs:
            raise RequestError(f"generate: request_id={request.request_id!r} is in use; choose another")
        parameters = request.parameters
        if parameters.logit_bias:
            self.model.encode(list(parameters.logit_bias))  # are they in the vocabulary?
        most = min(self.model.context, room)
        job = Job(request, min(most, len(prompt) + (parameters.max_tokens or most)))
        job.tokens = prompt
        job.unguessed = request.constraint is not None
        job.extra = self._state(parameters, prompt, request)
        waiting = self._scheduler.queued_tokens
        if waiting and waiting + len(prompt) > self.config.max_queued_tokens:
            seconds = waiting * self._times.prompt_token_seconds
            raise BusyError(
                f"generate: {waiting} tokens are waiting and {len(prompt)} more exceed "
                f"max_queued_tokens={self.config.max_queued_tokens}; try again in {seconds:.1f} seconds",
                max(seconds, 0.1),
            )
        self._jobs[request.request_id] = job
        self._scheduler.add(job)

    def cancel(self, request_id: str, reason: str = "cancelled") -> bool:
        """End a request wherever it is: its memory is free at once, its last output comes with the next step.

        reason: "stop" when its text has reached a stop string. False if there is no such request (any more).
        """
        job = self._jobs.get(request_id)
        if job is None:
            return False
        self._ended.append(self._finish(job, reason, [], [], []))
        return True

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return self._scheduler.idle and not self._ended

    # ---- A step

    def step(self) -> list[Output]:
        """Compute one step and return what it added, one Output per request that got tokens or ended."""
        outputs, self._ended = self._ended, []
        if self.config.preempt_every and self._scheduler.running:
            self._steps += 1
            if self._steps % self.config.preempt_every == 0:
                running = self._scheduler.running
                self._scheduler.preempt(running[self._steps // self.config.preempt_every % len(running)])
        before = self._clock()
        plan = self._scheduler.schedule()
        if plan is None:
            return outputs
        runs = self._run(plan, before)
        now = self._clock()
        self._scheduler.observe(plan, now - before)
        self._count(plan, now - before)
        generated = 0
        for i, job in enumerate(plan.jobs):
            output = self._commit(job, plan.counts[i], plan.samples[i], runs[i], now)
            if output is not None:
                generated += len(output.ids)
                outputs.append(output)
        self._counts["generated_tokens"] += generated
        self._recent.append((now, generated))
        while self._recent[0][0] < now - RATE_SECONDS:
            self._recent.popleft()
        return outputs

    def stats(self) -> dict[str, Any]:
        """Gauges and counters, cheap enough for every second.

        running, waiting (requests), queued_tokens; kv_blocks_total, kv_blocks_used (by running requests and
        the prefix cache), kv_blocks_cached (by the prefix cache alone), kv_tokens_total; prefix_hit_tokens,
        prefix_asked_tokens; drafted_tokens, accepted_tokens; preemptions; requests_finished, prompt_tokens,
        generated_tokens; tokens_per_second over the last seconds; step_seconds and steps by kind ("decode",
        "prompt", "mixed").
        """
        scheduler, memory = self._scheduler, self._memory
        recent = list(self._recent)
        now = self._clock()
        span = min(RATE_SECONDS, now - recent[0][0]) if recent else 0.0
        tokens = sum(n for when, n in recent if when > now - RATE_SECONDS)
        return {
            "running": len(scheduler.running),
            "waiting": scheduler.n_waiting,
            "queued_tokens": scheduler.queued_tokens,
            "kv_blocks_total": memory.blocks,
            "kv_blocks_used": memory.blocks - memory.free_blocks,
            "kv_blocks_cached": self._prefix.idle_blocks if self._prefix else 0,
            "kv_tokens_total": memory.blocks * memory.block_positions,
            "prefix_hit_tokens": self._prefix.hit_tokens if self._prefix else 0,
            "prefix_asked_tokens": self._prefix.asked_tokens if self._prefix else 0,
            "drafted_tokens": self._counts["drafted_tokens"],
            "accepted_tokens": self._counts["accepted_tokens"],
            "preemptions": scheduler.preemptions,
            "requests_finished": self._counts["finished"],
            "prompt_tokens": self._counts["prompt_tokens"],
            "generated_tokens": self._counts["generated_tokens"],
            "tokens_per_second": tokens / span if span > 0 else 0.0,
            "step_seconds": dict(self._seconds),
            "steps": dict(self._step_counts),
        }

    # ---- Inside

    def _state(self, parameters: SamplingParameters, prompt: list[int], request: Request) -> _State:
        eos = frozenset() if parameters.ignore_eos else self.model.eos_ids
        try:
            sampler = new_sampler(parameters, eos)
        except ValueError as error:
            raise RequestError(f"generate: {error}") from error
        sampler.observe(np.asarray(prompt, dtype=np.int32))
        state = _State(sampler, eos, Timings(prompt_tokens=len(prompt)), self._clock())
        if request.echo_scores is not None:
            state.scores, state.score_tops = [], []
        return state

    def _run(self, plan: StepPlan, now: float) -> Any:
        tokens: list[int] = []
        caches, samplers = [], []
        drafts: list[int] | None = None
        masks: list[np.ndarray | None] | None = None
        scores: list[int] | None = None
        for i, job in enumerate(plan.jobs):
            count, state = plan.counts[i], job.extra
            if count == 1:
                tokens.append(job.tokens[job.computed])
            else:
                guesses = job.drafts
                tokens += job.tokens[job.computed : job.computed + count - len(guesses)]
                if guesses:
                    tokens += guesses
                    drafts = drafts or [0] * len(plan.jobs)
                    drafts[i] = len(guesses)
            caches.append(job.cache)
            samplers.append(state.sampler if plan.samples[i] else None)
            if not state.started:
                state.started = now
            if job.request.constraint is not None and plan.samples[i]:
                masks = masks or [None] * len(plan.jobs)
                masks[i] = job.request.constraint.mask()
            if job.request.echo_scores is not None and job.scoring:
                scores = scores or [-1] * len(plan.jobs)
                scores[i] = job.request.echo_scores
        return self._decoder.step(
            np.array(tokens, dtype=np.int32), caches, plan.counts, samplers, drafts, masks, scores
        )

    def _commit(self, job: Job, count: int, samples: bool, run: Any, now: float) -> Output | None:
        """Take the results of one run in; an Output if there is something to tell."""
        if run.failed:
            return self._finish(job, "error", [], [], [], error=_NOT_FINITE)
        state = job.extra
        prompt_scores = None
        if job.scoring:
            prompt_scores = self._score(job, run, samples)
            if not samples:
                # The last token goes in again, to score the one that follows it.
                count -= 1
                job.cache.truncate(job.computed + count)
        if not samples:
            self._scheduler.advance(job, job.computed + count, [])
            return None
        ids, guesses = run.ids, len(job.drafts)
        if guesses:
            self._feedback(job, guesses, len(ids) - 1)
        computed = job.computed + count - guesses + len(ids) - 1
        reason = self._end(job, ids)
        ids = ids if reason is None else self._kept
        self._scheduler.advance(job, computed, ids)
        state.last = now
        if not state.first:
            state.first = now
        if reason is not None:
            n = len(ids)
            output = self._finish(job, reason, ids, run.logprobs[:n], run.tops[:n])
        else:
            output = Output(job.request_id, ids, run.logprobs, run.tops)
        output.prompt_scores = prompt_scores
        return output

    def _end(self, job: Job, ids: list[int]) -> str | None:
        """The finish reason if the request ends within `ids`, and then in `_kept` those before the end."""
        state, constraint = job.extra, job.request.constraint
        room = job.limit - len(job.tokens)
        for i, token in enumerate(ids):
            if token in state.eos:
                self._kept = ids[:i]
                return "eos"
            if constraint is not None:
                constraint.accept(token)
            if i + 1 == room:
                self._kept = ids[: i + 1]
                return (
                    "length"
                    if job.limit - job.prompt_tokens == job.request.parameters.max_tokens
                    else "context"
                )
            if constraint is not None and constraint.finished:
                self._kept = ids[: i + 1]
                return "stop"
        return None

    def _score(self, job: Job, run: Any, complete: bool) -> PromptScores | None:
        state = job.extra
        state.scores.append(np.asarray(run.scores, dtype=np.float32))
        state.score_tops += run.score_tops or [[] for _ in run.scores]
        if not complete:
            return None
        job.scoring = False
        return PromptScores(np.concatenate(state.scores), state.score_tops)

    def _finish(
        self,
        job: Job,
        reason: str,
        ids: list[int],
        logprobs: list[float],
        tops: list[list[tuple[int, float]]],
        error: str | None = None,
    ) -> Output:
        self._scheduler.remove(job)
        del self._jobs[job.request_id]
        if self._speculator is not None and hasattr(self._speculator, "finish"):
            self._speculator.finish(job.request_id)
        state = job.extra
        timings, now = state.timings, self._clock()
        timings.queued_seconds = (state.started or now) - state.added
        timings.prompt_seconds = (state.first or now) - state.started if state.started else 0.0
        timings.generation_seconds = state.last - state.first
        timings.cached_tokens = job.cached_tokens
        timings.generated_tokens = len(job.tokens) - job.prompt_tokens
        timings.preemptions = job.preemptions
        self._counts["finished"] += 1
        return Output(job.request_id, ids, logprobs, tops, finish_reason=reason, timings=timings, error=error)

    def _begin_guessing(self, runs: int) -> None:
        self._speculator.begin(runs, lambda guesses: self._times.decode_seconds(runs + guesses))

    def _propose(self, job: Job, limit: int) -> list[int]:
        return self._speculator.propose(job.request_id, job.tokens, limit)

    def _feedback(self, job: Job, proposed: int, accepted: int) -> None:
        self._speculator.feedback(job.request_id, proposed, accepted)
        timings = job.extra.timings
        timings.drafted_tokens += proposed
        timings.accepted_tokens += accepted
        self._counts["drafted_tokens"] += proposed
        self._counts["accepted_tokens"] += accepted

    def _count(self, plan: StepPlan, seconds: float) -> None:
        kind = "decode" if not plan.prompt_tokens else "mixed" if plan.decode_tokens else "prompt"
        self._seconds[kind] += seconds
        self._step_counts[kind] += 1
        self._counts["prompt_tokens"] += plan.prompt_tokens


_NOT_FINITE = (
    "generate: the logits are not finite; the weights overflow in this format or with these activations: "
    "try --activations int16, or another format"
)


def _salt(model: LanguageModel) -> str:
    """Names the model and the format of its keys and values."""
    config = model.config
    return f"{config.family} {config.n_layers} {config.hidden_size} {model.nbytes} {model.context}"


def _speculator(speculation: Any, model: LanguageModel) -> Any:
    if speculation is None:
        return None
    if speculation == "ngram":
        from lowbit.engine.speculation import NgramSpeculator

        return NgramSpeculator()
    if not hasattr(speculation, "propose"):
        raise UnsupportedError(f'engine: speculation={speculation!r}; give None, "ngram" or a Speculator')
    return speculation
