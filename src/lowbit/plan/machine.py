"""Seconds of work on a machine: one that was measured (a Profile), or one that is known from its data sheet.

Both answer the same questions, and `source` says which it is. A measured machine has error intervals made
from its own residuals; a specification has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.formats import Format, parse_format
from lowbit.formats.tables import TERNARY
from lowbit.plan.fit import Rates, rate_at
from lowbit.plan.interval import bounds
from lowbit.plan.profile import Profile
from lowbit.plan.work import Amounts

REFERENCE = "int4-g32"
NEAR = 4.0  # distance of formats that differ in the size of their groups
MEMORY_BOUND, ARITHMETIC_BOUND = 4, 48  # tokens: bytes decide up to the first, arithmetic from the second


@dataclass(frozen=True)
class Part:
    """Seconds of a step by what they are spent on."""

    products: float
    attention: float
    other: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.other


class MeasuredMachine:
    """What a profile says."""

    source = "measured"

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.threads = profile.threads
        self._formats = {name: parse_format(name) for name, _ in profile.rates}
        self._nearest: dict[tuple[Format, int], tuple[tuple[str, int], float, float]] = {}
        self._seen: dict[tuple[Format, int, float], float] = {}

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def memory_bytes(self) -> int | None:
        return self.profile.memory_bytes

    def is_measured(self, fmt: Format, bits: int = 8) -> bool:
        return (fmt.name, bits) in self.profile.rates

    def is_known(self, fmt: Format, bits: int = 8) -> bool:
        """Measured, or of a kind and width that was, with groups of another size."""
        others = (self._formats[name] for name, width in self.profile.rates if width == bits)
        return min((distance(fmt, other) for other in others), default=math.inf) <= NEAR

    def part(self, amounts: Amounts) -> Part:
        """Seconds of a step."""
        products = sum(
            weights * self.rate(fmt, bits, tokens)
            for (fmt, bits, tokens), weights in amounts.products.items()
        )
        attention = other = 0.0
        for name, amount in amounts.of.items():
            seconds = self.profile.seconds.get(name, 0.0) * amount
            if name.startswith(("decode", "prompt", "write")):
                attention += seconds
            else:
                other += seconds
        return Part(products, attention, other)

    def rate(self, fmt: Format, bits: int, tokens: float) -> float:
        """Seconds per weight of a product with `tokens` rows of activations."""
        key = (fmt, bits, tokens)
        found = self._seen.get(key)
        if found is None:
            found = self._seen[key] = self._rate(fmt, bits, tokens)
        return found

    def _rate(self, fmt: Format, bits: int, tokens: float) -> float:
        rates = self.profile.rates
        if (fmt.name, bits) in rates:
            return self._beyond(fmt.name, bits, tokens)
        if bits == 16 and (fmt.name, 8) in rates:
            return self._beyond(fmt.name, 8, tokens) * self._wide(tokens)
        at, few, many = self._representative(fmt, bits)
        return self._beyond(*at, tokens) * _between(few, many, tokens)

    def _beyond(self, name: str, bits: int, tokens: float) -> float:
        """As measured; where only fewer tokens were, as the reference grows from there.

        Beyond the crossover another kernel runs: nothing is interpolated across it.
        """
        grid, values = self.profile.rates[name, bits]
        fmt = self._formats[name]
        last = self.profile.crossovers.get("few" if _even(fmt) else "gemv", 0)
        if last < tokens < grid[-1] and fmt.float_type is None:
            unpacked = [(t, v) for t, v in zip(grid, values) if t > last]
            value = rate_at([t for t, _ in unpacked], [v for _, v in unpacked], tokens)
            if tokens < unpacked[0][0] and len(unpacked) > 1:  # unpacking once, then so much a token
                (t, v), (u, w) = unpacked[:2]
                value = max(v - (w - v) / (u - t) * (t - tokens), v * tokens / t)
        elif tokens < last < grid[-1] and any(t <= last for t in grid):
            decoded = [(t, v) for t, v in zip(grid, values) if t <= last]
            value = rate_at([t for t, _ in decoded], [v for _, v in decoded], tokens)
        else:
            value = rate_at(grid, values, tokens)
        reference = self.profile.rates.get((REFERENCE, 8))
        if tokens > grid[-1] and reference is not None and reference[0][-1] > grid[-1]:
            known = [(t, v) for t, v in zip(*reference) if t <= grid[-1]]
            straight = rate_at([t for t, _ in known], [v for _, v in known], tokens)
            if straight > 0:
                value *= rate_at(*reference, tokens) / straight
        return value

    def _wide(self, tokens: float) -> float:
        """How much longer a product takes with activations of two limbs."""
        both = [
            (rate_at(*self.profile.rates[name, 16], tokens), rate_at(*self.profile.rates[name, 8], tokens))
            for name, bits in self.profile.rates
            if bits == 16 and (name, 8) in self.profile.rates
        ]
        factors = [wide / narrow for wide, narrow in both if narrow > 0 and wide > 0]
        return math.exp(sum(map(math.log, factors)) / len(factors)) if factors else 2.0

    def _representative(self, fmt: Format, bits: int) -> tuple[tuple[str, int], float, float]:
        """(the measured format most like `fmt`, factors on its rate for few tokens and for many)."""
        found = self._nearest.get((fmt, bits))
        if found is None:
            at = min(
                (name for name in self.profile.rates if name[1] == bits or bits == 16),
                key=lambda n: (distance(fmt, self._formats[n[0]]), n[1] != bits),
                default=None,
            )
            if at is None:
                raise KeyError(f"the profile has no rates of {bits}-bit activations")
            near = self._formats[at[0]]
            size = fmt.bits_per_weight(4096) / near.bits_per_weight(4096)
            work = fmt.terms / near.terms * (self._wide(ARITHMETIC_BOUND) if at[1] != bits else 1.0)
            found = self._nearest[fmt, bits] = (at, max(size, 1e-3), work)
        return found

    def factors(self, family: str, formats: tuple[Format, ...] = ()) -> tuple[float, float] | None:
        """Of an interval around a prediction of this family; wider where a format was not measured."""
        residuals = self.profile.residuals
        if any(not self.is_known(fmt) for fmt in formats) and "format" in residuals:
            guessed, own = bounds(residuals["format"]), bounds(residuals.get(family, []))
            if guessed is None or own is None:
                return None
            return min(own[0], guessed[0]), max(own[1], guessed[1])
        return bounds(residuals.get(family, []))


def _between(few: float, many: float, tokens: float) -> float:
    """`few` up to MEMORY_BOUND tokens, `many` from ARITHMETIC_BOUND on, geometrically between."""
    if tokens <= MEMORY_BOUND:
        return few
    if tokens >= ARITHMETIC_BOUND:
        return many
    share = math.log(tokens / MEMORY_BOUND) / math.log(ARITHMETIC_BOUND / MEMORY_BOUND)
    return few ** (1 - share) * many**share


def distance(one: Format, other: Format) -> float:
    """How unlike two formats are for a kernel: floats, base 3, tables, bits, groups, in this order."""

    def kind(fmt: Format) -> tuple[object, ...]:
        return (
            fmt.float_type if not fmt.coded else "coded",
            fmt.packing,
            fmt.scale_type == "m4",
            fmt.zero_point,
            fmt.terms > 1 or len(fmt.tables) > 1,
            _even(fmt),
        )

    unlike = sum(
        weight * (a != b) for weight, a, b in zip((1000, 100, 60, 30, 60, 60), kind(one), kind(other))
    )
    groups = [f.scale_size(4096) or 4096 for f in (one, other)]
    stored = [f.stored_bits * f.terms for f in (one, other)]
    return unlike + 10 * abs(stored[0] - stored[1]) + abs(math.log2(groups[0] / groups[1]))


def _even(fmt: Format) -> bool:
    """Levels in equal steps: integers."""
    if not fmt.tables or fmt.tables[0] == TERNARY:
        return True
    steps = {round(b - a, 6) for a, b in zip(fmt.tables[0], fmt.tables[0][1:])}
    return len(steps) == 1


def rates_json(rates: Rates) -> list[Mapping[str, Any]]:
    """For people: the rate of one token in GB/s is what they look at."""
    return [
        {"format": n, "activation_bits": b, "tokens": t, "seconds_per_weight": v}
        for (n, b), (t, v) in rates.items()
    ]
