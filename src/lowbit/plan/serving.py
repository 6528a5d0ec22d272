"""What a simulated load says: latencies, goodput, the best chunk, the best split of machines, power.

Goodput is the largest rate of requests at which a share of them (90% unless told otherwise) meets both
limits, time to first token and time per token (DistServe, arXiv:2401.09670, section 2). The rate of a trace
is changed by playing it faster or slower, so that its bursts stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lowbit.errors import RequestError
from lowbit.plan.cluster import ANSWERS, PROMPTS, WHOLE, Cluster, Link, MachineSpec, Outcome, Step
from lowbit.plan.trace import Request

SEARCH_STEPS = 7  # of the goodput's bisection: within 1% of a factor of two
MAXIMUM_SPEED = 1e6
CHUNKS = (None, 64, 128, 256, 512, 1024, 2048)  # prompt tokens of a step; None: as the engine fits them


@dataclass(frozen=True)
class Limits:
    """What users accept; None: anything. share: of the requests that must meet both."""

    first_token_seconds: float | None = None
    time_per_token_seconds: float | None = None
    share: float = 0.9

    def met(self, outcome: Outcome) -> bool:
        first, each = self.first_token_seconds, self.time_per_token_seconds
        return (first is None or outcome.first_token_seconds <= first) and (
            each is None or outcome.time_per_token_seconds <= each
        )


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share q is not above; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else 0.0


def summary(
    outcomes: Sequence[Outcome], steps: Sequence[Step], machines: int, limits: Limits
) -> dict[str, Any]:
    """Figures of one run. Keys end in their units; `met` is the share of requests within the limits."""
    begin = min(outcome.request.at_seconds for outcome in outcomes)
    end = max(outcome.token_seconds[-1] for outcome in outcomes)
    span = max(end - begin, 1e-9)
    tokens = sum(len(outcome.token_seconds) for outcome in outcomes)
    first = [outcome.first_token_seconds for outcome in outcomes]
    each = [outcome.time_per_token_seconds for outcome in outcomes if len(outcome.token_seconds) > 1]
    gaps = [outcome.longest_gap_seconds for outcome in outcomes if len(outcome.token_seconds) > 1]
    return {
        "requests": len(outcomes),
        "requests_per_second": len(outcomes) / span,
        "tokens_per_second": tokens / span,
        "met": sum(map(limits.met, outcomes)) / len(outcomes),
        **{f"first_token_seconds_p{p}": quantile(first, p / 100) for p in (50, 95, 99)},
        **{f"time_per_token_seconds_p{p}": quantile(each, p / 100) for p in (50, 95, 99)},
        "longest_gap_seconds_p95": quantile(gaps, 0.95),
        "busy": sum(step.seconds for step in steps) / (span * machines),
        "cached_tokens": sum(outcome.cached_tokens for outcome in outcomes),
        "preemptions": sum(outcome.preemptions for outcome in outcomes),
        "seconds": span,
    }


def simulate(
    requests: Sequence[Request],
    machines: Sequence[tuple[str, MachineSpec]],
    limits: Limits,
    link: Link | None = None,
) -> tuple[dict[str, Any], list[Step]]:
    """(summary, steps) of `requests` on a cluster."""
    if not requests:
        raise RequestError("simulate: no requests; give a trace with some")
    cluster = Cluster(machines, link)
    outcomes = cluster.run(requests)
    return summary(outcomes, cluster.steps, len(machines), limits), cluster.steps


def faster(requests: Sequence[Request], speed: float) -> list[Request]:
    return [replace(request, at_seconds=request.at_seconds / speed) for request in requests]


def goodput(
    requests: Sequence[Request],
    machines: Sequence[tuple[str, MachineSpec]],
    limits: Limits,
    link: Link | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The fastest play of the trace that meets the limits: `speed`, and the summary at it.

    speed 0.0, with the summary of the trace at a hundredth of its speed: the limits cannot be met at all.
    """
    say = progress or (lambda text: None)

    def at(speed: float) -> dict[str, Any]:
        found = simulate(faster(requests, speed), machines, limits, link)[0]
        say(f"{found['requests_per_second']:.3g} requests/s: {found['met']:.0%} within the limits")
        return found

    low, high, best = 0.0, math.inf, at(1.0)
    if best["met"] >= limits.share:
        low = 1.0
        while high is math.inf and low < MAXIMUM_SPEED:
            found = at(low * 2)
            if found["met"] < limits.share:
                high = low * 2
            elif found["requests_per_second"] < 1.02 * best["requests_per_second"]:
                return {"speed": low, **best}  # faster arrivals only wait: the machines are busy throughout
            else:
                low, best = low * 2, found
    else:
        high = 1.0
        while low == 0.0 and high > 0.01:
            found = at(high / 2)
            low, high, best = (
                (high / 2, high, found) if found["met"] >= limits.share else (0.0, high / 2, found)
            )
        if low == 0.0:
            return {"speed": 0.0, **best}
    for _ in range(SEARCH_STEPS):
        middle = (low + high) / 2
        found = at(middle)
        if found["met"] >= limits.share:
            low, best = middle, found
        else:
            high = middle
    return {"speed": low, **best}


def chunk_sweep(
    requests: Sequence[Request], spec: MachineSpec, machines: int, limits: Limits
) -> list[dict[str, Any]]:
    """Summaries by prompt tokens per step (Sarathi-Serve's chunk), `chunk_tokens` in each."""
    rows = []
    for chunk in CHUNKS:
        cluster = [(WHOLE, replace(spec, chunk_tokens=chunk))] * machines
        rows.append({"chunk_tokens": chunk, **simulate(requests, cluster, limits)[0]})
    return rows


def split_sweep(
    requests: Sequence[Request],
    spec: MachineSpec,
    machines: int,
    limits: Limits,
    link: Link,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Goodput of every division of `machines` into those for prompts and those for answers, and of none."""
    if machines < 2:
        raise RequestError(f"simulate: {machines} machine cannot be split into two kinds; give at least 2")
    whole: list[tuple[str, MachineSpec]] = [(WHOLE, spec)] * machines
    rows = [{"prompts": 0, "answers": 0, **goodput(requests, whole, limits, None, progress)}]
    for prompts in range(1, machines):
        parts = [(PROMPTS, spec)] * prompts + [(ANSWERS, spec)] * (machines - prompts)
        found = goodput(requests, parts, limits, link, progress)
        rows.append({"prompts": prompts, "answers": machines - prompts, **found})
    return rows


def limits_json(limits: Limits) -> dict[str, Any]:
    return asdict(limits)
