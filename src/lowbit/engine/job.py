"""What the scheduler works on: requests on their way, the memory they take, and the plan of a step."""

from __future__ import annotations

from typing import Any, Protocol

from lowbit.engine.request import Request


class Job:
    """A request on its way: its tokens, how many of them are in its cache, and what it holds."""

    __slots__ = (
        "arrival",
        "cache",
        "cached_tokens",
        "charged",
        "computed",
        "drafts",
        "extra",
        "limit",
        "mask",
        "nodes",
        "pages",
        "preemptions",
        "priority",
        "prompt_tokens",
        "registered_pages",
        "request",
        "request_id",
        "reserved",
        "running",
        "scoring",
        "tenant",
        "tokens",
    )

    def __init__(self, request: Request, limit: int) -> None:
        """limit: tokens of prompt and answer at most."""
        self.request = request
        self.request_id = request.request_id
        self.tenant = request.tenant
        self.priority = request.priority
        self.tokens = list(request.prompt_ids)
        self.prompt_tokens = len(self.tokens)
        self.limit = limit
        self.arrival = 0
        self.running = False
        self.computed = 0  # tokens in the cache
        self.reserved = 0  # positions that the cache has blocks for
        self.cache: Any = None
        self.drafts: list[int] = []  # guesses for the step at hand
        self.mask: Any = None  # what the constraint allows in the step at hand
        # Wants the score of each prompt token: computes all of them, and chunks overlap by one position,
        # since a token is scored where the one before it is fed.
        self.scoring = request.echo_scores is not None
        self.pages: list[bytes] = []  # chained hashes of whole pages
        self.nodes: list[Any] = []  # of the prefix cache, held while running
        self.registered_pages = 0  # of `pages`, known to the prefix cache
        self.cached_tokens = 0
        self.charged = 0  # prompt tokens that the tenant has paid for
        self.preemptions = 0
        self.extra: Any = None  # the owner's

    @property
    def lag(self) -> int:
        return len(self.tokens) - self.computed


class Memory(Protocol):
    """Blocks of keys and values. A job's `cache` and `reserved` are this object's to set."""

    blocks: int
    block_positions: int

    @property
    def free_blocks(self) -> int: ...
    def open(self, job: Job) -> None: ...
    def reserve(self, job: Job, length: int) -> bool: ...
    def adopt(self, job: Job, blocks: list[Any], length: int) -> bool: ...
    def held(self, job: Job) -> list[Any]: ...
    def close(self, job: Job) -> None: ...


class StepPlan:
    """The runs of a step, side by side. Reused from step to step.

    counts: tokens to feed, guesses included; samples: whether a token is sampled after them.
    """

    __slots__ = ("counts", "decode_tokens", "jobs", "prompt_tokens", "samples")

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.counts: list[int] = []
        self.samples: list[bool] = []
        self.decode_tokens = 0
        self.prompt_tokens = 0

    def clear(self) -> None:
        self.jobs.clear()
        self.counts.clear()
        self.samples.clear()
        self.decode_tokens = self.prompt_tokens = 0

    def add(self, job: Job, count: int, samples: bool) -> None:
        self.jobs.append(job)
        self.counts.append(count)
        self.samples.append(samples)

    def drop(self, job: Job, stream: bool) -> None:
        """Take a job's run out again, if there is one."""
        if job not in self.jobs:
            return
        i = self.jobs.index(job)
        if stream:
            self.decode_tokens -= self.counts[i]
        else:
            self.prompt_tokens -= self.counts[i]
        del self.jobs[i], self.counts[i], self.samples[i]
