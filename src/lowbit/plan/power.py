"""Power of machines that serve a load: what a cap costs in latency, how many machines a supply can feed.

A machine draws `idle` watts when it waits, `prompt` while it reads and `token` while it generates. Prompts
are bound by arithmetic, so a cap below `prompt` slows them by the clock that is left; generation is bound by
memory and slowed only by a cap below `token`. Since prompts come in bursts, the sum of many machines stays
far below the sum of their peaks, and a supply feeds more of them than its rating says.
Source: POLCA, arXiv:2308.12908 (phases, capping, oversubscription).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.errors import RequestError
from lowbit.plan.cluster import Cost, Step

WINDOW_SECONDS = 1.0  # a supply reacts to the mean of so long
DRAWS = 32  # of random shifts of the machines against one another
MAXIMUM_MACHINES = 4096


@dataclass(frozen=True)
class PhasePower:
    """Watts of one machine by what it does."""

    idle: float
    prompt: float
    token: float

    def __post_init__(self) -> None:
        if not 0 <= self.idle < self.token <= self.prompt:
            raise RequestError(
                f"power: idle={self.idle:g}, token={self.token:g}, prompt={self.prompt:g} W; they must rise "
                "in this order"
            )

    def of(self, step: Step) -> float:
        """Watts during a step: prompts and streams share it as their tokens do."""
        if not step.prompt_tokens:
            return self.token
        share = step.prompt_tokens / (step.prompt_tokens + step.streams)
        return self.token + share * (self.prompt - self.token)

    def slowdown(self, cap: float, reading: bool) -> float:
        """How many times as long a step takes under a cap. Dynamic power goes with the clock."""
        if cap <= self.idle:
            raise RequestError(
                f"power: a cap of {cap:g} W is not above the {self.idle:g} W that an idle machine draws"
            )
        wanted = self.prompt if reading else self.token
        return max(1.0, (wanted - self.idle) / (cap - self.idle))


def capped(cost: Cost, power: PhasePower, cap: float) -> Cost:
    """The cost of steps under a cap of `cap` watts."""
    reading, streaming = power.slowdown(cap, True), power.slowdown(cap, False)

    def under_cap(prompts: Sequence[tuple[int, int, bool]], contexts: Sequence[int]) -> float:
        return cost(prompts, contexts) * (reading if prompts else streaming)

    return under_cap


def energy_joules(steps: Sequence[Step], power: PhasePower, seconds: float, machines: int) -> float:
    """Of all machines over `seconds`, waiting included."""
    busy = sum(step.seconds for step in steps)
    return sum(power.of(step) * step.seconds for step in steps) + power.idle * (seconds * machines - busy)


def power_series(steps: Sequence[Step], power: PhasePower, machine: int, seconds: float) -> np.ndarray:
    """Watts of one machine, the mean of each WINDOW_SECONDS: float64 [windows]."""
    windows = max(1, int(np.ceil(seconds / WINDOW_SECONDS)))
    begin = min((step.began for step in steps), default=0.0)
    joules = np.full(windows, power.idle * WINDOW_SECONDS)
    for step in steps:
        if step.machine != machine:
            continue
        at, left = step.began - begin, step.seconds
        watts = power.of(step) - power.idle
        while left > 0:
            window = min(int(at / WINDOW_SECONDS), windows - 1)
            inside = min(left, (window + 1) * WINDOW_SECONDS - at) if window < windows - 1 else left
            inside = inside if inside > 0 else left
            joules[window] += watts * inside
            at, left = at + inside, left - inside
    return joules / WINDOW_SECONDS


def machines_fed(
    series: Sequence[np.ndarray], rated: int, power: PhasePower, cap: float | None = None, seed: int = 0
) -> dict[str, float]:
    """How many machines a supply built for `rated` of them at full power feeds.

    series: watts of machines over time, of equal length. Machines are added at random shifts in time as long
    as the sum stays below the supply in all but one of a thousand windows.
    Returns machines, share_more (0.3: 30% more than rated), supply_watts, peak_watts (of the sum).
    """
    peak = min(power.prompt, cap) if cap is not None else power.prompt
    supply = rated * peak
    chance = np.random.default_rng(seed)
    length = len(series[0])

    def high(count: int) -> float:
        worst = 0.0
        for _ in range(DRAWS):
            total = np.zeros(length)
            for i in range(count):
                total += np.roll(series[i % len(series)], int(chance.integers(length)))
            worst = max(worst, float(np.quantile(total, 0.999)))
        return worst

    low, up = rated, rated * 2
    while high(up) <= supply and up < MAXIMUM_MACHINES:
        low, up = up, up * 2
    while up - low > 1:
        middle = (low + up) // 2
        low, up = (middle, up) if high(middle) <= supply else (low, middle)
    return {
        "machines": low,
        "share_more": low / rated - 1,
        "supply_watts": supply,
        "peak_watts": high(low),
    }
