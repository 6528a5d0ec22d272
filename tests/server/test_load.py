"""The load generator and lm-eval against a real server with a small random model."""

import json
import sys
from pathlib import Path

import pytest

from lowbit.cli import main
from lowbit.measure import load
from lowbit.measure.load_client import Endpoint
from lowbit.measure.load_plan import Span, uniform


def run(server, requests, **options):
    target, prompts = load.prepare(Endpoint.parse(server.url), **options.pop("how", {}))
    return load.run(target, prompts, requests, **options)


@pytest.mark.parametrize("chat", [False, True])
def test_lengths_come_out_as_planned(server, chat):
    requests = uniform(12, Span(30, 30), Span(3, 9), seed=1)
    result = run(server, requests, concurrency=5, how={"chat": chat})
    assert result["failures"] == {} and result["completed"] == 12
    assert result["tokens_counted_by"] == "usage"
    assert result["answer_tokens"] == sum(request.answer_tokens for request in requests)
    assert abs(result["prompt_tokens"] - 360) < 12 * 8  # words are of several tokens here


def test_clients_that_leave_leave_nothing_behind(server):
    result = run(server, uniform(40, Span(10, 30), Span(15, 20), seed=2), concurrency=10, abandon=1.0)
    assert result["failures"] == {} and result["left"] > 0

    def settled():
        engine = server.engine()
        busy = engine["running"] + engine["waiting"]
        return not busy and engine["kv_blocks_used"] == engine["kv_blocks_cached"]

    server.until(settled, "an engine without requests and without their blocks")


def test_a_model_is_served_meanwhile(server, tiny_model, capsys, monkeypatch):
    root = Path(sys.modules["lowbit"].__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(root))
    few = ("--requests", "2", "--prompt-tokens", "20", "--answer-tokens", "6", "--json")
    assert main(["bench", "serve", str(tiny_model), *few]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["completed"] == 2 and found["answer_tokens"] == 12 and found["model"] == "tiny"
    assert main(["bench", "serve", str(root), *few]) == 2
    assert "`lowbit serve` ended" in capsys.readouterr().err
