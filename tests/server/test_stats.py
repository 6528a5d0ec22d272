"""Histograms and the object of GET /stats."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from lowbit.server.stats import SECONDS, Counters, EngineStats, Histogram, build

spec = importlib.util.spec_from_file_location(
    "tiny_checkpoint", Path(__file__).parents[1] / "tiny_checkpoint.py"
)
tiny_checkpoint = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny_checkpoint)

MODEL = {
    "id": "tiny",
    "format": "int4-g32",
    "bits_per_weight": 4.5,
    "weights_bytes": 76_000_000,
    "kv_bits": 8,
    "context": 8192,
    "chat": True,
}
ENGINE = {
    "running": 3,
    "waiting": 2,
    "queued_tokens": 700,
    "kv_blocks_total": 40,
    "kv_blocks_used": 15,
    "kv_blocks_cached": 5,
    "kv_tokens_total": 40 * 256,
    "tokens_per_second": 120.0,
    "prompt_tokens": 600,
    "prefix_asked_tokens": 1000,
    "prefix_hit_tokens": 400,
    "generated_tokens": 900,
    "drafted_tokens": 50,
    "accepted_tokens": 30,
    "preemptions": 1,
    "requests_finished": 7,
    "steps": {"prompt": 10, "decode": 80, "mixed": 10},
    "step_seconds": {"prompt": 0.5, "decode": 0.75, "mixed": 0.25},
}


def test_a_histogram_puts_values_where_prometheus_does():
    h = Histogram((1.0, 2.0, 4.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        h.observe(value)
    h.observe(4.0, times=2)
    got = h.stats()
    # A bound is inclusive ("le"), and each bucket counts those below it too.
    assert got["buckets"] == [(1.0, 2), (2.0, 4), (4.0, 6)]
    assert (got["count"], got["sum"]) == (7, 22.0)


def test_quantiles_are_within_the_bucket_of_the_true_ones():
    rng = random.Random(3)
    values = sorted(rng.lognormvariate(-3, 1) for _ in range(5000))
    h = Histogram(SECONDS)
    for value in values:
        h.observe(value)
    for q in (0.01, 0.5, 0.95, 0.99):
        true = values[int(q * len(values))]
        low = max((b for b in (0.0, *SECONDS) if b < true), default=0.0)
        high = min(b for b in SECONDS if b >= true)
        assert low <= h.quantile(q) <= high
    assert h.quantile(0.25) < h.quantile(0.5) < h.quantile(0.75)


def test_quantiles_at_the_ends():
    h = Histogram((1.0, 2.0))
    assert h.quantile(0.5) == 0.0
    h.observe(50.0)
    assert h.quantile(0.5) == 2.0
    h = Histogram((1.0, 2.0))
    h.observe(1.5)
    assert 1.0 <= h.quantile(0.0) <= h.quantile(1.0) == 2.0


def test_tokens_that_come_together_share_the_time():
    counters = Counters(["tiny"])
    counters.models["tiny"].tokens(0.4, count=4)
    got = counters.models["tiny"].between_tokens_seconds.stats()
    assert got["count"] == 4
    assert got["sum"] == pytest.approx(0.4)
    assert dict(got["buckets"])[0.1] == 4


def test_stats_join_the_counters_and_the_engines():
    counters = Counters(["tiny", "other"])
    counters.answered("/v1/models", 200)
    counters.answered("/v1/models", 200)
    counters.answered("/v1/completions", 429)
    seen = counters.models["tiny"]
    seen.finish("stop", 2.0, prompt_tokens=100, generated_tokens=20)
    seen.finish("length", 1.0, prompt_tokens=10, generated_tokens=64)
    seen.restarts += 1
    stats = build(
        counters,
        [MODEL, {**MODEL, "id": "other"}],
        {"tiny": ENGINE, "other": None},
        version="1.2",
        draining=True,
    )
    stats = json.loads(json.dumps(stats))
    assert stats["version"] == "1.2"
    assert stats["draining"] is True
    assert stats["requests"] == [
        {"endpoint": "/v1/completions", "status": 429, "count": 1},
        {"endpoint": "/v1/models", "status": 200, "count": 2},
    ]
    tiny, other = stats["models"]
    assert tiny["engine"] == ENGINE
    assert tiny["finished"] == {"stop": 1, "length": 1}
    assert tiny["restarts"] == 1
    assert tiny["request_seconds"]["sum"] == 3.0
    assert tiny["request_prompt_tokens"]["count"] == 2
    assert dict(map(tuple, tiny["request_generated_tokens"]["buckets"]))[32.0] == 1
    assert other["engine"] is None
    assert other["finished"] == {}
    assert 0 <= stats["uptime_seconds"] < 60


def test_the_engine_says_what_the_contract_names(tmp_path):
    from lowbit.engine import load
    from lowbit.engine.core import EngineConfig, EngineCore
    from lowbit.engine.parameters import SamplingParameters
    from lowbit.engine.request import Request

    assert EngineStats.__annotations__.keys() == ENGINE.keys()
    core = EngineCore(load(tiny_checkpoint.write_tiny_llama(tmp_path / "tiny")), EngineConfig())
    core.add(Request([1, 2, 3], SamplingParameters(max_tokens=4, ignore_eos=True)))
    while not core.idle:
        core.step()
    said = core.stats()
    assert said.keys() == ENGINE.keys()
    assert {name: type(value) for name, value in said.items() if name != "tokens_per_second"} == {
        name: type(value) for name, value in ENGINE.items() if name != "tokens_per_second"
    }
    assert (said["prompt_tokens"], said["generated_tokens"]) == (3, 4)
    assert said["steps"].keys() == ENGINE["steps"].keys() == said["step_seconds"].keys()
