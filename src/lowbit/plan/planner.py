"""From a network, a machine and a budget to plans: formats by layer, bits of keys and values, batch.

Batch and bits of keys and values are tried in turn; for each an integer program (choose.py) finds the
formats. What it takes for linear is then counted exactly, and its limits are tightened where the count says
so. All plans found
for all objectives are kept: the best first, and the front of those that no other beats in loss, time and
    memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lowbit.errors import RequestError
from lowbit.formats import Format, Scheme, parse_format
from lowbit.plan.accuracy import Accuracy, other_loss, prior, scheme_nats, to_loss
from lowbit.plan.billing import Bill, bill, watts_of
from lowbit.plan.budget import CHOICES, DEVICE_CHOICES, Budget, parse_choices
from lowbit.plan.choose import Chosen, Item, choose, merge, spread
from lowbit.plan.cost import StepCost
from lowbit.plan.device import SpecifiedMachine
from lowbit.plan.items import AnyMachine, LinearFigures
from lowbit.plan.machine import MeasuredMachine
from lowbit.plan.memory import (
    TOKENIZER_BYTES,
    Memory,
    fits,
    kv_bytes,
    plain_kv_bytes,
    rows_bytes,
    weight_bytes,
)
from lowbit.plan.network import Network
from lowbit.plan.work import tensor_name

BATCHES = (1, 2, 4, 8, 16, 32, 64)
MARGIN = 0.1  # of a device's memory that its driver, buffers and fragmentation keep
TIGHTENINGS = 4


@dataclass(frozen=True)
class Figures:
    """What a plan is predicted to do."""

    ttft: float
    tpot: float
    throughput: float
    memory: Memory
    loss: float
    nats: float
    bill: Bill


@dataclass(frozen=True)
class Plan:
    """A scheme for a batch, and its figures."""

    scheme: Scheme
    batch: int
    figures: Figures
    cost: StepCost


class Planner:
    """One network on one machine within one budget."""

    def __init__(
        self, network: Network, machine: AnyMachine, budget: Budget, accuracy: Accuracy | None = None
    ) -> None:
        self.network, self.machine, self.budget = network, machine, budget
        self.accuracy = accuracy or prior(budget.method)
        self.on_device = isinstance(machine, SpecifiedMachine)
        if not self.on_device and (budget.devices > 1 or budget.pipeline > 1):
            raise RequestError("plan: several devices need --device NAME; lowbit runs on one machine")
        self.choices = budget.choices or parse_choices(DEVICE_CHOICES if self.on_device else CHOICES)
        self._linear_figures = LinearFigures(
            network, machine, budget, self.accuracy, self.choices, self._uniform
        )
        self._known: dict[int, list[Item]] = {}
        context = max(budget.context, budget.prompt_tokens + budget.answer_tokens)
        if context > network.max_context:
            raise RequestError(
                f"plan: a context of {context} is beyond the {network.max_context} of {network.name}; "
                "lower --context"
            )

    # ---- Plans

    def plans(self) -> list[Plan]:
        """Feasible plans, best first; empty if there is none."""
        found: dict[tuple[str, int], Plan] = {}
        for batch, bits in self.settings():
            for objective in dict.fromkeys(("nats", self._linear(), "decode", "bytes")):
                plan = self._solve(batch, bits, objective, self.limits())
                if plan is not None:
                    found.setdefault((repr(plan.scheme.to_dict()), batch), plan)
        return sorted(found.values(), key=self.rank)

    def nearest(self) -> tuple[Plan | None, float]:
        """The plan that exceeds the budgets least, all by the same factor, and the factor."""
        best: tuple[Plan | None, float] = (None, float("inf"))
        for batch, bits in self.settings():
            low, high = 1.0, 2.0
            while high < 1e4 and self._solve(batch, bits, "nats", self.limits(high)) is None:
                low, high = high, high * 2
            for _ in range(10):
                middle = (low * high) ** 0.5
                if self._solve(batch, bits, "nats", self.limits(middle)) is None:
                    low = middle
                else:
                    high = middle
            plan = self._solve(batch, bits, "nats", self.limits(high))
            if plan is not None and high < best[1]:
                best = plan, high
        return best

    def binding(self) -> list[str]:
        """Which limits cannot be met alone; else which, left out, would make the others possible."""
        limits = self.limits()
        alone, together = [], []
        for name in limits:
            one = {name: limits[name]}
            if not any(self._solve(b, k, _least(name), one) for b, k in self.settings()):
                alone.append(name)
        for name in limits if not alone else ():
            rest = {key: value for key, value in limits.items() if key != name}
            if any(self._solve(b, k, "nats", rest) for b, k in self.settings()):
                together.append(name)
        return alone or together or list(limits)

    def best_alone(self, name: str) -> float:
        """The least that a limited figure can be, in the units of the limit."""
        values = []
        for batch, bits in self.settings():
            plan = self._solve(batch, bits, _least(name), {})
            if plan is not None:
                values.append(limited(plan)[name])
        return min(values)

    def settings(self) -> Iterator[tuple[int, int]]:
        """(batch, bits of keys and values) to try."""
        budget = self.budget
        batches: Sequence[int] = (budget.users,) if budget.users else (1,)
        if not budget.users and budget.objective in ("throughput", "energy", "money"):
            batches = BATCHES
        widths = budget.kv_bits or ((16, 8) if self.on_device else (8, 4, 16, 2))
        for batch in batches:
            for bits in widths:
                yield batch, bits

    def rank(self, plan: Plan) -> tuple[float, ...]:
        """Smaller is better: the objective, then loss, time and memory."""
        f = plan.figures
        unknown = float("inf")
        joules, money = f.bill.joules_per_token, f.bill.money_per_million
        first = {
            "loss": f.loss,
            "tpot": f.tpot,
            "ttft": f.ttft,
            "throughput": -f.throughput,
            "memory": f.memory.total,
            "energy": f.tpot / plan.batch if joules is None else joules,
            "money": unknown if money is None else money,
        }[self.budget.objective]
        return (round(first, 9), round(f.loss, 6), f.tpot, f.memory.total)

    # ---- One program

    def _linear(self) -> str:
        return {"loss": "nats", "ttft": "prompt", "memory": "bytes"}.get(self.budget.objective, "decode")

    def limits(self, factor: float = 1.0) -> dict[str, float]:
        b = self.budget
        memory = b.memory_bytes
        if memory is None and self.machine.memory_bytes is not None:
            memory = int(self.machine.memory_bytes * (1 - MARGIN))
        limits = {"memory": memory, "tpot": b.tpot_seconds, "ttft": b.ttft_seconds, "loss": b.loss_limit}
        return {name: value * factor for name, value in limits.items() if value is not None}

    def _solve(self, batch: int, bits: int, objective: str, limits: Mapping[str, float]) -> Plan | None:
        """The best plan of a batch and bits within the limits (of whole plans), or None."""
        items = self._items(batch, bits)
        base = self.evaluate(self._uniform(self.choices[0], bits), batch)
        fixed = self._fixed(items, base)
        slack = dict.fromkeys(limits, 0.0)
        for _ in range(TIGHTENINGS):
            linear = {}
            for name, value in limits.items():
                figure = {"memory": "bytes", "tpot": "decode", "ttft": "prompt", "loss": "nats"}[name]
                bound = _to_nats(value, bits, self.budget.activations) if name == "loss" else value
                linear[figure] = bound - fixed[figure] - slack[name]
            chosen = choose(items, objective, linear)
            if chosen is None:
                return None
            plan = self.evaluate(self._scheme(items, chosen, bits), batch)
            exact = limited(plan)
            over = {
                name: exact[name] - value
                for name, value in limits.items()
                if exact[name] > value * (1 + 1e-9)
            }
            if not over:
                return plan
            for name, excess in over.items():
                slack[name] += excess * 1.05 + 1e-12
        return None

    def _fixed(self, items: Sequence[Item], base: Plan) -> dict[str, float]:
        """What every choice has in common: the exact figures of one less its linear part."""
        linear = dict.fromkeys(("bytes", "decode", "prompt", "nats"), 0.0)
        for item in items:
            for name in linear:
                linear[name] += item.count * item.figures[name][_index(item.formats, self.choices[0], item)]
        f = base.figures
        return {
            "bytes": f.memory.total - linear["bytes"],
            "decode": f.tpot - linear["decode"],
            "prompt": f.ttft - linear["prompt"],
            "nats": f.nats - linear["nats"],
        }

    def _items(self, batch: int, bits: int) -> list[Item]:
        if batch not in self._known:
            self._known[batch] = merge(list(self._linear_figures.items(batch)))
        return self._known[batch]

    def _uniform(self, fmt: Format, bits: int) -> Scheme:
        """Every matrix in `fmt`, or in the first choice that fits where it does not."""
        layers = {}
        for number, layer in enumerate(self.network.layers):
            for m in layer.matrices:
                if not fits(fmt, m.out_features, m.in_features):
                    other = next(
                        (f for f in self.choices if fits(f, m.out_features, m.in_features)),
                        parse_format("bf16"),
                    )
                    layers[tensor_name(number, m.name)] = other
        return Scheme(fmt, self._embedding(fmt), self.budget.activations, bits, layers)

    def _embedding(self, fmt: Format) -> Format:
        usual = parse_format("bf16") if self.on_device else Scheme(fmt).embedding
        assert usual is not None
        if fmt.float_type is None and not self.on_device:
            usual = parse_format("int6-g32") if fmt.bits < 8 else parse_format("int8-g32")
        return usual if fits(usual, self.network.vocab, self.network.hidden) else parse_format("bf16")

    def _scheme(self, items: Sequence[Item], chosen: Chosen, bits: int) -> Scheme:
        formats: dict[str, Format] = {}
        for item, counts in zip(items, chosen.counts):
            formats.update(spread(item, counts))
        return compact_scheme(
            self.network, formats, self._embedding(self.choices[0]), self.budget.activations, bits
        )

    # ---- Counting

    def evaluate(self, scheme: Scheme, batch: int) -> Plan:
        """Every figure of a scheme for a batch, exactly as the cost model has it."""
        b, n = self.budget, self.network
        bits = scheme.kv_bits or 8
        cost = StepCost(n, scheme, self.machine, bits, b.devices, b.pipeline)
        chunk = b.prompt_tokens if self.on_device else 512
        ttft = cost.prompt_seconds(b.prompt_tokens, chunk=chunk)
        middle = b.prompt_tokens + b.answer_tokens // 2
        if b.guesses:
            tpot = cost.speculative_seconds(middle, b.guesses, b.accepted, batch)
        else:
            tpot = cost.answer_seconds(b.prompt_tokens, b.answer_tokens, batch)
        total = batch * ttft + b.answer_tokens * tpot
        throughput = batch * b.answer_tokens / total * (b.pipeline if batch >= b.pipeline else 1)
        nats = scheme_nats(n, scheme, self.accuracy) or 0.0
        loss = (1 + to_loss(nats)) * (
            1 + other_loss(bits, "int16" if self.on_device else scheme.activations)
        ) - 1
        device = self.machine.device if isinstance(self.machine, SpecifiedMachine) else None
        power = self.machine.profile.power if isinstance(self.machine, MeasuredMachine) else {}
        count = b.devices * b.pipeline
        billed = bill(
            tpot, ttft, b.answer_tokens, batch, count, device, b.site, watts_of(device, b.watts, power)
        )
        return Plan(
            scheme,
            batch,
            Figures(ttft, tpot, throughput, self.memory(scheme, batch, cost), loss, nats, billed),
            cost,
        )

    def memory(self, scheme: Scheme, batch: int, cost: StepCost) -> Memory:
        """Of the machine, or of each device."""
        b, n, bits = self.budget, self.network, scheme.kv_bits or 8
        if isinstance(self.machine, SpecifiedMachine):
            share = b.devices * b.pipeline
            keys = plain_kv_bytes(n, bits) * b.context * batch
            rows = b.prompt_tokens * (2 * n.hidden + 2 * n.intermediate // b.devices) * 2
            return Memory(-(-weight_bytes(n, scheme) // share), int(keys / share), rows, 0)
        keys = batch * kv_bytes(n, bits, b.context)
        wide = 8 if scheme.activations == "int8" else 16
        rows = rows_bytes(n, min(cost.work.pass_tokens, max(b.prompt_tokens, batch)), wide, batch)
        process = self.machine.profile.runtime_bytes + TOKENIZER_BYTES * n.vocab
        return Memory(weight_bytes(n, scheme), keys, rows, process)


def limited(plan: Plan) -> dict[str, float]:
    """The figures that budgets limit."""
    f = plan.figures
    return {"memory": f.memory.total, "tpot": f.tpot, "ttft": f.ttft, "loss": f.loss}


def front(plans: Sequence[Plan]) -> list[Plan]:
    """Those that no other equals or beats in loss, time per token and memory together."""

    def key(plan: Plan) -> tuple[float, float, float]:
        return plan.figures.loss, plan.figures.tpot, plan.figures.memory.total

    kept = []
    for plan in plans:
        mine = key(plan)
        beaten = any(
            other is not plan and all(a <= b for a, b in zip(key(other), mine)) and key(other) != mine
            for other in plans
        )
        if not beaten:
            kept.append(plan)
    return kept


def compact_scheme(
    network: Network, formats: Mapping[str, Format], embedding: Format, activations: str, kv_bits: int
) -> Scheme:
    """The most frequent format for all; others by a pattern of all layers where it holds, else by name."""
    weights: dict[Format, int] = {}
    kinds: dict[str, dict[str, Format]] = {}
    for number, layer in enumerate(network.layers):
        for matrix in layer.matrices:
            name = tensor_name(number, matrix.name)
            weights[formats[name]] = weights.get(formats[name], 0) + matrix.weights * matrix.copies
            kinds.setdefault(matrix.name, {})[name] = formats[name]
    usual = max(weights, key=lambda f: (weights[f], -f.bits))
    layers: dict[str, Format] = {}
    for short, named in kinds.items():
        pattern = short.replace("mlp.experts.", "mlp.experts.*.")
        if len(set(named.values())) == 1:
            fmt = next(iter(named.values()))
            if fmt != usual:
                layers[f"*.{pattern}.weight"] = fmt
            continue
        for name, fmt in named.items():
            if fmt != usual:
                layers[name.replace("mlp.experts.0.", "mlp.experts.*.")] = fmt
    return Scheme(usual, embedding, activations, kv_bits, layers)


def _to_nats(loss: float, bits: int, activations: str) -> float:
    """Nats that the weights may lose so that the whole plan loses `loss`."""
    rest = (1 + loss) / (1 + other_loss(bits, activations))
    return math.log(rest) if rest > 0 else -1.0


def _least(name: str) -> str:
    return {"memory": "bytes", "tpot": "decode", "ttft": "prompt", "loss": "nats"}[name]


def _index(formats: Sequence[Format], fmt: Format, item: Item) -> int:
    return formats.index(fmt) if fmt in formats else 0
