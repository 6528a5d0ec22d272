"""Seconds of a step, of a prompt, of a token: a network in a scheme on a machine.

`step_seconds` is what a simulation calls: one step of the scheduler, whatever prompts and streams share it.
Everything else here is made of it.

    time to first token   t(prompt in chunks of CHUNK)
    time per token        mean over the answer of t(one token for each of `users` streams)
    tokens per second     users * o / (users * t_prefill + o * t_decode(users))
    speculation           t(1 + k guesses) / E,  E = (1 - a^(k+1)) / (1 - a)   (arXiv:2211.17192, eq. 1)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from lowbit.formats import Scheme
from lowbit.plan.machine import MeasuredMachine, Part
from lowbit.plan.network import Network
from lowbit.plan.work import Amounts, Runs, Workload

CHUNK = 512  # prompt tokens of a call, as engine.sequence.PREFILL_CHUNK
SAMPLES = 5  # contexts at which the time of a token is taken between the first and the last


class Machine(Protocol):
    """What a cost needs of a machine."""

    @property
    def source(self) -> str: ...

    @property
    def name(self) -> str: ...

    def step(self, cost: StepCost, runs: Runs) -> Part: ...


class StepCost:
    """The steps of one network in one scheme on one machine; keep it and ask again, it remembers."""

    def __init__(
        self,
        network: Network,
        scheme: Scheme,
        machine: MeasuredMachine | Machine,
        kv_bits: int | None = None,
        devices: int = 1,
        pipeline: int = 1,
    ) -> None:
        self.network, self.scheme, self.machine = network, scheme, machine
        self.devices, self.pipeline = devices, pipeline
        threads = machine.threads if isinstance(machine, MeasuredMachine) else 1
        self.work = Workload(network, scheme, kv_bits, threads)
        self.kv_bits = self.work.kv_bits

    def part(self, runs: Runs) -> Part:
        """Seconds of one step of `runs`, by what they are spent on."""
        if isinstance(self.machine, MeasuredMachine):
            return self.machine.part(self.work.amounts(runs))
        return self.machine.step(self, runs)

    def seconds(self, runs: Runs) -> float:
        return self.part(runs).total

    def __call__(self, prompts: Sequence[tuple[int, int, bool]], contexts: Sequence[int]) -> float:
        """The same for a simulation: prompts are (tokens, positions before them, does the prompt end
        there).
        """
        return self.seconds(Runs(tuple(prompts), tuple(contexts)))

    def amounts(self, runs: Runs) -> Amounts:
        return self.work.amounts(runs)

    def prompt_seconds(self, tokens: int, before: int = 0, chunk: int = CHUNK, prompts: int = 1) -> float:
        """Of reading `tokens` prompt tokens after `before` others, `prompts` such together, in chunks."""
        total = 0.0
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            ends = start + count == tokens
            total += self.seconds(Runs(((count, before + start, ends),) * prompts))
        return total

    def token_seconds(self, context: int, users: int = 1) -> float:
        """Of a step in which each of `users` streams at `context` positions gets a token."""
        return self.seconds(Runs((), (context,) * users))

    def answer_seconds(self, prompt: int, answer: int, users: int = 1) -> float:
        """Mean seconds of a token while an answer of `answer` tokens grows behind `prompt` others."""
        if answer <= 1:
            return self.token_seconds(prompt, users)
        points = sorted({prompt + round((answer - 1) * i / (SAMPLES - 1)) for i in range(SAMPLES)})
        return sum(self.token_seconds(point, users) for point in points) / len(points)

    def speculative_seconds(self, context: int, guesses: int, accepted: float, users: int = 1) -> float:
        """Per token, where `guesses` are checked in each step and each is right with probability
        `accepted`.
        """
        runs = Runs(((guesses + 1, context, True),) * users)
        return self.seconds(runs) / expected_tokens(guesses, accepted)


def expected_tokens(guesses: int, accepted: float) -> float:
    """Tokens that a step with `guesses` adds on average: (1 - a^(k+1)) / (1 - a)."""
    if not 0 <= accepted <= 1:
        raise ValueError(f"accepted={accepted}: a probability is between 0 and 1")
    return float(guesses + 1) if accepted == 1 else (1 - accepted ** (guesses + 1)) / (1 - accepted)


@lru_cache(maxsize=64)
def _cost(
    network: Network, scheme: _Key, machine: object, kv_bits: int | None, devices: int, pipeline: int
) -> StepCost:
    return StepCost(network, scheme.scheme, machine, kv_bits, devices, pipeline)  # type: ignore[arg-type]


class _Key:
    """A scheme as a key: its layers are a dict, which cannot be one."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self._text = repr(scheme.to_dict())

    def __hash__(self) -> int:
        return hash(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text


def step_seconds(
    network: Network,
    scheme: Scheme,
    machine: MeasuredMachine | Machine,
    prompt_tokens: int | Sequence[tuple[int, int] | tuple[int, int, bool]] = 0,
    decode_contexts: Sequence[int] = (),
    *,
    kv_bits: int | None = None,
    devices: int = 1,
    pipeline: int = 1,
) -> float:
    """Seconds of one step of the engine.

    prompt_tokens: how many, of one prompt from its beginning; or for each run (tokens, positions before them)
        and, if the prompt does not end there, False behind
    decode_contexts: positions before the token of each stream that gets one
    kv_bits: those of the scheme if not given; devices: tensor-parallel; pipeline: stages
    """
    if isinstance(prompt_tokens, int):
        prompts: tuple[tuple[int, int, bool], ...] = ((prompt_tokens, 0, True),) if prompt_tokens else ()
    else:
        prompts = tuple((p[0], p[1], p[2] if len(p) > 2 else True) for p in prompt_tokens)
    cost = _cost(network, _Key(scheme), machine, kv_bits, devices, pipeline)  # type: ignore[arg-type]
    return cost.seconds(Runs(prompts, tuple(decode_contexts)))
