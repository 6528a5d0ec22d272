"""Machines that serve a load, under a clock of events: the engine's own scheduler, a cost model for the rest.

Each machine is a Scheduler with counted blocks of keys and values; a step takes as long as `cost` says, then
its tokens come out. A cluster is made of machines that do everything, or of some that read prompts and some
that generate (DistServe, arXiv:2401.09670; Splitwise, arXiv:2311.18677): then a prompt's keys and values
travel over a link between its first token and its second.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lowbit.engine.budget import StepTimes
from lowbit.engine.job import Job, StepPlan
from lowbit.engine.prefix_cache import PrefixCache
from lowbit.engine.request import Request as EngineRequest
from lowbit.engine.scheduler import Scheduler
from lowbit.errors import RequestError
from lowbit.plan.block_memory import BLOCK_POSITIONS, BlockMemory
from lowbit.plan.trace import BLOCK_TOKENS, Request

# (prompt chunks as (tokens, positions before them, is the last one of its prompt), contexts of streams) -> s
Cost = Callable[[Sequence[tuple[int, int, bool]], Sequence[int]], float]

WHOLE, PROMPTS, ANSWERS = "whole", "prompts", "answers"


@dataclass(frozen=True)
class MachineSpec:
    """Limits of one machine, as EngineConfig has them. kv_blocks: of 256 positions."""

    cost: Cost
    kv_blocks: int
    max_sequences: int = 64
    chunk_tokens: int | None = None
    target_seconds_between_tokens: float | None = None
    prefix_cache: bool = True


@dataclass(frozen=True)
class Link:
    """Between machines for prompts and for answers. kv_bytes: of keys and values per position."""

    bytes_per_second: float
    kv_bytes: float
    seconds: float = 0.0  # before the first byte

    def transfer(self, positions: int) -> float:
        return self.seconds + positions * self.kv_bytes / self.bytes_per_second


@dataclass
class Outcome:
    """What a request met. Times are seconds on the cluster's clock; token_seconds: when each token came."""

    request: Request
    token_seconds: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    preemptions: int = 0

    @property
    def first_token_seconds(self) -> float:
        return self.token_seconds[0] - self.request.at_seconds

    @property
    def time_per_token_seconds(self) -> float:
        """Between tokens after the first, on average; 0 of an answer of one token."""
        gaps = len(self.token_seconds) - 1
        return (self.token_seconds[-1] - self.token_seconds[0]) / gaps if gaps else 0.0

    @property
    def longest_gap_seconds(self) -> float:
        return max((b - a for a, b in zip(self.token_seconds, self.token_seconds[1:])), default=0.0)


@dataclass(frozen=True)
class Step:
    """One step of a machine: when it began, how long it took, of what."""

    machine: int
    began: float
    seconds: float
    prompt_tokens: int
    streams: int


class Machine:
    """One engine. `role`: WHOLE, PROMPTS (ends a request at its first token) or ANSWERS."""

    def __init__(self, spec: MachineSpec, role: str, number: int) -> None:
        self.spec, self.role, self.number = spec, role, number
        self.memory = BlockMemory(spec.kv_blocks)
        shared = spec.prefix_cache and role != ANSWERS
        self.scheduler = Scheduler(
            self.memory,
            StepTimes(spec.target_seconds_between_tokens),
            spec.max_sequences,
            # Keys and values of a prompt arrive here whole, so that nothing is left to be read in parts.
            chunk_tokens=1 << 30 if role == ANSWERS else spec.chunk_tokens,
            prefix=PrefixCache("", BLOCK_POSITIONS) if shared else None,
        )
        self.plan: StepPlan | None = None  # of the step that is running
        self.load = 0  # tokens still to be computed, for whoever chooses a machine

    def add(self, job: Job) -> None:
        self.load += job.limit
        self.scheduler.add(job)

    def begin(self) -> float | None:
        """Start the next step; the seconds it takes, None if there is nothing to do."""
        self.plan = self.scheduler.schedule()
        if self.plan is None:
            return None
        prompts, contexts = [], []
        for job, count, samples in zip(self.plan.jobs, self.plan.counts, self.plan.samples):
            moved = self.role == ANSWERS and not job.preemptions  # its keys and values came over the link
            if count == 1 or moved:
                contexts.append(job.computed + count - 1)
            else:
                prompts.append((count, job.computed, samples))
        return self.spec.cost(prompts, contexts)

    def end(self, seconds: float) -> list[Job]:
        """The step is over: the jobs that have gained a token."""
        plan = self.plan
        assert plan is not None
        self.scheduler.observe(plan, seconds)
        gained = []
        for job, count, samples in [*zip(plan.jobs, plan.counts, plan.samples)]:
            self.scheduler.advance(job, job.computed + count, [len(job.tokens)] if samples else [])
            if samples:
                gained.append(job)
        self.plan = None
        return gained

    def finish(self, job: Job) -> None:
        self.load -= job.limit
        self.scheduler.remove(job)


class Cluster:
    """Runs a load. machines: those of each role in order."""

    def __init__(
        self,
        machines: Sequence[tuple[str, MachineSpec]],
        link: Link | None = None,
    ) -> None:
        roles = {role for role, _ in machines}
        if roles not in ({WHOLE}, {PROMPTS, ANSWERS}):
            raise RequestError(
                f"simulate: roles {', '.join(sorted(roles)) or 'none'}; a cluster has machines that do all, "
                "or some for prompts and some for answers"
            )
        if PROMPTS in roles and link is None:
            raise RequestError("simulate: machines for prompts and answers need a link between them")
        self.machines = [Machine(spec, role, i) for i, (role, spec) in enumerate(machines)]
        self._link = link
        self._entrance = [m for m in self.machines if m.role != ANSWERS]
        self._exit = [m for m in self.machines if m.role == ANSWERS]
        self.steps: list[Step] = []

    def run(self, requests: Sequence[Request]) -> list[Outcome]:
        """Serve all requests; their outcomes in the order of arrival.

        Raises RequestError for a request that no machine has the memory for.
        """
        ordered = sorted(requests, key=lambda request: request.at_seconds)
        self._check(ordered)
        outcomes = [Outcome(request) for request in ordered]
        count = itertools.count()
        events: list[tuple[float, int, str, object]] = [
            (request.at_seconds, next(count), "arrival", i) for i, request in enumerate(ordered)
        ]
        heapq.heapify(events)

        def start(machine: Machine, now: float) -> None:
            seconds = machine.begin() if machine.plan is None else None
            if seconds is not None:
                heapq.heappush(events, (now + seconds, next(count), "step", (machine, seconds)))

        while events:
            now, _, kind, what = heapq.heappop(events)
            if kind == "arrival":
                assert isinstance(what, int)
                machine = min(self._entrance, key=lambda m: (m.load, m.number))
                machine.add(_job(what, ordered[what], machine.role))
                start(machine, now)
            elif kind == "transfer":
                assert isinstance(what, Job)
                machine = min(self._exit, key=lambda m: (m.load, m.number))
                machine.add(what)
                start(machine, now)
            else:
                assert isinstance(what, tuple)
                machine, seconds = what
                self._note(machine, now - seconds, seconds)
                for job in machine.end(seconds):
                    index = int(job.request_id)
                    outcomes[index].token_seconds.append(now)
                    if len(job.tokens) < job.limit:
                        continue
                    outcomes[index].cached_tokens += job.cached_tokens
                    outcomes[index].preemptions += job.preemptions
                    machine.finish(job)
                    if machine.role == PROMPTS and ordered[index].answer_tokens > 1:
                        assert self._link is not None
                        moved = _moved(index, ordered[index])
                        later = now + self._link.transfer(len(moved.tokens) - 1)
                        heapq.heappush(events, (later, next(count), "transfer", moved))
                start(machine, now)
        return outcomes

    def _check(self, requests: Sequence[Request]) -> None:
        room = min(machine.memory.blocks for machine in self.machines) * BLOCK_POSITIONS
        for request in requests:
            if request.prompt_tokens + request.answer_tokens > room:
                raise RequestError(
                    f"simulate: a request of {request.prompt_tokens} + {request.answer_tokens} tokens; a "
                    f"machine holds keys and values of {room}; give it more memory, or leave long ones out"
                )

    def _note(self, machine: Machine, began: float, seconds: float) -> None:
        plan = machine.plan
        assert plan is not None
        read = 0 if machine.role == ANSWERS else plan.prompt_tokens
        streams = len(plan.jobs) if machine.role == ANSWERS else plan.decode_tokens
        self.steps.append(Step(machine.number, began, seconds, read, streams))


def _job(index: int, request: Request, role: str) -> Job:
    answer = 1 if role == PROMPTS else request.answer_tokens
    return Job(EngineRequest(_tokens(index, request), request_id=str(index)), request.prompt_tokens + answer)


def _moved(index: int, request: Request) -> Job:
    """The request behind its first token."""
    tokens = [*_tokens(index, request), 0]
    return Job(EngineRequest(tokens, request_id=str(index)), request.prompt_tokens + request.answer_tokens)


def _tokens(index: int, request: Request) -> list[int]:
    """Numbers that stand for the prompt's tokens: equal where two requests name the same block, else not."""
    tokens: list[int] = []
    for block in request.blocks:
        tokens += range((block % (1 << 21)) * BLOCK_TOKENS, (block % (1 << 21) + 1) * BLOCK_TOKENS)
    own = -((index + 1) % (1 << 30))
    return (tokens + [own] * max(0, request.prompt_tokens - len(tokens)))[: request.prompt_tokens]
