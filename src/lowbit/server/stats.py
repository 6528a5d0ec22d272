"""What the server knows about itself: the fields of `GET /stats`, and the counters behind them.

The API process counts requests and times in a `Counters`; each engine process sends what
`EngineCore.stats()` says. `build` joins them into one JSON object, `Stats`: the page draws it, and
`metrics.render` turns the same object into Prometheus text. Nothing is counted twice.
Counts grow from the start of the process that counts: those of an engine start again when it does.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypedDict

# Upper bounds of the buckets. Seconds: 1 ms to 1 min, about 2.2x apart. Tokens: powers of two.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKENS = tuple(float(1 << i) for i in range(18))


class EngineStats(TypedDict):
    """What `EngineCore.stats()` says: gauges, then counts since the engine started.

    Steps are counted by kind: "prompt" (only reads prompts), "decode" (only generates), "mixed".
    """

    running: int  # requests in the batch
    waiting: int  # requests admitted, not yet in it
    queued_tokens: int  # prompt tokens that these still have to read
    kv_blocks_total: int
    kv_blocks_used: int  # blocks that running requests or the prefix cache hold
    kv_blocks_cached: int  # of these, blocks that only the prefix cache holds: free on demand
    kv_tokens_total: int  # positions of all blocks
    tokens_per_second: float  # generated, over the last seconds
    prompt_tokens: int  # computed: without those that the prefix cache spared
    prefix_asked_tokens: int  # tokens of started requests, which the prefix cache might have had
    prefix_hit_tokens: int  # those that it had
    generated_tokens: int
    drafted_tokens: int  # tokens that speculation proposed
    accepted_tokens: int  # and that the model agreed with
    preemptions: int
    requests_finished: int
    steps: dict[str, int]
    step_seconds: dict[str, float]


class ModelDescription(TypedDict):
    """What a model is: fixed from the moment it is loaded."""

    id: str
    format: str  # scheme, such as "int4-g32"
    bits_per_weight: float  # true bits: scales and tables count
    weights_bytes: int
    kv_bits: int
    context: int  # tokens
    chat: bool  # has a chat template


class HistogramStats(TypedDict):
    """A distribution. buckets: [upper bound, how many are <= it]; `count` has those above too."""

    count: int
    sum: float
    p50: float
    p95: float
    p99: float
    buckets: list[tuple[float, int]]


class ModelStats(ModelDescription):
    """A model, the engine that runs it (None while that one is down), and what its users saw."""

    restarts: int  # of the engine process
    engine: EngineStats | None
    finished: dict[str, int]  # requests by the reason that ended them
    queue_seconds: HistogramStats  # from arrival to the first step of the request
    first_token_seconds: HistogramStats  # from arrival
    between_tokens_seconds: HistogramStats
    request_seconds: HistogramStats
    request_prompt_tokens: HistogramStats
    request_generated_tokens: HistogramStats


class RequestCount(TypedDict):
    """How many answers an endpoint gave with a status."""

    endpoint: str
    status: int
    count: int


class Stats(TypedDict):
    """The body of `GET /stats`."""

    version: str
    started_unix_seconds: float
    uptime_seconds: float
    draining: bool
    in_flight: int  # HTTP requests that are being answered
    requests: list[RequestCount]
    models: list[ModelStats]


class Histogram:
    """Counts of values by size; `observe` costs about half a microsecond."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def quantile(self, q: float) -> float:
        """The value that a share `q` of all lies below, linear within its bucket; 0 of none.

        Beyond the last bound it is that bound: an underestimate, as in Prometheus.
        """
        rank, below, low = q * sum(self.counts), 0, 0.0
        for bound, count in zip(self.bounds, self.counts):
            if count and below + count >= rank:
                return low + (bound - low) * max(rank - below, 0.0) / count
            below, low = below + count, bound
        return self.bounds[-1] if below < sum(self.counts) else 0.0

    def stats(self) -> HistogramStats:
        buckets, total = [], 0
        for bound, count in zip(self.bounds, self.counts):
            total += count
            buckets.append((bound, total))
        return HistogramStats(
            count=total + self.counts[-1],
            sum=self.sum,
            p50=self.quantile(0.5),
            p95=self.quantile(0.95),
            p99=self.quantile(0.99),
            buckets=buckets,
        )


class ModelCounters:
    """What the API process counts for one model."""

    def __init__(self) -> None:
        self.restarts = 0
        self.finished: Counter[str] = Counter()
        self.queue_seconds = Histogram(SECONDS)
        self.first_token_seconds = Histogram(SECONDS)
        self.between_tokens_seconds = Histogram(SECONDS)
        self.request_seconds = Histogram(SECONDS)
        self.request_prompt_tokens = Histogram(TOKENS)
        self.request_generated_tokens = Histogram(TOKENS)

    def tokens(self, seconds: float, count: int = 1) -> None:
        """`count` tokens came together, `seconds` after the last ones: each took its share."""
        self.between_tokens_seconds.observe(seconds / count, count)

    def finish(self, reason: str, seconds: float, prompt_tokens: int, generated_tokens: int) -> None:
        """A request ended, `seconds` after it arrived."""
        self.finished[reason] += 1
        self.request_seconds.observe(seconds)
        self.request_prompt_tokens.observe(prompt_tokens)
        self.request_generated_tokens.observe(generated_tokens)


class Counters:
    """What the API process counts; one of it for the whole server."""

    def __init__(self, models: Iterable[str]):
        self.started = time.time()
        self._clock = time.monotonic()
        self.in_flight = 0
        self.requests: Counter[tuple[str, int]] = Counter()
        self.models = {name: ModelCounters() for name in models}

    def answered(self, endpoint: str, status: int) -> None:
        """`endpoint` must be the route (`/v1/models/{id}`), never a path that a client made up."""
        self.requests[endpoint, status] += 1

    def uptime(self) -> float:
        return time.monotonic() - self._clock


def build(
    counters: Counters,
    models: Iterable[ModelDescription],
    engines: Mapping[str, EngineStats | None],
    *,
    version: str,
    draining: bool = False,
) -> Stats:
    """Join the counters with what every engine said last; None or absent: the engine is down.

    Every model must be named in `counters`.
    """
    return Stats(
        version=version,
        started_unix_seconds=counters.started,
        uptime_seconds=counters.uptime(),
        draining=draining,
        in_flight=counters.in_flight,
        requests=[
            RequestCount(endpoint=endpoint, status=status, count=count)
            for (endpoint, status), count in sorted(counters.requests.items())
        ],
        models=[_model(counters, model, engines.get(model["id"])) for model in models],
    )


def _model(counters: Counters, model: ModelDescription, engine: EngineStats | None) -> ModelStats:
    seen = counters.models[model["id"]]
    return ModelStats(
        **model,
        restarts=seen.restarts,
        engine=engine,
        finished=dict(seen.finished),
        queue_seconds=seen.queue_seconds.stats(),
        first_token_seconds=seen.first_token_seconds.stats(),
        between_tokens_seconds=seen.between_tokens_seconds.stats(),
        request_seconds=seen.request_seconds.stats(),
        request_prompt_tokens=seen.request_prompt_tokens.stats(),
        request_generated_tokens=seen.request_generated_tokens.stats(),
    )
