"""GET /metrics: every number of the snapshot, read back by Prometheus's own parser."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="the server's metrics need prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from lowbit.server import metrics
from lowbit.server.stats import SECONDS, Counters, EngineStats, build

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"

spec = importlib.util.spec_from_file_location("stats_example", Path(__file__).with_name("test_stats.py"))
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)


def snapshot(**engines):
    counters = Counters(engines)
    counters.answered("/v1/completions", 200)
    counters.answered("/v1/completions", 503)
    for name in engines:
        seen = counters.models[name]
        seen.first_token_seconds.observe(0.04)
        seen.first_token_seconds.observe(100.0)
        seen.finish("stop", 2.0, prompt_tokens=100, generated_tokens=20)
    return build(counters, [{**example.MODEL, "id": name} for name in engines], engines, version="1")


def samples(stats):
    """{(sample name, labels): value} of the rendered text."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render(stats).decode())
        for sample in family.samples
    }


def test_every_field_of_the_engine_has_a_metric():
    got = samples(snapshot(tiny=example.ENGINE))
    label = (("model", "tiny"),)
    for name, field, _ in metrics.ENGINE_GAUGES:
        assert got[name, label] == example.ENGINE[field]
    for name, field, _ in metrics.ENGINE_COUNTERS:
        assert got[f"{name}_total", label] == example.ENGINE[field]
    for name, field, _ in metrics.STEP_COUNTERS:
        for kind, value in example.ENGINE[field].items():
            assert got[f"{name}_total", (("kind", kind), *label)] == value
    named = {
        field for _, field, _ in (*metrics.ENGINE_GAUGES, *metrics.ENGINE_COUNTERS, *metrics.STEP_COUNTERS)
    }
    # Blocks are below; the last two follow from others over time.
    others = {
        "kv_blocks_total",
        "kv_blocks_used",
        "kv_blocks_cached",
        "tokens_per_second",
        "requests_finished",
    }
    assert named | others == set(EngineStats.__annotations__)
    for state, count in (("used", 10), ("cached", 5), ("free", 25)):
        assert got["lowbit_kv_blocks", (("model", "tiny"), ("state", state))] == count
    assert got["lowbit_kv_usage_ratio", label] == 0.25


def test_histograms_are_cumulative_and_end_with_all():
    got = samples(snapshot(tiny=example.ENGINE))
    name = "lowbit_time_to_first_token_seconds"
    buckets = {
        float(dict(labels)["le"]): value
        for (sample, labels), value in got.items()
        if sample == f"{name}_bucket"
    }
    assert sorted(buckets) == [*SECONDS, math.inf]
    assert buckets[0.025] == 0
    assert buckets[0.05] == buckets[60.0] == 1
    assert buckets[math.inf] == got[f"{name}_count", (("model", "tiny"),)] == 2
    assert got[f"{name}_sum", (("model", "tiny"),)] == pytest.approx(100.04)


def test_requests_by_status_and_reason():
    got = samples(snapshot(tiny=example.ENGINE))
    for status in ("200", "503"):
        labels = (("endpoint", "/v1/completions"), ("status", status))
        assert got["lowbit_http_requests_total", labels] == 1
    assert got["lowbit_requests_finished_total", (("model", "tiny"), ("reason", "stop"))] == 1


def test_an_engine_that_is_down_is_seen_and_has_no_stale_numbers():
    got = samples(snapshot(tiny=example.ENGINE, down=None))
    assert got["lowbit_engine_up", (("model", "tiny"),)] == 1
    assert got["lowbit_engine_up", (("model", "down"),)] == 0
    assert ("lowbit_requests_running", (("model", "tiny"),)) in got
    assert ("lowbit_requests_running", (("model", "down"),)) not in got
    assert got["lowbit_model_weights_bytes", (("model", "down"),)] == 76_000_000


def test_names_and_labels_survive_odd_text():
    odd = 'a"b\\c\nd {x="y"} 1'
    got = samples(snapshot(**{odd: example.ENGINE}))
    assert got["lowbit_engine_up", (("model", odd),)] == 1


def test_two_snapshots_do_not_mix():
    first = metrics.render(snapshot(tiny=example.ENGINE))
    metrics.render(snapshot(tiny={**example.ENGINE, "running": 9}))
    again = samples(snapshot(tiny=example.ENGINE))
    assert b'lowbit_requests_running{model="tiny"} 3.0' in first
    assert again["lowbit_requests_running", (("model", "tiny"),)] == 3


def rendered_names():
    """Names as they appear in queries: counters with _total, histograms with their three series."""
    families = text_string_to_metric_families(metrics.render(snapshot(tiny=example.ENGINE)).decode())
    plain, series = set(), set()
    for family in families:
        plain.add(family.name + "_total" * (family.type == "counter"))
        series |= {sample.name for sample in family.samples}
    return plain, series


def queries():
    """Every expression of the dashboard, and of the alert rules in the document."""
    dashboard = json.loads(Path(metrics.__file__).with_name("grafana.json").read_text(encoding="utf-8"))
    yield from (target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    yield from (item["query"]["query"] for item in dashboard["templating"]["list"] if item["type"] == "query")
    yield from re.findall(r"expr: (.*)", DOCUMENT.read_text(encoding="utf-8"))


def test_dashboard_and_alerts_name_metrics_that_exist():
    _, series = rendered_names()
    asked = {name for query in queries() for name in re.findall(r"lowbit_\w+", query)}
    assert len(asked) > 20
    assert asked <= series


def test_dashboard_and_alerts_name_labels_that_exist():
    labels = {}
    for family in text_string_to_metric_families(metrics.render(snapshot(tiny=example.ENGINE)).decode()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    for query in queries():
        for name, matchers in re.findall(r"(lowbit_\w+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)\s*=", matchers)) <= labels[name]
        grouped = {
            label for group in re.findall(r"by \(([^)]*)\)", query) for label in re.findall(r"\w+", group)
        }
        for name in re.findall(r"lowbit_\w+", query):
            assert grouped <= labels[name], query


def test_the_dashboard_is_drawn_without_gaps():
    panels = json.loads(Path(metrics.__file__).with_name("grafana.json").read_text(encoding="utf-8"))[
        "panels"
    ]
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & covered
        covered |= cells
    assert covered == {(x, y) for x in range(24) for y in range(max(y for _, y in covered) + 1)}


def test_the_document_names_every_metric():
    plain, _ = rendered_names()
    rows = re.findall(r"^\| `(lowbit_\w+)` \|([^|]*)\|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(plain)
    families = {
        family.name + "_total" * (family.type == "counter"): family
        for family in text_string_to_metric_families(metrics.render(snapshot(tiny=example.ENGINE)).decode())
    }
    for name, labels in rows:
        said = set(re.findall(r"\w+", labels))
        assert said == set().union(*(sample.labels for sample in families[name].samples)) - {"le"}
