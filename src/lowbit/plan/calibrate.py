"""A profile from what was measured: fit, then the errors on what took no part in the fit.

Families of residuals, log(measured / predicted):
    decode    steps in which streams get a token        prompt    steps that read
    memory    resident bytes of processes with a network and full caches
    format    a format that was not measured, by leaving each measured one out in turn
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, Protocol

from lowbit.formats import Scheme, parse_format
from lowbit.model.config import from_transformers
from lowbit.plan.fit import Fitted, Point, Rates, fit
from lowbit.plan.machine import REFERENCE, MeasuredMachine
from lowbit.plan.memory import kv_bytes, rows_bytes, weight_bytes
from lowbit.plan.network import network_of
from lowbit.plan.profile import Profile
from lowbit.plan.work import Amounts, Runs, Workload

DECISIVE = 0.3  # share of a step's multiply-adds


class Timed(Protocol):
    """A step as lowbit.measure.profile times it."""

    kind: str
    config: dict[str, Any]
    scheme: Scheme
    kv_bits: int
    prompts: tuple[tuple[int, int], ...]
    contexts: tuple[int, ...]
    seconds: float
    rounds: tuple[float, ...]


def amounts_of(step: Timed, threads: int) -> Amounts:
    """What a timed step did."""
    network = network_of(from_transformers(step.config))
    work = Workload(network, step.scheme, step.kv_bits, threads)
    return work.amounts(Runs(tuple((count, before, True) for count, before in step.prompts), step.contexts))


def grids_of(points: Sequence[Amounts]) -> dict[tuple[str, int], list[float]]:
    """The numbers of tokens at which each format's rate can be fitted: where its products are most of a
    step.
    """
    seen: dict[tuple[str, int], set[float]] = {}
    every: dict[tuple[str, int], set[float]] = {}
    for amounts in points:
        total = sum(weights * tokens for (_, _, tokens), weights in amounts.products.items())
        for (fmt, bits, tokens), weights in amounts.products.items():
            every.setdefault((fmt.name, bits), set()).add(tokens)
            if weights * tokens > DECISIVE * total:
                seen.setdefault((fmt.name, bits), set()).add(tokens)
    return {key: sorted(seen.get(key) or {min(tokens)}) for key, tokens in every.items()}


def make_profile(measured: Mapping[str, Any], identity: Mapping[str, Any], version: str = "") -> Profile:
    """measured: what lowbit.measure.profile.measure_profile returns; identity: see profile.identity."""
    threads = int(identity["threads"])
    found = [(step, amounts_of(step, threads)) for step in measured["fit"]]
    grids = grids_of([amounts for _, amounts in found])
    fitted = fit([Point(amounts, step.seconds) for step, amounts in found], grids)
    profile = Profile(
        identity=dict(identity),
        bandwidth_bytes_per_second=measured["bandwidth_bytes_per_second"],
        int8_multiply_adds_per_second=measured["int8_multiply_adds_per_second"],
        float_multiply_adds_per_second=measured["float_multiply_adds_per_second"],
        memory_bytes=measured["memory_bytes"],
        runtime_bytes=measured["runtime_bytes"],
        seconds=fitted.seconds,
        rates=fitted.rates,
        crossovers=dict(measured["crossovers"]),
        measured_at=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        seconds_taken=measured["seconds_taken"],
        lowbit=version,
    )
    residuals = held_out_residuals(profile, measured["held_out"])
    residuals["format"] = format_residuals(fitted)
    residuals["memory"] = memory_residuals(profile, measured.get("memory", ()))
    return replace(profile, residuals=residuals)


def held_out_residuals(profile: Profile, steps: Sequence[Timed]) -> dict[str, list[float]]:
    """Of every round of every step: a user's time is one such round, not their least."""
    machine = MeasuredMachine(profile)
    found: dict[str, list[float]] = {"decode": [], "prompt": []}
    for step in steps:
        expected = machine.part(amounts_of(step, machine.threads)).total
        family = "prompt" if step.prompts else "decode"
        found[family] += [math.log(seconds / expected) for seconds in step.rounds]
    return found


def format_residuals(fitted: Fitted) -> list[float]:
    """Each measured format predicted from the others, at each number of tokens."""
    residuals = []
    for (name, bits), (tokens, rates) in fitted.rates.items():
        others: Rates = {key: value for key, value in fitted.rates.items() if key != (name, bits)}
        if bits != 8 or name == REFERENCE:
            continue
        blind = MeasuredMachine(_empty(others))
        if blind.is_known(parse_format(name)):
            continue  # of the formats left out, those that have no near relative
        for at, rate in zip(tokens, rates):
            guess = blind.rate(parse_format(name), bits, at)
            if rate > 0 and guess > 0:
                residuals.append(math.log(rate / guess))
    return residuals


def memory_residuals(profile: Profile, measured: Sequence[tuple[Any, int]]) -> list[float]:
    """Of whole processes: weights, keys and values, rows of a pass, and what a process without a model
    takes.
    """
    found = []
    for case, resident in measured:
        network = network_of(from_transformers(case.config))
        scheme = Scheme.parse(case.scheme)
        work = Workload(network, scheme, case.kv_bits, profile.threads)
        rows = min(work.pass_tokens, case.positions)
        expected = (
            profile.runtime_bytes
            + weight_bytes(network, scheme)
            + case.users * kv_bytes(network, case.kv_bits, case.positions)
            + rows_bytes(network, rows)
        )
        found.append(math.log(resident / expected))
    return found


def _empty(rates: Rates) -> Profile:
    return Profile({"threads": 1}, 1.0, 1.0, 1.0, None, 0, {}, rates)
