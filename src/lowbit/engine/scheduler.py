"""What each step computes.

One rule: the positions in a job's cache catch up with its tokens. A stream lags by one token (and its
guesses), a prompt by many, a prefix hit by fewer, and a job that was preempted by all it has. A step takes
all streams first, then as many prompt tokens as its time budget allows (Sarathi-Serve, arXiv:2403.02310),
of running and waiting jobs by priority, by what their tenant has used, by arrival. Keys and
values depend on positions only, so no decision made here changes a token.

Pure Python without a clock and without the model: a simulation runs the same class.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from lowbit.engine.budget import StepTimes
from lowbit.engine.fairness import TenantCounters
from lowbit.engine.job import Job, Memory, StepPlan
from lowbit.engine.prefix_cache import PrefixCache

# Jobs passed over in one step because another one is computing their prefix.
MAX_PASSED_OVER = 32
# Guesses of one stream in a step: keys and values of few bits are still kept whole so far back.
MAX_GUESSES = 64


class Scheduler:
    """Decides; whoever runs the plan reports back with `advance` for each run and `observe` for the step.

    guess: (running streams) before each step that has some, then (job, limit) -> guesses.
    """

    def __init__(
        self,
        memory: Memory,
        times: StepTimes,
        max_sequences: int,
        chunk_tokens: int | None = None,
        prefix: PrefixCache | None = None,
        propose: Callable[[Job, int], list[int]] | None = None,
        begin: Callable[[int], None] | None = None,
    ) -> None:
        self.memory = memory
        self.times = times
        self.max_sequences = max_sequences
        self.chunk_tokens = chunk_tokens
        self.prefix = prefix
        self.tenants = TenantCounters()
        self.running: list[Job] = []
        self.preemptions = 0
        self.queued_tokens = 0  # of waiting jobs, still to compute
        self.n_waiting = 0
        self._propose = propose
        self._begin = begin
        self._waiting: dict[str, list[tuple[int, int, Job]]] = {}  # tenant -> heap, best first
        self._arrivals = 0
        self._plan = StepPlan()

    # ---- Coming and going

    def add(self, job: Job) -> None:
        job.arrival = self._arrivals
        self._arrivals += 1
        self.tenants.enter(job.tenant)
        self._queue(job)

    def remove(self, job: Job) -> None:
        """Forget a job in whatever state; its blocks are free or stay in the prefix cache."""
        if job.running:
            self._release(job)
        else:
            self._unqueue(job)
        self.tenants.leave(job.tenant)

    @property
    def idle(self) -> bool:
        return not self.running and not self.n_waiting

    # ---- A step

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to do. Valid until the next call."""
        plan = self._plan
        plan.clear()
        streams = [job for job in self.running if len(job.tokens) - job.computed == 1]
        if streams:
            self._plan_streams(streams, plan)
        left = self.chunk_tokens or self.times.chunk(plan.decode_tokens, self._first_prompt())
        self._plan_prompts(left, plan)
        return plan if plan.jobs else None

    def advance(self, job: Job, computed: int, new_ids: list[int]) -> None:
        """A run is done: `computed` positions of the job's tokens (with new_ids) are in its cache."""
        job.tokens += new_ids
        job.computed = computed
        job.drafts = []
        prompt_tokens = min(computed, job.prompt_tokens) - job.charged
        if prompt_tokens > 0:
            job.charged += prompt_tokens
            self.tenants.charge(job.tenant, prompt_tokens, len(new_ids))
        else:
            self.tenants.charge(job.tenant, 0, len(new_ids))
        if self.prefix is not None and computed >= self.prefix.next_page_end(job):
            self.prefix.register(job, self.memory)

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """The step of `plan` took this long."""
        self.times.observe(plan.decode_tokens + plan.prompt_tokens, seconds, plan.prompt_tokens)

    def preempt(self, job: Job) -> None:
        """Give up the job's keys and values; it waits in its old place and computes them again."""
        self._release(job)
        job.preemptions += 1
        self.preemptions += 1
        self._queue(job)

    # ---- Inside

    def _first_prompt(self) -> int:
        """Tokens that the first prompt in line still has to read; 0 if there is none."""
        reading = [job for job in self.running if job.lag > 1]
        if self.n_waiting:
            reading.append(self._first_waiting())
        return min(reading, key=self._rank).lag if reading else 0

    def _plan_streams(self, streams: list[Job], plan: StepPlan) -> None:
        if self._propose is not None:
            self._guess(streams, self._propose)
        for job in streams:
            need = job.computed + 1 + len(job.drafts)
            if need > job.reserved and job.running and not self.memory.reserve(job, need):
                self._make_room(job)
        for job in streams:
            if job.running:
                count = 1 + len(job.drafts)
                plan.add(job, count, True)
                plan.decode_tokens += count

    def _guess(self, streams: list[Job], propose: Callable[[Job, int], list[int]]) -> None:
        if self._begin is not None:
            self._begin(len(streams))
        for job in streams:
            room = min(job.limit - len(job.tokens) - 1, MAX_GUESSES)
            job.drafts = propose(job, room) if room > 0 else []

    def _make_room(self, job: Job) -> None:
        """Blocks for a stream's next token, without guesses: from idle prefixes, else the last job."""
        job.drafts = []
        while not self.memory.reserve(job, job.computed + 1):
            if self.prefix is not None and self.prefix.evict(1):
                continue
            victim = max(self.running, key=self._rank)
            self.preempt(victim)
            if victim is job:
                return

    def _rank(self, job: Job) -> tuple[int, int, int]:
        """Smaller goes first and is preempted last."""
        return (-job.priority, self.tenants.used(job.tenant), job.arrival)

    def _plan_prompts(self, left: int, plan: StepPlan) -> None:
        """Chunks of `left` tokens in all for running and waiting jobs, best in rank first."""
        prompts = [job for job in self.running if job.lag > 1]
        if len(prompts) > 1:
            prompts.sort(key=self._rank, reverse=True)
        passed_over: list[Job] = []
        may_start = True
        while left > 0:
            waiting = None
            if may_start and self.n_waiting and len(passed_over) < MAX_PASSED_OVER:
                waiting = self._first_waiting()
            if waiting is not None and (not prompts or self._rank(waiting) < self._rank(prompts[-1])):
                if self.prefix is not None and not waiting.scoring and self.prefix.in_flight(waiting):
                    self._unqueue(waiting)
                    passed_over.append(waiting)
                elif self._start(waiting, plan):
                    left -= self._take_chunk(waiting, min(waiting.lag, left), plan)
                else:
                    may_start = False
            elif prompts:
                job = prompts.pop()
                if job.running:  # not preempted just now
                    left -= self._take_chunk(job, min(job.lag, left), plan)
            else:
                break
        for job in passed_over:
            self._queue(job)

    def _take_chunk(self, job: Job, count: int, plan: StepPlan) -> int:
        lag = job.lag
        if job.scoring and count < lag:
            count = max(count, 2)
        plan.add(job, count, count == lag)
        plan.prompt_tokens += count
        return count

    def _start(self, job: Job, plan: StepPlan) -> bool:
        """Begin a waiting job with all blocks that its tokens need, or not at all."""
        while len(self.running) >= self.max_sequences:
            if not self._preempt_for(job, plan):
                return False
        blocks: list[Any] = []
        length = 0
        if self.prefix is not None and not job.scoring:
            blocks, length = self.prefix.match(job, self.memory)
        if not self._find_room(job, length, plan):
            if self.prefix is not None:
                self.prefix.release(job, self.memory)
            if self.running or not length:
                return False
            # Alone and still too little: a block that it would have copied is itself in the way.
            blocks, length = [], 0
            if not self._find_room(job, 0, plan):
                return False
        self._unqueue(job)
        self.memory.open(job)
        if (length and not self.memory.adopt(job, blocks, length)) or not self.memory.reserve(
            job, len(job.tokens)
        ):
            raise AssertionError("the scheduler counted blocks that the pool does not have")
        job.computed = length
        if not job.preemptions:
            job.cached_tokens = job.charged = length
        job.running = True
        self.running.append(job)
        if self.prefix is not None:
            self.prefix.started(job, length)
        return True

    def _find_room(self, job: Job, length: int, plan: StepPlan) -> bool:
        """Free blocks for all the job's tokens, of which `length` are found; one more where streams grow."""
        size = self.memory.block_positions
        need = -(-len(job.tokens) // size) - length // size
        while True:
            missing = need + (1 if self.running else 0) - self.memory.free_blocks
            if missing <= 0:
                return True
            # Nothing is evicted for a job that would not fit all the same.
            if self.prefix is not None and missing <= self.prefix.idle_blocks:
                self.prefix.evict(missing)
            elif not self._preempt_for(job, plan):
                return False

    def _preempt_for(self, job: Job, plan: StepPlan) -> bool:
        """Make way for a job of higher priority."""
        if not self.running:
            return False
        victim = max(self.running, key=self._rank)
        if victim.priority >= job.priority:
            return False
        plan.drop(victim, victim.lag == 1)
        self.preempt(victim)
        return True

    def _release(self, job: Job) -> None:
        self.running.remove(job)
        job.running = False
        if self.prefix is not None:
            self.prefix.release(job, self.memory)
        self.memory.close(job)
        job.computed = 0
        job.drafts = []

    def _queue(self, job: Job) -> None:
        heappush(self._waiting.setdefault(job.tenant, []), (-job.priority, job.arrival, job))
        self.n_waiting += 1
        self.queued_tokens += len(job.tokens)

    def _unqueue(self, job: Job) -> None:
        heap = self._waiting[job.tenant]
        if heap[0][2] is job:
            heappop(heap)
        else:
            heap[:] = sorted(entry for entry in heap if entry[2] is not job)
        if not heap:
            del self._waiting[job.tenant]
        self.n_waiting -= 1
        self.queued_tokens -= len(job.tokens)

    def _first_waiting(self) -> Job:
        heads = (heap[0][2] for heap in self._waiting.values())
        return min(heads, key=self._rank)
