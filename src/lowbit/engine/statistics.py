"""What an engine counts while it runs."""

from __future__ import annotations

from collections import deque
from typing import Any

from lowbit.engine.job import StepPlan

RATE_SECONDS = 10.0  # tokens per second are counted over this long
KINDS = ("decode", "prompt", "mixed")


class Statistics:
    """Totals since the start, and the rate of late."""

    def __init__(self) -> None:
        self.requests_finished = 0
        self._prompt_tokens = self._generated_tokens = 0
        self._drafted_tokens = self._accepted_tokens = 0
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._steps = dict.fromkeys(KINDS, 0)
        self._recent: deque[tuple[float, int]] = deque()  # (when, generated tokens)

    def step(self, plan: StepPlan, generated: int, seconds: float, now: float) -> None:
        kind = "decode" if not plan.prompt_tokens else "mixed" if plan.decode_tokens else "prompt"
        self._seconds[kind] += seconds
        self._steps[kind] += 1
        self._prompt_tokens += plan.prompt_tokens
        self._generated_tokens += generated
        self._recent.append((now, generated))
        while self._recent[0][0] < now - RATE_SECONDS:
            self._recent.popleft()

    def guesses(self, proposed: int, accepted: int) -> None:
        self._drafted_tokens += proposed
        self._accepted_tokens += accepted

    def read(self, now: float) -> dict[str, Any]:
        recent = [(when, tokens) for when, tokens in self._recent if when >= now - RATE_SECONDS]
        span = now - recent[0][0] if recent else 0.0
        return {
            "requests_finished": self.requests_finished,
            "prompt_tokens": self._prompt_tokens,
            "generated_tokens": self._generated_tokens,
            "drafted_tokens": self._drafted_tokens,
            "accepted_tokens": self._accepted_tokens,
            "tokens_per_second": sum(tokens for _, tokens in recent) / span if span > 0 else 0.0,
            "step_seconds": dict(self._seconds),
            "steps": dict(self._steps),
        }
