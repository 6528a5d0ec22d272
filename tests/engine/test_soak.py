"""A thousand requests, many of them taken back at random: every block and every byte comes back."""

import random
from pathlib import Path

import pytest

from lowbit.engine import SamplingParameters, load
from lowbit.engine.core import EngineConfig, EngineCore
from lowbit.engine.request import Request

REQUESTS = 1000


def resident_bytes() -> int:
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("needs /proc")
    return int(status.read_text().split()[1]) * 4096


def test_a_thousand_requests_leave_nothing_behind(tiny_model):
    model = load(tiny_model)
    rng = random.Random(3)
    core = EngineCore(
        model, EngineConfig(kv_blocks=12, max_sequences=8, chunk_tokens=32, speculation="ngram")
    )
    beginnings = [[rng.randrange(256) for _ in range(100)] for _ in range(5)]
    reasons: dict[str, int] = {}
    open_ids: set[str] = set()
    sent, settled = 0, 0
    while sent < REQUESTS or not core.idle:
        while sent < REQUESTS and len(open_ids) < 20:
            prompt = [*rng.choice(beginnings)[: rng.randrange(1, 101)], rng.randrange(256)]
            parameters = SamplingParameters(max_tokens=rng.randrange(1, 24), temperature=0.8, seed=sent)
            echo = 1 if rng.random() < 0.1 else None
            request = Request(
                prompt,
                parameters,
                tenant=f"tenant {sent % 300}",
                priority=rng.randrange(2),
                request_id=str(sent),
                echo_scores=echo,
            )
            core.add(request)
            open_ids.add(request.request_id)
            sent += 1
        if rng.random() < 0.2 and open_ids:
            assert core.cancel(rng.choice(sorted(open_ids)))
        for output in core.step():
            if output.finish_reason:
                open_ids.remove(output.request_id)
                reasons[output.finish_reason] = reasons.get(output.finish_reason, 0) + 1
        if sent >= REQUESTS // 2 and not settled:
            settled = resident_bytes()
    assert resident_bytes() - settled < 8 << 20
    assert sum(reasons.values()) == REQUESTS and min(reasons["cancelled"], reasons["length"]) > 100
    stats = core.stats()
    assert stats["running"] == stats["waiting"] == stats["queued_tokens"] == 0
    assert stats["kv_blocks_used"] == stats["kv_blocks_cached"]
    assert stats["requests_finished"] == REQUESTS and stats["preemptions"] > 0
    assert not open_ids and not core._jobs and not core._prefix._coming
    core._prefix.evict(12)
    assert core.stats()["kv_blocks_used"] == 0 and not core._prefix._nodes
    assert not core._scheduler.tenants._used and len(core._scheduler.tenants._left_at) < 300
    assert not core._speculator._histories
