"""What is asked of a plan, and how users write it: 4GB, 30ms, 8k, 2%."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from lowbit.errors import FormatError, RequestError
from lowbit.formats import Format, parse_format
from lowbit.formats.auto import parse_bytes
from lowbit.plan.footprint import Site

CHOICES = ("int2-g32", "int3-g32", "int4-g32", "int5-g32", "int6-g32", "int8-g32", "bf16")
DEVICE_CHOICES = ("int2-g32", "int3-g32", "int4-g128", "int8-row", "e4m3fn-row", "bf16")
OBJECTIVES = {
    "loss": "least loss of accuracy",
    "tpot": "least time per token",
    "ttft": "least time to the first token",
    "throughput": "most tokens per second",
    "memory": "least memory",
    "energy": "least joules per token",
    "money": "least money per token",
}
MAX_LOSS = 0.05  # where accuracy is not the objective and no limit is given
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0}


@dataclass(frozen=True)
class Budget:
    """Limits and wishes. None: no limit.

    memory_bytes, tpot_seconds, ttft_seconds, max_loss (relative increase of perplexity): limits
    users: streams at the same time; None: chosen
    context: positions of one user, of which `prompt` are read and `answer` generated
    """

    memory_bytes: int | None = None
    tpot_seconds: float | None = None
    ttft_seconds: float | None = None
    max_loss: float | None = None
    users: int | None = None
    context: int = 2048
    prompt: int | None = None
    answer: int | None = None
    objective: str = "loss"
    choices: tuple[Format, ...] = ()
    kv_bits: tuple[int, ...] = ()
    activations: str = "int8"
    method: str = "rtn"
    devices: int = 1
    pipeline: int = 1
    guesses: int = 0
    accepted: float = 0.0
    site: Site = field(default_factory=Site)
    watts: float | None = None

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise RequestError(f"plan: objective {self.objective!r}; use one of {', '.join(OBJECTIVES)}")
        for name in (
            "memory_bytes",
            "tpot_seconds",
            "ttft_seconds",
            "max_loss",
            "users",
            "context",
            "prompt",
            "answer",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RequestError(f"plan: {name}={value} must be above 0")
        if self.prompt_tokens + self.answer_tokens > self.context:
            raise RequestError(
                f"plan: a prompt of {self.prompt_tokens} and an answer of {self.answer_tokens} tokens "
                "do not fit a "
                f"context of {self.context}; raise --context or shorten them"
            )
        if not 0 <= self.accepted <= 1 or self.guesses < 0:
            raise RequestError(
                "plan: speculation needs guesses of at least 0, accepted with a probability of 0 to 1"
            )
        if self.devices < 1 or self.pipeline < 1:
            raise RequestError("plan: devices and pipeline stages must be at least 1")

    @property
    def answer_tokens(self) -> int:
        if self.answer is not None:
            return self.answer
        return max(1, self.context // 4 if self.prompt is None else self.context - self.prompt)

    @property
    def prompt_tokens(self) -> int:
        return self.prompt if self.prompt is not None else max(1, self.context - self.answer_tokens)

    @property
    def loss_limit(self) -> float | None:
        """What is asked for, or MAX_LOSS where nothing else would keep the accuracy."""
        return MAX_LOSS if self.max_loss is None and self.objective != "loss" else self.max_loss


def parse_seconds(text: str) -> float:
    """30ms, 1.5s, 250us -> seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _SECONDS or float(match[1]) <= 0:
        raise RequestError(f"plan: {text!r} is no time; give one such as 30ms or 1.5s")
    return float(match[1]) * _SECONDS[match[2]]


def parse_count(text: str) -> int:
    """8k, 4096, 128K -> a number (k: 1024)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([km]?)\s*", text.lower())
    number = 0 if match is None else int(float(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2]])
    if number < 1:
        raise RequestError(f"plan: {text!r} is no number of tokens; give one such as 8k or 4096")
    return number


def parse_share(text: str) -> float:
    """2%, 0.02 -> 0.02."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    value = 0.0 if match is None else float(match[1]) / (100 if match[2] else 1)
    if value <= 0:
        raise RequestError(f"plan: {text!r} is no share; give one such as 2% or 0.02")
    return value


def parse_memory(text: str) -> int:
    """4GB, 3.5GiB -> bytes."""
    try:
        return parse_bytes(text)
    except FormatError as error:
        raise RequestError(f"plan: memory {text!r}; give a size such as 4GB or 3.5GiB") from error


def parse_choices(names: Sequence[str]) -> tuple[Format, ...]:
    return tuple(dict.fromkeys(parse_format(name) for name in names))
