"""`GET /metrics`: the numbers of `Stats` as Prometheus text.

The tables below are all there is: a row is a metric. docs/metrics.md explains each, grafana.json draws them,
and a test holds the three together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from .stats import ModelStats, Stats

CONTENT_TYPE = CONTENT_TYPE_LATEST

# metric, field of EngineStats, help. Absent while the engine is down.
ENGINE_GAUGES = (
    ("lowbit_requests_running", "running", "Requests in the batch."),
    ("lowbit_requests_waiting", "waiting", "Requests admitted that wait for their first step."),
    ("lowbit_queued_tokens", "queued_tokens", "Prompt tokens that waiting requests still have to read."),
    ("lowbit_kv_tokens", "kv_tokens_total", "Tokens that the KV cache holds when it is full."),
)
ENGINE_COUNTERS = (
    ("lowbit_prompt_tokens", "prompt_tokens", "Prompt tokens computed, without cached ones."),
    ("lowbit_prefix_asked_tokens", "prefix_asked_tokens", "Tokens that the prefix cache was asked for."),
    ("lowbit_prefix_cached_tokens", "prefix_hit_tokens", "Tokens that the prefix cache spared."),
    ("lowbit_generated_tokens", "generated_tokens", "Tokens generated."),
    ("lowbit_drafted_tokens", "drafted_tokens", "Tokens that speculation proposed."),
    ("lowbit_accepted_draft_tokens", "accepted_tokens", "Proposed tokens that the model agreed with."),
    ("lowbit_preemptions", "preemptions", "Requests that gave their KV blocks back to be computed again."),
)
# The same by kind of step: "prompt", "decode" or "mixed".
STEP_COUNTERS = (
    ("lowbit_steps", "steps", "Calls of the decoder."),
    ("lowbit_step_seconds", "step_seconds", "Seconds spent in them."),
)
# metric, field of ModelStats, help.
HISTOGRAMS = (
    ("lowbit_queue_time_seconds", "queue_seconds", "From arrival to the first step."),
    ("lowbit_time_to_first_token_seconds", "first_token_seconds", "From arrival to the first token."),
    ("lowbit_time_between_tokens_seconds", "between_tokens_seconds", "Between two tokens of a request."),
    ("lowbit_request_duration_seconds", "request_seconds", "From arrival to the end."),
    ("lowbit_request_prompt_tokens", "request_prompt_tokens", "Prompt tokens of a finished request."),
    (
        "lowbit_request_generated_tokens",
        "request_generated_tokens",
        "Tokens generated for a finished request.",
    ),
)
MODEL_GAUGES = (
    ("lowbit_model_weights_bytes", "weights_bytes", "Bytes of the weights."),
    ("lowbit_model_bits_per_weight", "bits_per_weight", "True bits per weight, scales and tables included."),
    ("lowbit_model_context_tokens", "context", "Tokens that one request may hold, prompt and answer."),
)
MODEL_COUNTERS = (("lowbit_engine_restarts", "restarts", "Restarts of the engine process."),)


def render(stats: Stats) -> bytes:
    """`stats` in the text format of Prometheus, served with CONTENT_TYPE."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(stats))
    return generate_latest(registry)


class _Families(Collector):
    """One snapshot as metric families, in a registry of its own."""

    def __init__(self, stats: Stats):
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        yield from _server(self.stats)
        models = self.stats["models"]
        for name, field, text in MODEL_GAUGES:
            yield _labelled(GaugeMetricFamily, name, text, models, field)
        for name, field, text in MODEL_COUNTERS:
            yield _labelled(CounterMetricFamily, name, text, models, field)
        yield from _engines(models)
        for name, field, text in HISTOGRAMS:
            family = HistogramMetricFamily(name, text, labels=["model"])
            for model in models:
                seen: Any = model[field]  # type: ignore[literal-required]
                buckets = [(str(bound), count) for bound, count in seen["buckets"]]
                family.add_metric([model["id"]], [*buckets, ("+Inf", seen["count"])], seen["sum"])
            yield family


def _server(stats: Stats) -> Iterator[Metric]:
    info = GaugeMetricFamily("lowbit_server_info", "1; the version is a label.", labels=["version"])
    info.add_metric([stats["version"]], 1)
    yield info
    yield GaugeMetricFamily(
        "lowbit_start_time_seconds", "Unix time of the start.", stats["started_unix_seconds"]
    )
    yield GaugeMetricFamily(
        "lowbit_draining", "1 once the server finishes what runs and takes no more.", float(stats["draining"])
    )
    yield GaugeMetricFamily(
        "lowbit_http_requests_in_flight", "HTTP requests being answered.", stats["in_flight"]
    )
    requests = CounterMetricFamily(
        "lowbit_http_requests", "HTTP requests answered.", labels=["endpoint", "status"]
    )
    for row in stats["requests"]:
        requests.add_metric([row["endpoint"], str(row["status"])], row["count"])
    yield requests
    finished = CounterMetricFamily(
        "lowbit_requests_finished", "Requests by the reason that ended them.", labels=["model", "reason"]
    )
    for model in stats["models"]:
        for reason, count in sorted(model["finished"].items()):
            finished.add_metric([model["id"], reason], count)
    yield finished


def _engines(models: list[ModelStats]) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "lowbit_model_info", "1; what the model is, as labels.", labels=["model", "format", "kv_bits"]
    )
    up = GaugeMetricFamily("lowbit_engine_up", "1 while the engine process answers.", labels=["model"])
    blocks = GaugeMetricFamily(
        "lowbit_kv_blocks",
        "Blocks of the KV cache: used by running requests, cached for later ones, free.",
        labels=["model", "state"],
    )
    usage = GaugeMetricFamily(
        "lowbit_kv_usage_ratio",
        "Share of the KV blocks that running requests hold, 0 to 1.",
        labels=["model"],
    )
    steps = [CounterMetricFamily(name, text, labels=["model", "kind"]) for name, _, text in STEP_COUNTERS]
    running = []
    for model in models:
        name, engine = model["id"], model["engine"]
        info.add_metric([name, model["format"], str(model["kv_bits"])], 1)
        up.add_metric([name], float(engine is not None))
        if engine is None:
            continue
        running.append({"id": name, **engine})
        total, cached = engine["kv_blocks_total"], engine["kv_blocks_cached"]
        held = engine["kv_blocks_used"] - cached
        for state, count in (("used", held), ("cached", cached), ("free", total - held - cached)):
            blocks.add_metric([name, state], count)
        usage.add_metric([name], held / total if total else 0.0)
        for family, (_, field, _) in zip(steps, STEP_COUNTERS):
            for kind, value in sorted(engine[field].items()):  # type: ignore[literal-required]
                family.add_metric([name, kind], value)
    yield from (info, up, blocks, usage, *steps)
    for name, field, text in ENGINE_GAUGES:
        yield _labelled(GaugeMetricFamily, name, text, running, field)
    for name, field, text in ENGINE_COUNTERS:
        yield _labelled(CounterMetricFamily, name, text, running, field)


def _labelled(kind: Any, name: str, text: str, rows: Any, field: str) -> Metric:
    """One sample of `field` for each row, labelled with the model."""
    family = kind(name, text, labels=["model"])
    for row in rows:
        family.add_metric([row["id"]], row[field])
    return family
