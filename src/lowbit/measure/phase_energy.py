"""Energy per token of the two phases of a model, prompt and answer, measured over seconds of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from lowbit.engine import LanguageModel
from lowbit.engine.sequence import new_cache
from lowbit.measure.energy import EnergyMeter, EnergyReport
from lowbit.measure.speed import WARM_UP_STEPS, decode_once, prefill_once
from lowbit.plan.footprint import Site, per_million_tokens

PHASE_SECONDS = 2.0  # of each phase: many ticks of any counter


def phase_energy(
    model: LanguageModel,
    make_meter: Callable[[], EnergyMeter],
    site: Site,
    prefill: int = 512,
    decode: int = 128,
    seconds: float = PHASE_SECONDS,
) -> dict[str, Any]:
    """Keys "prefill" and "decode", each with `tokens`, `joules_per_token` (None where unavailable), its
    `joules_per_token_interval`, `energy` (the report of the window) and `per_million_tokens`, and `site`.
    """
    prefill = min(prefill, model.context)
    decode = max(1, min(decode, model.context - WARM_UP_STEPS - 1))
    prefill_cache = new_cache(model.decoder, prefill)
    decode_cache = new_cache(model.decoder, decode + WARM_UP_STEPS + 1)
    phases = {
        "prefill": (lambda: prefill_once(model, prefill, prefill_cache), prefill),
        "decode": (lambda: decode_once(model, decode, decode_cache), decode + WARM_UP_STEPS),
    }
    result: dict[str, Any] = {"site": asdict(site)}
    for name, (work, tokens) in phases.items():
        work()
        done = 0
        with make_meter() as meter:
            started = time.perf_counter()
            while done == 0 or time.perf_counter() - started < seconds:
                work()
                done += tokens
        assert meter.report is not None
        result[name] = _phase(meter.report, done, site)
    return result


def _phase(report: EnergyReport, tokens: int, site: Site) -> dict[str, Any]:
    joules = None if report.joules is None else report.joules / tokens
    interval = None if report.interval is None else tuple(value / tokens for value in report.interval)
    footprint = None
    if joules is not None:
        footprint = asdict(per_million_tokens(joules, report.window_seconds / tokens, site))
    return {
        "tokens": tokens,
        "joules_per_token": joules,
        "joules_per_token_interval": interval,
        "core_seconds_per_token": report.core_seconds / tokens,
        "energy": report.to_json(),
        "per_million_tokens": footprint,
    }
