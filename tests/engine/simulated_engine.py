"""The scheduler without a model: blocks are counted, and a token is a function of those before it."""

from collections import Counter

from lowbit.engine.budget import StepTimes
from lowbit.engine.job import Job
from lowbit.engine.parameters import SamplingParameters
from lowbit.engine.prefix_cache import PrefixCache
from lowbit.engine.request import Request
from lowbit.engine.scheduler import Scheduler

BLOCK = 256


class Handle:
    """Holds one block for as long as it lives."""

    def __init__(self, memory, block):
        self.memory, self.block = memory, block
        memory.holders[block] += 1

    def __del__(self):
        self.memory.drop(self.block)


class SimulatedMemory:
    """What PoolMemory is, with lists of tokens for keys and values. Asserts what native code would refuse."""

    block_positions = BLOCK

    def __init__(self, blocks):
        self.blocks = blocks
        self.holders = Counter()
        self.content = {}
        self._free = list(range(blocks))

    @property
    def free_blocks(self):
        return len(self._free)

    def drop(self, block):
        self.holders[block] -= 1
        assert self.holders[block] >= 0
        if self.holders[block] == 0:
            self._free.append(block)

    def _take(self):
        block = self._free.pop()
        self.holders[block] += 1
        self.content[block] = []
        return block

    def open(self, job):
        assert job.cache is None
        job.cache, job.reserved = [], 0

    def reserve(self, job, length):
        more = -(-length // BLOCK) - len(job.cache)
        if more > self.free_blocks:
            return False
        job.cache += [self._take() for _ in range(more)]
        job.reserved = len(job.cache) * BLOCK
        return True

    def adopt(self, job, blocks, length):
        assert not job.cache and len(blocks) == -(-length // BLOCK)
        whole = length // BLOCK
        if length % BLOCK:
            if not self._free:
                return False
            copy = self._take()
            self.content[copy] = self.content[blocks[whole].block][: length % BLOCK]
        for handle in blocks[:whole]:
            self.holders[handle.block] += 1
            job.cache.append(handle.block)
        if length % BLOCK:
            job.cache.append(copy)
        assert self.read(job)[:length] == job.tokens[:length], "adopted what other tokens left"
        return True

    def held(self, job):
        return [Handle(self, block) for block in job.cache[: -(-job.computed // BLOCK)]]

    def close(self, job):
        for block in job.cache:
            self.drop(block)
        job.cache, job.reserved = None, 0

    def write(self, job, position, tokens):
        for i, token in enumerate(tokens, position):
            block = job.cache[i // BLOCK]
            assert self.holders[block] == 1, "written a block that others hold"
            content = self.content[block]
            assert len(content) >= i % BLOCK, "left positions out"
            content[i % BLOCK :] = [token]

    def read(self, job):
        return [token for block in job.cache for token in self.content[block]]


class Simulation:
    """A scheduler and the world around it."""

    def __init__(self, blocks, max_sequences=4, chunk=None, prefix=True, draft=None):
        self.memory = SimulatedMemory(blocks)
        self.prefix = PrefixCache("simulated", BLOCK) if prefix else None
        self.scheduler = Scheduler(
            self.memory,
            StepTimes(),
            max_sequences,
            chunk_tokens=chunk,
            prefix=self.prefix,
            propose=draft and (lambda job, limit: draft(job)[:limit]),
        )
        self.jobs = {}
        self.done = {}
        self.order = []

    def add(self, name, prompt, new=8, tenant="", priority=0):
        request = Request(prompt, SamplingParameters(), tenant=tenant, priority=priority, request_id=name)
        job = Job(request, len(prompt) + new)
        self.jobs[name] = job
        self.scheduler.add(job)
        return job

    def cancel(self, name):
        if name in self.jobs:
            self.scheduler.remove(self.jobs.pop(name))

    def step(self):
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        assert len({job.request_id for job in plan.jobs}) == len(plan.jobs)
        assert plan.decode_tokens + plan.prompt_tokens == sum(plan.counts)
        for job, count, samples in [*zip(plan.jobs, plan.counts, plan.samples)]:
            known = job.tokens[job.computed : job.computed + count - len(job.drafts)]
            assert len(known) == count - len(job.drafts) > 0 and job.running
            assert samples == (job.computed + len(known) == len(job.tokens))
            self.memory.write(job, job.computed, known + job.drafts)
            ids = sampled(job.tokens, job.drafts) if samples else []
            computed = job.computed + count - len(job.drafts) + max(len(ids) - 1, 0)
            self.scheduler.advance(job, computed, ids)
            assert len(job.tokens) <= job.limit
            if len(job.tokens) == job.limit:
                self.done[job.request_id] = job.tokens[job.prompt_tokens :]
                self.order.append(job.request_id)
                self.cancel(job.request_id)
        self.scheduler.observe(plan, 1e-3 * sum(plan.counts))
        return plan


def next_token(tokens):
    """Depends on all of them, and repeats itself often enough to be guessed."""
    return (sum(tokens[-3:]) * 7 + len(tokens) // 5) % 50


def sampled(tokens, drafts):
    """Plain decoding, as far as the guesses hold and one further."""
    ids = []
    for guess in [*drafts, None]:
        ids.append(next_token(tokens + ids))
        if ids[-1] != guess:
            break
    return ids


def alone(prompt, new):
    tokens = list(prompt)
    for _ in range(new):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]
