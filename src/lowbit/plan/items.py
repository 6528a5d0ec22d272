"""What each format does to each group of matrices: bytes, seconds of tokens and of prompts, nats. Linear
parts only.

These are the coefficients of the integer program; attention, norms and everything that no format changes is
added by the planner, which counts whole plans exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lowbit.errors import RequestError
from lowbit.formats import Format, Scheme
from lowbit.plan.accuracy import Accuracy
from lowbit.plan.budget import Budget
from lowbit.plan.choose import Item
from lowbit.plan.cost import StepCost, expected_tokens
from lowbit.plan.device import SpecifiedMachine
from lowbit.plan.machine import MeasuredMachine
from lowbit.plan.memory import fits, stored_bytes
from lowbit.plan.network import Matrix, Network
from lowbit.plan.work import distinct_experts, tensor_name

AnyMachine = MeasuredMachine | SpecifiedMachine


class LinearFigures:
    """Of one network on one machine within one budget."""

    def __init__(
        self,
        network: Network,
        machine: AnyMachine,
        budget: Budget,
        accuracy: Accuracy,
        choices: tuple[Format, ...],
        uniform: Callable[[Format, int], Scheme],
    ) -> None:
        self.network, self.machine, self.budget = network, machine, budget
        self.accuracy, self.choices, self._uniform = accuracy, choices, uniform
        self._costs: dict[Format, StepCost] = {}

    def items(self, batch: int) -> Iterator[Item]:
        for number, layer in enumerate(self.network.layers):
            groups: dict[str, list[Matrix]] = {}
            for matrix in layer.matrices:
                groups.setdefault(matrix.item, []).append(matrix)
            for matrices in groups.values():
                names = tuple(tensor_name(number, m.name) for m in matrices)
                formats = tuple(
                    f for f in self.choices if all(fits(f, m.out_features, m.in_features) for m in matrices)
                )
                figures: dict[str, list[float]] = {name: [] for name in ("bytes", "decode", "prompt", "nats")}
                kept = []
                for fmt in formats:
                    nats = [
                        self.accuracy.nats(self.network, [n], m.weights * m.copies, fmt)
                        for n, m in zip(names, matrices)
                    ]
                    if any(value is None for value in nats):
                        continue
                    kept.append(fmt)
                    figures["bytes"].append(
                        sum(m.copies * stored_bytes(fmt, m.out_features, m.in_features) for m in matrices)
                    )
                    figures["decode"].append(
                        sum(self._product(m, fmt, batch * (1 + self.budget.guesses)) for m in matrices)
                        / self._per_step()
                    )
                    figures["prompt"].append(sum(self._prompt(m, fmt) for m in matrices))
                    figures["nats"].append(sum(value or 0.0 for value in nats))
                if not kept:
                    raise RequestError(
                        f"plan: none of {', '.join(f.name for f in self.choices)} fits {names[0]} "
                        f"[{matrices[0].out_features}, {matrices[0].in_features}], or its accuracy is "
                        "unknown; add one with --choices"
                    )
                yield Item(names, tuple(kept), {k: tuple(v) for k, v in figures.items()})

    def _per_step(self) -> float:
        return expected_tokens(self.budget.guesses, self.budget.accepted) if self.budget.guesses else 1.0

    def _product(self, matrix: Matrix, fmt: Format, tokens: float) -> float:
        """Seconds of all products of a matrix in a step with so many tokens."""
        if isinstance(self.machine, SpecifiedMachine):
            return self.machine.product(matrix, fmt, tokens, self.budget.activations, self.budget.devices)
        bits = 8 if self.budget.activations == "int8" else 16
        if matrix.experts:
            hit = distinct_experts(matrix.experts, matrix.active, tokens)
            rows = max(1.0, tokens * matrix.active / hit)
            return hit * matrix.weights * self.machine.rate(fmt, bits, rows)
        return matrix.weights * self.machine.rate(fmt, bits, float(tokens))

    def _prompt(self, matrix: Matrix, fmt: Format) -> float:
        prompt = self.budget.prompt_tokens
        if isinstance(self.machine, SpecifiedMachine):
            return self._product(matrix, fmt, prompt)
        size = self._any_cost(fmt).work.pass_tokens
        passes = max(1, round(prompt / size + 0.49))
        return passes * self._product(matrix, fmt, prompt / passes)

    def _any_cost(self, fmt: Format) -> StepCost:
        if fmt not in self._costs:
            self._costs[fmt] = StepCost(
                self.network, self._uniform(fmt, 16), self.machine, 16, self.budget.devices
            )
        return self._costs[fmt]
