"""The serving parts of a benchmark run on stand-ins of known speed, and the page that shows them."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import context  # noqa: E402
import part_serving  # noqa: E402
import process  # noqa: E402
import report  # noqa: E402
import sections  # noqa: E402
import serving  # noqa: E402
import serving_page  # noqa: E402
import targets  # noqa: E402
from peers import llama_server  # noqa: E402
from peers.llama_cpp import PeerError  # noqa: E402

sys.path.remove(str(BENCH))

from lowbit.measure.load_client import Answer  # noqa: E402

_SPEC = importlib.util.spec_from_file_location(
    "stand_in", Path(__file__).resolve().parent / "measure" / "stand_in.py"
)
stand_in = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(stand_in)


class Fake(stand_in.StandIn):
    """A stand-in where a server process is expected."""

    pid = os.getpid()

    def said(self):
        return "nothing"


def bench(tmp_path, **more):
    made = {(targets.SMALL, targets.SCHEME): tmp_path}
    return context.Bench(tmp_path, None, (2,), 1, tmp_path, 1000, lambda text: None, made, **more)


def verdicts(rows):
    return {row["measure"].split(":")[-1].strip(): (row["value"], row["passed"]) for row in rows}


def answer(arrivals, tokens=None, started=0.0):
    count = len(arrivals)
    return Answer(started, arrivals[-1], 200, arrivals, [1] * count, count, answer_tokens=tokens or count)


def test_gaps_are_those_that_end_in_the_window():
    answers = [answer([1.0, 1.5, 2.5, 4.0]), answer([1.4, 2.4])]
    assert serving.gaps(answers, 1.4, 2.5) == [0.5, 1.0, 1.0]
    assert serving.gaps(answers, 9.0, 10.0) == []


def test_a_step_is_what_longer_answers_take_beyond_shorter_ones():
    short = [answer([0.0, 1.0, 2.0]), answer([0.5, 1.5, 2.5])]
    long = [answer([0.0, 2.0, 4.5], tokens=7), answer([0.5, 2.5, 3.5], tokens=7)]
    assert serving.step_seconds(short, long) == pytest.approx(0.5)  # four further tokens in two seconds
    with pytest.raises(process.CommandError, match="no longer than short"):
        serving.step_seconds(short, short)


def test_streams_run_together():
    with serving.started(Fake(0.01, 0.004)) as one:
        for every in (0.0, 0.02):
            began = time.perf_counter()
            answers = one.together([(0.05 * i, one.prompt(43, i), 20) for i in range(3)], every)
            assert [answer.text for answer in answers] == ["ab" * 10] * 3
            assert all(answer.started - began >= 0.05 * i for i, answer in enumerate(answers))
        assert {body["temperature"] for body in one.server.bodies[2:]} == {0}
        one.server.refuses = ("prompt",)
        with pytest.raises(process.CommandError, match="HTTP 400"):
            one.together([(0.0, "a", 2)])


def test_a_process_and_its_children_are_watched():
    with llama_server.Server([sys.executable, "-c", SERVE], "/health") as server:
        tree = serving.process_tree(os.getpid())
        assert {os.getpid(), server.pid} <= set(tree)
        assert 1e6 < serving.rss_bytes(server.pid) < serving.rss_bytes(os.getpid())
        before, until = serving.cpu_seconds(os.getpid()), time.process_time() + 0.1
        while time.process_time() < until:
            pass
        assert serving.cpu_seconds(os.getpid()) >= before + 0.05
    assert server.pid not in serving.process_tree(os.getpid())


SERVE = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Ok(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[-1])), Ok).serve_forever()
"""


def test_a_server_that_ends_says_why():
    with pytest.raises(PeerError, match=r"ended with 3: no model"):
        llama_server.Server([sys.executable, "-c", "import sys; print('no model'); sys.exit(3)"], "/health")


def canned(found):
    """load.run that answers `found`: one (tokens per second, first token) per call, in turns."""
    calls = iter(found)

    def run(target, prompts, requests, *, concurrency):
        rate, first = next(calls)
        assert len(requests) == 16 and concurrency == 8
        return {"failures": {}, "answer_tokens_per_second": rate, "first_token_seconds": {"p95": first}}

    return run


@pytest.mark.parametrize("rate, first, good", [(300.0, 0.5, True), (299.0, 0.51, False)])
def test_load_is_judged_by_both_ratios(tmp_path, monkeypatch, rate, first, good):
    monkeypatch.setattr(serving, "ours", lambda model, *options: Fake())
    monkeypatch.setattr(serving, "theirs", lambda *a, **b: Fake())
    monkeypatch.setattr(context.Bench, "theirs", lambda self, name: tmp_path)
    warm_up = [(1.0, 9.0)] * 3
    found = [*warm_up, (rate, first), (100.0, 1.0), (400.0, 0.1)]
    monkeypatch.setattr(part_serving.load, "run", canned(found))
    rows, data = part_serving.load_section(bench(tmp_path, server="built"))
    assert [passed for _, passed in verdicts(rows).values()] == [good, good]
    assert "as started by default, with prompt lookup: 400" in rows[0]["note"]
    assert set(data) == {serving.OURS, serving.THEIRS, part_serving.DEFAULT}
    assert all(len(runs) == 1 for runs in data.values())


def test_without_the_other_server_rows_say_why(tmp_path, monkeypatch):
    monkeypatch.setattr(part_serving, "ANSWER", 4)
    monkeypatch.setattr(serving, "ours", lambda model, *options: Fake())
    rows, _ = part_serving.load_section(bench(tmp_path, missing={"llama-server": "no compiler"}))
    assert [(row["value"], row["passed"], row["note"]) for row in rows] == [(None, None, "no compiler")] * 2


@pytest.mark.parametrize("without, good", [(0.5, True), (0.49, False)])
def test_a_prefix_has_to_be_read_five_times_as_fast(tmp_path, monkeypatch, without, good):
    monkeypatch.setattr(serving, "ours", lambda model, *options: Fake(0.001 if options else 0.002))
    prompts = []

    def together(self, asks):
        prompts.append([prompt for _, prompt, _ in asks])
        return [answer([without if self.server.first_seconds == 0.001 else 0.1]) for _ in asks]

    monkeypatch.setattr(serving.Running, "together", together)
    (row,), data = part_serving.prefix_section(bench(tmp_path))
    assert row["passed"] is good and set(data) == {"cached", "without"}
    assert [len(each) for each in prompts] == [1, 8, 1, 8]
    first, others = (set(each) for each in prompts[:2])
    assert not first & others and len({prompt[:1000] for prompt in first | others}) == 1


@pytest.mark.parametrize("leaked", [0, 3])
def test_a_soak_counts_what_is_left_behind(tmp_path, monkeypatch, leaked):
    for name, value in (("SOAK_REQUESTS", 30), ("SOAK_WARM_UP", 4)):
        monkeypatch.setattr(part_serving, name, value)
    engine = {"running": 0, "waiting": 0, "kv_blocks_used": 5 + leaked, "kv_blocks_cached": 5}

    def ours(model, *options):
        server = Fake(0.001)
        server.gets["/stats"] = {"models": [{"engine": engine}]}
        return server

    monkeypatch.setattr(serving, "ours", ours)
    rows, data = part_serving.soak_section(bench(tmp_path))
    assert (rows[0]["value"], rows[0]["passed"]) == (leaked, leaked == 0)
    assert data["load"]["left"] > 0 and rows[1]["value"] is not None


# The page


def result(part, value, errors=None):
    row = targets.at_least("speed", value, "x", 3.0, "a note") | {"part": part, "heading": "Serving"}
    machine = {"cpu": "CPU", "cpu_model": "model", "cpus": 2}
    return {
        "date": "2026-01-02T03:04:05Z", "commit": "0123456789abcdef", "modified": False, "machine": machine,
        "peers": [], "busy_cpus": 0.0, "missing": {}, "rows": [row], "sections": {part: {"x": 1}},
        "errors": errors or {},
    }  # fmt: skip


PAGE = "\n".join(["a", *serving_page.NUMBERS, "b", *serving_page.FAULTS, "c"])


def test_parts_are_kept_one_by_one(tmp_path):
    assert serving_page.keep(result("soak", 3.0), sections.SERVING, tmp_path)
    assert serving_page.keep(result("load", 2.0), sections.SERVING, tmp_path)
    assert serving_page.keep(result("load", 4.0), sections.SERVING, tmp_path)
    assert not serving_page.keep(result("quality", 4.0), sections.SERVING, tmp_path)
    assert not serving_page.keep(result("load", 5.0, {"load": "failed"}), sections.SERVING, tmp_path)
    kept = json.loads((tmp_path / serving_page.RESULT).read_text())
    assert list(kept["parts"]) == ["load", "soak"]
    shown = serving_page.render(PAGE, kept, BENCH.parent / "tests")
    assert "| speed | >= 3x | 4.00x | yes | a note |" in shown and "at commit 0123456789ab." in shown
    assert serving_page.render(shown, kept, BENCH.parent / "tests") == shown
    with pytest.raises(report.ReportError, match="must hold"):
        serving_page.render("a", kept, tmp_path)


def test_every_fault_has_its_test(monkeypatch):
    assert serving_page.faults(BENCH.parent / "tests").count("\n") == len(serving_page.FAULT_TESTS) + 1
    monkeypatch.setattr(serving_page, "FAULT_TESTS", (("fire", "water", "test_house.py::test_fire"),))
    with pytest.raises(report.ReportError, match="of the fault 'fire' does not exist"):
        serving_page.faults(BENCH.parent / "tests")


def test_the_page_is_up_to_date():
    page = (BENCH.parent / "docs" / serving_page.PAGE).read_text(encoding="utf-8")
    kept = serving_page.read(BENCH / "results")
    assert serving_page.render(page, kept, BENCH.parent / "tests") == page, "run bench/run.py --render"
