"""The load generator: HTTP and events however they arrive, plans of requests, the arithmetic, whole runs."""

import asyncio
import importlib.util
import itertools
import json
import random
import socket
from pathlib import Path

import pytest

from lowbit.cli import main
from lowbit.errors import RequestError
from lowbit.measure import load, load_client, load_plan
from lowbit.measure.load_client import Answer, Endpoint
from lowbit.measure.load_plan import Prompts, Span
from lowbit.plan import trace
from lowbit.plan.trace import Request

_SPEC = importlib.util.spec_from_file_location("stand_in", Path(__file__).with_name("stand_in.py"))
stand_in = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(stand_in)
StandIn, HEAD, chunk, event = stand_in.StandIn, stand_in.HEAD, stand_in.chunk, stand_in.event
text_event, usage_event = stand_in.text_event, stand_in.usage_event

# The bytes of an answer, and what they say


class Clock:
    """perf_counter that stands still until it is set."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(load_client.time, "perf_counter", lambda: self.now)


def receive(pieces, monkeypatch=None, close=False):
    """An Answer of `[bytes or (moment, bytes)]` that reach the client one after another."""

    async def go():
        clock = Clock(monkeypatch) if monkeypatch else None
        done = asyncio.get_running_loop().create_future()
        exchange = load_client._Exchange(b"", done, None)
        for piece in pieces:
            moment, data = piece if isinstance(piece, tuple) else (0.0, piece)
            if clock:
                clock.now = moment
            if not done.done():
                exchange.data_received(data)
        if close:
            exchange.connection_lost(None)
        answer = Answer(0.0, status=exchange.status, failure=exchange.failure)
        load_client.read(exchange, answer)
        return done.done(), answer

    return asyncio.run(go())


EVENTS = [
    b": a comment\n\n",
    event({"choices": [{"delta": {"role": "assistant"}}]}),
    event({"choices": [{"delta": {"content": "On"}}]}),
    event({"choices": [{"delta": {"reasoning_content": "ce"}}]}),
    b"event: message\r\n" + text_event(" é\n").replace(b"\n\n", b"\r\n\r\n"),
    event({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "{}"}}]}}]}),
    event({"choices": [{"delta": {}, "finish_reason": "stop"}]}),
    usage_event(7, 4, 3),
    event(b"[DONE]"),
]
WHOLE = b"".join(EVENTS)
FRAMINGS = {
    "chunked": HEAD + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n",
    "one chunk with extension and trailer": HEAD + b"%X;a=b\r\n%s\r\n0\r\nT: 1\r\n\r\n" % (len(WHOLE), WHOLE),
    "length": b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(WHOLE), WHOLE),
    "close": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\n\r\n" + WHOLE,
}


@pytest.mark.parametrize("name", FRAMINGS)
@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_an_answer_is_the_same_however_it_arrives(name, size):
    data = FRAMINGS[name]
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    done, answer = receive(pieces, close=name == "close")
    assert done and answer.failure is None
    assert (answer.text, answer.pieces, answer.finish_reason) == ("Once é\n{}", 4, "stop")
    assert (answer.prompt_tokens, answer.answer_tokens, answer.cached_tokens) == (7, 4, 3)


def test_moments_are_those_of_the_text(monkeypatch):
    pieces = [
        (1.0, HEAD + chunk(EVENTS[0]) + chunk(EVENTS[1])),  # no text yet
        (2.0, chunk(text_event("a"))[:-9]),  # not whole yet
        (2.5, chunk(text_event("a"))[-9:]),
        (3.0, chunk(text_event("b") + text_event("c"))),  # together
        (3.0, chunk(text_event("d"))),
        (4.5, chunk(text_event("e", "length")) + chunk(usage_event(9, 9))),
        (9.0, chunk(event(b"[DONE]")) + b"0\r\n\r\n"),
    ]
    done, answer = receive(pieces, monkeypatch)
    assert done and answer.arrivals == [2.5, 3.0, 4.5]
    assert answer.together == [1, 3, 1] and answer.pieces == 5
    assert answer.first_token_seconds == 2.5
    assert answer.token_seconds == (4.5 - 2.5) / 8  # nine tokens by the server's count, in five pieces


@pytest.mark.parametrize(
    ("pieces", "failure"),
    [
        ([b"HTTP/1.1 429 Slow\r\nContent-Length: 31\r\n\r\n" + b'{"error":{"code":"queue_full"}}'],
         "HTTP 429 (queue_full)"),
        ([b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nno"], "HTTP 503"),
        ([HEAD + chunk(text_event("a")) + chunk(event({"error": {"type": "engine_died"}})) + b"0\r\n\r\n"],
         "error event (engine_died)"),
        ([HEAD + chunk(text_event("a"))], "connection closed before the answer ended"),
        ([HEAD + chunk(text_event("a")) + b"0\r\n\r\n"], "the stream ended before the answer"),
        ([HEAD + chunk(b"data: {oops\n\n") + b"0\r\n\r\n"], "an event that is no JSON object"),
        ([HEAD + b"zz\r\n"], "bad HTTP framing"),
        ([b"SSH-2.0\r\n\r\n"], "bad HTTP framing"),
        ([b"x" * 70_000], "bad HTTP framing"),
        ([], "connection closed before the answer ended"),
    ],
)  # fmt: skip
def test_failures_have_names(pieces, failure):
    assert receive(pieces, close=True)[1].failure == failure


def test_who_does_not_answer_is_named():
    async def ask(port, **options):
        return await load_client.ask(Endpoint("127.0.0.1", port), "/completions", {}, **options)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert asyncio.run(ask(taken.getsockname()[1])).failure == "connection refused"
        taken.listen()
        assert asyncio.run(ask(taken.getsockname()[1], timeout=0.05)).failure == "timeout"


def test_addresses():
    assert Endpoint.parse("http://localhost:80/") == Endpoint("localhost", 80)
    assert Endpoint.parse("https://[::1]/api/v2", "key") == Endpoint("::1", 443, "/api/v2", True, "key")
    message = Endpoint.parse("https://[::1]/api/v2", "key").message("POST", "/x", b"{}")
    assert message.startswith(b"POST /api/v2/x HTTP/1.1\r\nHost: [::1]:443\r\n")
    assert b"\r\nAuthorization: Bearer key\r\n\r\n{}" in message
    for url in ("localhost:80", "ftp://a", "http://", "http://a:99999"):
        with pytest.raises(RequestError, match="not the address"):
            Endpoint.parse(url)


# What is asked, and when


def test_lengths():
    assert Span.parse("200") == Span(200, 200) and Span.parse("1-3") == Span(1, 3)
    assert {Span(1, 3).draw(random.Random(i)) for i in range(50)} == {1, 2, 3}
    for text in ("", "0", "3-1", "a", "-2", "1-b"):
        with pytest.raises(RequestError, match="no length"):
            Span.parse(text)


def test_poisson_times_have_the_rate_and_are_repeatable():
    requests = load_plan.uniform(4000, Span(1, 9), Span(5, 5), seed=3, rate=20.0)
    assert requests == load_plan.uniform(4000, Span(1, 9), Span(5, 5), seed=3, rate=20.0)
    times = [request.at_seconds for request in requests]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert 0.045 < mean < 0.055 and times[0] == 0  # the mean of 4,000 is within 1.6% by chance
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert 0.8 < deviation / mean < 1.2  # that of an exponential distribution is its mean
    assert {r.at_seconds for r in load_plan.uniform(5, Span(1, 1), Span(1, 1), 0)} == {0.0}


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805910,5000,109
2023-11-16 18:16:46.6805900,80,15
"""
MOONCAKE = [
    {"timestamp": 1000, "input_length": 900, "output_length": 8, "hash_ids": [0, 1]},
    {"timestamp": 1500, "input_length": 1200, "output_length": 9, "hash_ids": [0, 1, 7]},
]


def test_traces_are_read_and_scaled(tmp_path):
    azure, mooncake = tmp_path / "azure.csv", tmp_path / "mooncake.jsonl"
    azure.write_text(AZURE)
    mooncake.write_text("\n".join(map(json.dumps, MOONCAKE)))
    requests, left_out = trace.replay(azure, scale=10, lengths=0.5, longest=1000)
    assert left_out == 1 and requests[0] == Request(187, 22, 0.0)
    assert requests[1].at_seconds == pytest.approx(6.0) and requests[1].answer_tokens == 8
    assert trace.replay(azure, count=1) == ([Request(374, 44)], 0)
    assert trace.replay(mooncake)[0] == [Request(900, 8, 0.0, (0, 1)), Request(1200, 9, 0.5, (0, 1, 7))]


@pytest.mark.parametrize(
    "text", ["", "a,b\n1,2\n", '{"timestamp": 1}\n', "{oops\n", AZURE.replace("374", "many")]
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(RequestError, match="trace"):
        trace.replay(path)


def test_prompts_share_what_the_plan_says():
    prompts = Prompts(seed=1, per_word=2.0, fixed=3.0)
    one = prompts.text(0, Request(2051, 1, blocks=(5, 6)))
    two = prompts.text(1, Request(1539, 1, blocks=(5, 7)))
    assert len(one.split()) == 1024 and len(two.split()) == 768
    assert one.split()[:256] == two.split()[:256] and one.split()[256:300] != two.split()[256:300]
    assert prompts.text(0, Request(203, 1)) != prompts.text(1, Request(203, 1))
    assert prompts.text(0, Request(203, 1)) == Prompts(1, 2.0, 3.0).text(0, Request(203, 1))
    shared = [load.with_shared_prefix(prompts, 100).text(i, Request(203, 1)).split() for i in (0, 1)]
    assert shared[0][:50] == shared[1][:50] and shared[0][50:] != shared[1][50:] and len(shared[0]) == 100


# The arithmetic


def answer(started, arrivals, tokens, ended, **more):
    return Answer(
        started,
        ended,
        200,
        arrivals,
        [1] * len(arrivals),
        tokens,
        prompt_tokens=10,
        answer_tokens=tokens,
        **more,
    )


def test_figures_of_known_answers():
    answers = [
        answer(0.0, [1.0, 1.5, 2.5], 4, 2.6),
        answer(1.0, [1.2], 1, 1.3),
        answer(1.0, [3.0, 3.1], 2, 3.2, failure="timeout"),
        answer(1.0, [9.0], 5, 9.2, left=True),
        Answer(0.0, failure="timeout"),
    ]
    clock = {"seconds": 10.0, "client_cpu_seconds": 0.5, "late_seconds": 0.25}
    r = load.summarize(answers, clock, load.Goal(0.5, 0.6))
    assert (r["requests"], r["completed"], r["left"], r["failures"]) == (5, 2, 1, {"timeout": 2})
    assert (r["prompt_tokens"], r["answer_tokens"], r["tokens_counted_by"]) == (20, 5, "usage")
    assert (r["answer_tokens_per_second"], r["total_tokens_per_second"]) == (0.5, 2.5)
    assert r["first_token_seconds"]["mean"] == pytest.approx(0.6) and r["first_token_seconds"]["max"] == 1.0
    assert r["token_seconds"]["p50"] == 0.5  # 1.5 s for the three tokens after the first
    assert r["inter_token_seconds"]["mean"] == 0.75 and r["inter_token_seconds"]["max"] == 1.0
    assert r["tokens_per_arrival"] == 1.25 and r["client_cpu_fraction"] == 0.05
    assert (r["goodput_requests_per_second"], r["goodput_fraction"]) == (0.1, 0.25)


def test_pieces_stand_in_for_tokens_that_no_one_counts():
    r = load.summarize(
        [Answer(0.0, 1.0, 200, [0.5, 1.0], [1, 6], 7)],
        {"seconds": 1.0, "client_cpu_seconds": 0, "late_seconds": 0},
        None,
    )
    assert (r["tokens_counted_by"], r["answer_tokens"]) == ("pieces", 7)


# Whole runs


def prepared(server, **options):
    return load.prepare(Endpoint.parse(server.url), **options)


def test_a_run_of_fixed_concurrency_waits_as_long_as_the_server_takes():
    with StandIn(first_seconds=0.04, gap_seconds=0.02) as server:
        target, prompts = prepared(server)
        assert (target.model, prompts.per_word, prompts.fixed) == ("stand-in", 2.0, 3.0)
        r = load.run(target, prompts, load_plan.uniform(9, Span(43, 43), Span(6, 6), 0), concurrency=3)
        assert server.most_running == 3
    assert (r["completed"], r["failures"], r["prompt_tokens"], r["answer_tokens"]) == (9, {}, 9 * 43, 54)
    assert r["seconds"] > 3 * 0.08 and r["first_token_seconds"]["p50"] > 0.04
    assert r["token_seconds"]["p50"] > 0 and r["inter_token_seconds"]["max"] > 0.02 * 0.9


def test_a_client_that_looks_seldom_gets_the_same_text():
    with StandIn(gap_seconds=0.002) as server:
        target, _ = prepared(server)
        asking = load_client.ask(target.endpoint, target.route, target.request("a b", 40), every=0.02)
        answer = asyncio.run(asking)
    assert answer.failure is None and answer.text == "ab" * 20 and answer.pieces == 20
    assert len(answer.arrivals) < 20 and max(answer.together) > 1 and sum(answer.together) == 20


def test_a_run_on_time_counts_from_when_a_request_was_due():
    requests = [Request(43, 2, at) for at in (0.0, 0.01, 0.06)]
    with StandIn() as server:
        target, prompts = prepared(server, chat=True)
        r = load.run(target, prompts, requests)
        assert all("messages" in body and body["stream"] for body in server.bodies)
    assert r["completed"] == 3 and r["seconds"] > 0.06 and r["request_seconds"]["p50"] < 30


def test_clients_that_leave_are_seen_by_the_server_and_are_no_failures():
    with StandIn(first_seconds=0.03, gap_seconds=0.01) as server:
        target, prompts = prepared(server)
        r = load.run(
            target, prompts, load_plan.uniform(8, Span(43, 43), Span(60, 60), 0), concurrency=8, abandon=1.0
        )
        again = load.run(target, prompts, load_plan.uniform(1, Span(43, 43), Span(2, 2), 0), concurrency=1)
    assert r["failures"] == {} and r["left"] + r["completed"] == 8 and r["left"] >= 4
    assert server.hung_up == r["left"] and again["completed"] == 1


@pytest.mark.parametrize(
    ("refuses", "asks"),
    [((), "ignore_eos"), (("ignore_eos",), "min_tokens"), (("ignore_eos", "min_tokens"), None)],
)
def test_answers_of_full_length_are_asked_for_in_words_that_the_server_knows(refuses, asks):
    with StandIn(refuses=refuses) as server:
        target, prompts = prepared(server, model="mine", body={"temperature": 0.5})
        load.run(target, prompts, [Request(20, 7)], concurrency=1)
    sent = server.bodies[-1]
    assert {"ignore_eos", "min_tokens"} & set(sent) == ({asks} if asks else set())
    assert sent["model"] == "mine" and sent["temperature"] == 0.5 and sent.get("min_tokens", 7) == 7


def test_a_server_that_answers_no_trial_is_refused():
    with (
        StandIn(refuses=("prompt",)) as server,
        pytest.raises(RequestError, match="HTTP 400 \\(unknown_field\\)"),
    ):
        prepared(server)


# The command


def command(capsys, *arguments):
    code = main(["bench", "serve", *map(str, arguments)])
    done = capsys.readouterr()
    return code, done.out, done.err


def test_command_prints_one_object_or_a_table(capsys, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text(AZURE)
    with StandIn() as server:
        few = ("--requests", 3, "--prompt-tokens", "23-43", "--answer-tokens", 4, "--api-key", "secret")
        code, out, _ = command(
            capsys, server.url, *few, "--concurrency", 2, "--slo", "ttft=60,tpot=60", "--json"
        )
        r = json.loads(out)
        assert code == 0 and r["completed"] == 3 and r["goodput_fraction"] == 1.0
        assert "Authorization: Bearer secret" in server.headers[-1]
        code, out, _ = command(capsys, server.url, *few, "--rate", 1000, "--slo", "ttft=1e-9")
        assert code == 0 and "3 of 3 answered" in out and "0% of the requests" in out and "p95" in out
        code, out, _ = command(capsys, server.url, "--trace", trace, "--scale", 1000, "--longest", 1000)
        assert code == 0 and "2 of 2 answered, 1 of the trace left out" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("http://127.0.0.1:1",), "connection refused"),
        (("http://x", "--rate", "2", "--concurrency", "3"), "exclude one another"),
        (("http://x", "--slo", "p99=3"), "neither ttft="),
        (("http://x", "--rate", "0"), "not above 0"),
        (("http://x", "--body", "[]"), "no JSON object"),
        (("http://x", "--abandon", "2"), "share of 0 to 1"),
        (("http://x", "--prompt-tokens", "many"), "no length"),
    ],
)
def test_command_refuses_in_one_line(capsys, monkeypatch, arguments, told):
    if arguments[0] == "http://x":
        monkeypatch.setattr(load, "prepare", lambda *a, **b: (load.Target(Endpoint("x", 1), "m"), Prompts(0)))
    code, out, err = command(capsys, *arguments)
    assert code == 2 and told in err and err.count("\n") == 1 and not out
