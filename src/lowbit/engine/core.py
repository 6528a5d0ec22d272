"""The engine: requests in, tokens out, all of them in one native call per step.

Tokens are a function of prompt, parameters and model. What else happens in the engine (companions, chunks,
prefix hits, guesses, preemption) changes when they come and never which.
"""

from __future__ import annotations

import time
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
from lowbit.engine.statistics import Statistics
from lowbit.errors import BusyError, RequestError, UnsupportedError


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
        self._prefix = None
        if self.config.prefix_cache:
            self._prefix = PrefixCache(_salt(model), self._memory.block_positions)
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
        self._constrained = 0  # requests with a constraint
        self._statistics = Statistics()

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
        job.extra = self._state(parameters, prompt, request)
        waiting = self._scheduler.queued_tokens
        if waiting and waiting + len(prompt) > self.config.max_queued_tokens:
            seconds = waiting * self._times.prompt_token_seconds
            raise BusyError(
                f"generate: {waiting} tokens are waiting and {len(prompt)} more exceed "
                f"max_queued_tokens={self.config.max_queued_tokens}; try again in {seconds:.1f} seconds",
                max(seconds, 0.1),
            )
        self._constrained += request.constraint is not None
        self._jobs[request.request_id] = job
        self._scheduler.add(job)

    def cancel(self, request_id: str, reason: str = "cancelled") -> bool:
        """End a request wherever it is: its memory is free at once, its last output comes with the next step.

        reason: "stop" when its text has reached a stop string. False if there is no such request (any more).
        """
        job = self._jobs.get(request_id)
        if job is None:
            return False
        self._ended.append(self._finish(job, Output(request_id, [], [], []), reason))
        return True

    def progress(self, request_id: str) -> int | None:
        """Prompt tokens that are read; None once all are, or if there is no such request."""
        job = self._jobs.get(request_id)
        return None if job is None or job.computed >= job.prompt_tokens else job.computed

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return self._scheduler.idle and not self._ended

    # ---- A step

    def step(self) -> list[Output]:
        """Compute one step and return what it added, one Output per request that got tokens or ended."""
        outputs, self._ended = self._ended, []
        before = self._clock()
        plan = self._scheduler.schedule()
        if plan is None:
            return outputs
        if self._constrained:
            outputs += self._ask_constraints(plan)
            if not plan.jobs:
                return outputs
        started = self._clock()  # guessing takes time of its own, which the speculator knows
        runs = self._run(plan, before)
        now = self._clock()
        self._scheduler.observe(plan, now - started)
        generated = 0
        for i, job in enumerate(plan.jobs):
            output = self._commit(job, plan.counts[i], plan.samples[i], runs[i], now)
            if output is not None:
                generated += len(output.ids)
                outputs.append(output)
        self._statistics.step(plan, generated, now - before, now)
        if self.config.preempt_every:
            self._preempt_one(plan)
        return outputs

    def stats(self) -> dict[str, Any]:
        """Gauges and counters, cheap enough for every second.

        running, waiting (requests), queued_tokens; kv_blocks_total, kv_blocks_used (by running requests and
        the prefix cache), kv_blocks_cached (by the prefix cache alone), kv_tokens_total; prefix_hit_tokens,
        prefix_asked_tokens; drafted_tokens, accepted_tokens; preemptions; requests_finished, prompt_tokens,
        generated_tokens; tokens_per_second over the last seconds; step_seconds and steps by kind ("decode",
        "prompt", "mixed").
        """
        scheduler, memory, prefix = self._scheduler, self._memory, self._prefix
        return {
            "running": len(scheduler.running),
            "waiting": scheduler.n_waiting,
            "queued_tokens": scheduler.queued_tokens,
            "kv_blocks_total": memory.blocks,
            "kv_blocks_used": memory.blocks - memory.free_blocks,
            "kv_blocks_cached": prefix.idle_blocks if prefix else 0,
            "kv_tokens_total": memory.blocks * memory.block_positions,
            "prefix_hit_tokens": prefix.hit_tokens if prefix else 0,
            "prefix_asked_tokens": prefix.asked_tokens if prefix else 0,
            "preemptions": scheduler.preemptions,
            **self._statistics.read(self._clock()),
        }

    # ---- Inside

    def _preempt_one(self, plan: StepPlan) -> None:
        """For tests: now and then one that has just gained a token loses its keys and values."""
        self._steps += 1
        gained = [job for job, samples in zip(plan.jobs, plan.samples) if samples and job.running]
        if gained and self._steps % self.config.preempt_every == 0:
            self._scheduler.preempt(gained[self._steps // self.config.preempt_every % len(gained)])

    def _state(self, parameters: SamplingParameters, prompt: list[int], request: Request) -> _State:
        eos = frozenset() if parameters.ignore_eos else self.model.eos_ids
        try:
            # Where a constraint allows nothing but the end, min_tokens cannot hold it back.
            sampler = new_sampler(parameters, () if request.constraint else eos)
        except ValueError as error:
            raise RequestError(f"generate: {error}") from error
        sampler.observe(np.asarray(prompt, dtype=np.int32))
        state = _State(sampler, eos, Timings(prompt_tokens=len(prompt)), self._clock())
        if request.echo_scores is not None:
            state.scores, state.score_tops = [], []
        return state

    def _ask_constraints(self, plan: StepPlan) -> list[Output]:
        """Masks for the runs that sample; a constraint that cannot go on ends its request."""
        ended = []
        for job, samples in [*zip(plan.jobs, plan.samples)]:
            constraint = job.request.constraint
            if constraint is None or not samples:
                continue
            try:
                # Those of runs with guesses are there already.
                job.mask = job.mask if job.drafts else constraint.mask()
            except RequestError as error:
                plan.drop(job, job.lag == 1)
                ended.append(self._finish(job, Output(job.request_id, [], [], []), "error", str(error)))
        return ended

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
            if job.mask is not None:
                masks = masks or [None] * len(plan.jobs)
                masks[i] = job.mask
            if job.request.echo_scores is not None and job.scoring:
                scores = scores or [-1] * len(plan.jobs)
                scores[i] = job.request.echo_scores
        return self._decoder.step(
            np.array(tokens, dtype=np.int32), caches, plan.counts, samplers, drafts, masks, scores
        )

    def _commit(self, job: Job, count: int, samples: bool, run: Any, now: float) -> Output | None:
        """Take the results of one run in; an Output if there is something to tell."""
        if run.failed:
            text = _NOT_FINITE if job.mask is None else _NOTHING_ALLOWED
            return self._finish(job, Output(job.request_id, [], [], []), "error", text)
        state = job.extra
        prompt_scores = None
        if job.scoring:
            prompt_scores = self._score(job, run, samples)
            if not samples:
                # The last token goes in again, to score the one that follows it.
                count -= 1
                self._memory.cut(job, job.computed + count)
        if not samples:
            self._scheduler.advance(job, job.computed + count, [])
            return None
        ids, guesses = run.ids, len(job.drafts)
        if guesses:
            self._feedback(job, guesses, len(ids) - 1)
        computed = job.computed + count - guesses + len(ids) - 1
        reason, kept, error = self._end(job, ids)
        self._scheduler.advance(job, computed, ids if reason is None else ids[:kept])
        state.last = now
        if not state.first:
            state.first = now
        output = Output(job.request_id, ids, run.logprobs, run.tops, prompt_scores)
        if reason is not None:
            del output.ids[kept:], output.logprobs[kept:], output.tops[kept:]
            self._finish(job, output, reason, error)
        return output

    def _end(self, job: Job, ids: list[int]) -> tuple[str | None, int, str | None]:
        """(finish reason if the request ends within `ids`, how many of them stay, error text)."""
        eos, constraint = job.extra.eos, job.request.constraint
        room = job.limit - len(job.tokens)
        for i, token in enumerate(ids):
            if token in eos:
                return "eos", i, None
            if constraint is not None:
                try:
                    constraint.accept(token)
                except RequestError as error:
                    return "error", i, str(error)
            if i + 1 == room:
                asked = job.request.parameters.max_tokens
                return ("length" if job.limit - job.prompt_tokens == asked else "context"), i + 1, None
            if constraint is not None and constraint.finished:
                return "stop", i + 1, None
        return None, len(ids), None

    def _score(self, job: Job, run: Any, complete: bool) -> PromptScores | None:
        state = job.extra
        if job.computed == 0:  # the first chunk, or again the first after a preemption
            state.scores, state.score_tops = [], []
        state.scores.append(np.asarray(run.scores, dtype=np.float32))
        state.score_tops += run.score_tops or [[] for _ in run.scores]
        if not complete:
            return None
        job.scoring = False
        return PromptScores(np.concatenate(state.scores), state.score_tops)

    def _finish(self, job: Job, output: Output, reason: str, error: str | None = None) -> Output:
        """Forget the request and complete its last output."""
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
        self._statistics.requests_finished += 1
        self._constrained -= job.request.constraint is not None
        output.finish_reason, output.timings, output.error = reason, timings, error
        return output

    def _begin_guessing(self, runs: int) -> None:
        self._speculator.begin(runs, lambda guesses: self._times.seconds(runs + guesses))

    def _propose(self, job: Job, limit: int) -> list[int]:
        constraint: Any = job.request.constraint
        if constraint is None:
            return self._speculator.propose(job.request_id, job.tokens, limit)
        if not hasattr(constraint, "masks"):
            return []
        guesses = constraint.forced(limit) or self._speculator.propose(job.request_id, job.tokens, limit)
        try:
            job.mask, count = constraint.masks(guesses)
        except RequestError:
            return []  # mask() will say so again
        return guesses[:count]

    def _feedback(self, job: Job, proposed: int, accepted: int) -> None:
        self._speculator.feedback(job.request_id, proposed, accepted)
        timings = job.extra.timings
        timings.drafted_tokens += proposed
        timings.accepted_tokens += accepted
        self._statistics.guesses(proposed, accepted)


_NOTHING_ALLOWED = (
    "generate: no token is left that the grammar allows, or the logits are not finite; loosen the grammar, "
    "or drop the logit_bias and penalties that exclude its tokens"
)
_NOT_FINITE = (
    "generate: the logits are not finite; the weights overflow in this format or with these activations: "
    "try --activations int16, or another format"
)


def _salt(model: LanguageModel) -> str:
    """Names the model and the format of its keys and values."""
    c = model.config
    return f"{c.family} {c.n_layers} {c.hidden_size} {model.nbytes} {model.context} kv{model.model.kv_bits}"


def _speculator(speculation: Any, model: LanguageModel) -> Any:
    if speculation is None:
        return None
    if speculation == "ngram":
        from lowbit.engine.speculation import NgramSpeculator

        return NgramSpeculator()
    if not hasattr(speculation, "propose"):
        raise UnsupportedError(f'engine: speculation={speculation!r}; give None, "ngram" or a Speculator')
    return speculation
