"""Goodput, sweeps and power of simulated loads."""

import numpy as np
import pytest

from lowbit.errors import RequestError
from lowbit.plan.cluster import WHOLE, Link, MachineSpec, Step
from lowbit.plan.power import PhasePower, capped, energy_joules, machines_fed, power_series
from lowbit.plan.serving import Limits, chunk_sweep, goodput, quantile, simulate, split_sweep
from lowbit.plan.trace import Request


def _cost(prompts, contexts):
    return 1e-3 + 1e-5 * sum(count for count, _, _ in prompts) + 1e-4 * len(contexts)


SPEC = MachineSpec(_cost, kv_blocks=256, prefix_cache=False)


def test_quantiles_are_values_that_were_seen():
    assert quantile([5, 1, 3], 0.5) == 3
    assert quantile(list(range(1, 101)), 0.95) == 95
    assert quantile([], 0.9) == 0.0


def test_a_summary_counts_all_requests():
    load = [Request(100, 10, 0.1 * i) for i in range(20)]
    found, steps = simulate(load, [(WHOLE, SPEC)], Limits(1.0, 1.0))
    assert (found["requests"], found["met"]) == (20, 1.0)
    assert found["tokens_per_second"] == pytest.approx(200 / found["seconds"])
    assert found["busy"] == pytest.approx(sum(step.seconds for step in steps) / found["seconds"])
    assert sum(step.prompt_tokens for step in steps) == 2000
    tight, _ = simulate(load, [(WHOLE, SPEC)], Limits(1e-9, None))
    assert tight["met"] == 0.0


def test_goodput_is_the_rate_that_the_machine_can_just_serve():
    # One at a time, one token each: 1.1 ms a request, so at most 909 a second; evenly spaced, none waits.
    spec = MachineSpec(_cost, kv_blocks=64, max_sequences=1, chunk_tokens=10, prefix_cache=False)
    load = [Request(10, 1, i / 100) for i in range(400)]
    found = goodput(load, [(WHOLE, spec)], Limits(first_token_seconds=2e-3))
    assert 0.9 * 909 < 100 * found["speed"] < 1.1 * 909
    assert found["met"] >= 0.9
    none = goodput(load[:20], [(WHOLE, spec)], Limits(first_token_seconds=1e-6))
    assert none["speed"] == 0.0 and none["met"] < 0.9


def test_larger_chunks_read_faster_and_stall_more():
    load = [Request(60, 200)] + [Request(1500, 2, 0.05 * i) for i in range(1, 8)]
    rows = {row["chunk_tokens"]: row for row in chunk_sweep(load, SPEC, 1, Limits())}
    assert rows[64]["longest_gap_seconds_p95"] < rows[2048]["longest_gap_seconds_p95"]
    assert rows[64]["first_token_seconds_p95"] > rows[2048]["first_token_seconds_p95"]


def test_every_split_is_tried():
    load = [Request(400, 20, 0.05 * i) for i in range(30)]
    rows = split_sweep(load, SPEC, 3, Limits(0.1, 5e-3), Link(1e9, 1000))
    assert [(row["prompts"], row["answers"]) for row in rows] == [(0, 0), (1, 2), (2, 1)]
    assert all(row["speed"] > 0 for row in rows)
    with pytest.raises(RequestError, match="at least 2"):
        split_sweep(load, SPEC, 1, Limits(), Link(1e9, 1000))


POWER = PhasePower(idle=75, prompt=700, token=380)


def test_a_cap_slows_prompts_first():
    assert POWER.slowdown(700, True) == 1.0
    assert POWER.slowdown(387.5, True) == pytest.approx(2.0)
    assert POWER.slowdown(387.5, False) == 1.0
    cost = capped(_cost, POWER, 387.5)
    assert cost([(100, 0, True)], []) == pytest.approx(2 * _cost([(100, 0, True)], []))
    assert cost([], [5]) == _cost([], [5])
    with pytest.raises(RequestError, match="idle"):
        POWER.slowdown(75, True)
    with pytest.raises(RequestError, match="rise"):
        PhasePower(10, 5, 7)


def test_power_over_time_adds_up_to_the_energy():
    steps = [Step(0, 0.25, 1.5, 100, 0), Step(0, 2.0, 0.5, 0, 4), Step(1, 0.0, 1.0, 50, 50)]
    seconds = 4.0
    total = sum(power_series(steps, POWER, machine, seconds).sum() for machine in (0, 1))
    # By hand: idle 75 W x 8 s, + 625 W x 1.5 s, + 305 W x 0.5 s, + (305 + 160) W x 1 s.
    assert energy_joules(steps, POWER, seconds, 2) == pytest.approx(600 + 937.5 + 152.5 + 465)
    assert total == pytest.approx(energy_joules(steps, POWER, seconds, 2))
    first = power_series([Step(0, 0.0, 1.5, 100, 0)], POWER, 0, 2.0)
    assert first == pytest.approx([700.0, 75 + 625 * 0.5])


def test_bursty_machines_share_a_supply():
    series = np.full(1000, 75.0)
    series[::10] = 700.0  # busy a tenth of the time
    fed = machines_fed([series], 10, POWER)
    assert fed["machines"] > 13  # more than 30% more
    assert fed["peak_watts"] <= fed["supply_watts"] == 7000
    steady = machines_fed([np.full(100, 700.0)], 10, POWER)
    assert steady["machines"] == 10
