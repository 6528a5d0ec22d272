"""Whatever clients and processes do, the server goes on. One test per fault."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")

LONG = {"max_tokens": 3000, "ignore_eos": True, "temperature": 0}


def at_rest(server):
    """Nothing runs or waits, and only the prefix cache holds blocks."""
    engine = server.engine()
    return (
        engine["running"] == engine["waiting"] == 0 and engine["kv_blocks_used"] == engine["kv_blocks_cached"]
    )


def head(length):
    """Of a completion of Anna's, for clients of our own."""
    lines = (
        "POST /v1/completions HTTP/1.1",
        "Host: x",
        "Authorization: Bearer anna",
        f"Content-Length: {length}",
    )
    return "\r\n".join([*lines, "", ""]).encode()


def engine_pid(server):
    children = f"/proc/{server.process.pid}/task/{server.process.pid}/children"
    with open(children) as file:
        [pid] = [int(word) for word in file.read().split()]
    return pid


@pytest.fixture(scope="module")
def slow(start_slow):
    """One request at a time, 64 prompt tokens per step, 5 ms per step."""
    return start_slow(
        step_seconds=0.005,
        engine={"max_sequences": 1, "chunk_tokens": 64, "prefix_cache": False, "max_queued_tokens": 3500},
        limits={"write_seconds": 0.5, "ping_seconds": 0.5, "body_seconds": 0.5, "requests": 40},
        keys=["anna", "ben"],
    )


@pytest.fixture
def key():
    return {"authorization": "Bearer anna"}


def rest(server, key):
    def check():
        engine = server.get("/stats", key).json()["models"][0]["engine"]
        return engine["running"] == engine["waiting"] == engine["kv_blocks_used"] == 0

    return check


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("phase", ["queued", "prompt", "decode"])
def test_disconnect(slow, key, phase, streaming):
    """The engine forgets the request within a step, whatever it was doing with it."""

    def counters():
        return slow.get("/stats", key).json()["models"][0]["engine"]

    before = counters()
    companions = []
    if phase == "queued":
        companions.append(slow.stream("/v1/completions", key, prompt="a", **LONG))
        next(iter(companions[0]))
    prompt = "word " * 600 if phase == "prompt" else "b"
    body = {"prompt": prompt, **LONG, "stream": streaming}
    connection = slow.connect()
    connection.request("POST", "/v1/completions", json.dumps(body), key)
    waiting = 1 if phase == "queued" else 0
    slow.until(lambda: counters()["waiting"] == waiting and counters()["running"] == 1, "the phase")
    if phase == "decode":
        slow.until(lambda: counters()["generated_tokens"] > before["generated_tokens"] + 2, "a token")
    connection.close()
    slow.until(lambda: counters()["waiting"] == 0 and counters()["running"] == len(companions), "the end")
    for companion in companions:
        companion.close()
    slow.until(rest(slow, key), "rest")
    after = counters()
    assert after["generated_tokens"] - before["generated_tokens"] < 1000
    if phase == "prompt":
        assert after["prompt_tokens"] - before["prompt_tokens"] < 3000


def test_slow_reader(slow, key):
    """A client that stops reading is dropped; another is answered meanwhile."""
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.connect((slow.host, slow.port))
    # Fat chunks: the names and log-probabilities of 20 tokens each.
    body = json.dumps(
        {"prompt": ["x"] * 4, **LONG, "logprobs": 20, "stream": True, "max_tokens": 500}
    ).encode()
    lazy.sendall(head(len(body)) + body)
    count = 'lowbit_requests_finished_total{model="tiny",reason="slow_reader"}'
    slow.until(lambda: count in slow.get("/metrics", key).body.decode(), "the drop", seconds=60)
    slow.until(rest(slow, key), "rest")
    lazy.close()
    answer = slow.post("/v1/completions", {"prompt": "x", "max_tokens": 3}, key)
    assert answer.status == 200


def test_a_flooding_tenant_does_not_starve_another(slow, key):
    """Anna sends twenty requests at once; Ben's only one is among the first that are answered."""
    done = []

    def ask(name):
        fields = {"prompt": name, "max_tokens": 10, "ignore_eos": True}
        slow.post("/v1/completions", fields, {"authorization": f"Bearer {name}"})
        done.append(name)

    threads = [threading.Thread(target=ask, args=("anna",)) for _ in range(20)]
    for thread in threads:
        thread.start()
    slow.until(lambda: slow.get("/stats", key).json()["models"][0]["engine"]["waiting"] >= 15, "the flood")
    ben = threading.Thread(target=ask, args=("ben",))
    ben.start()
    for thread in [*threads, ben]:
        thread.join(60)
    assert len(done) == 21
    assert done.index("ben") < 12


def test_one_tenant_may_not_take_every_slot(slow, key):
    """Half of the 40 requests may be one key's; the next gets 429 and when to come back."""
    streams = [slow.stream("/v1/completions", key, prompt="a", **LONG) for _ in range(20)]
    refused = slow.post("/v1/completions", {"prompt": "a"}, key)
    assert refused.status == 429 and refused.error()["code"] == "too_many_requests"
    assert int(refused.headers["retry-after"]) >= 1
    streams.append(slow.stream("/v1/completions", {"authorization": "Bearer ben"}, prompt="a", **LONG))
    assert [stream.status for stream in streams] == [200] * 21
    for stream in streams:
        stream.close()
    slow.until(rest(slow, key), "rest")
    assert slow.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, key).status == 200


def test_a_full_queue(slow, key):
    """More prompt tokens than may wait: 429, and an estimate of when to come back."""
    streams = [slow.stream("/v1/completions", key, prompt="a", **LONG)]
    next(iter(streams[0]))
    streams.append(slow.stream("/v1/completions", key, prompt="b" * 2000, **LONG))
    assert streams[1].status == 200
    for streaming in (False, True):
        refused = slow.post("/v1/completions", {"prompt": "c" * 2000, "stream": streaming}, key)
        assert refused.status == 429 and refused.error()["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        assert "max_queued_tokens=3500" in refused.error()["message"]
    for stream in streams:
        stream.close()
    slow.until(rest(slow, key), "rest")


def test_no_tenant_is_before_another(slow, key):
    refused = slow.post("/v1/completions", {"prompt": "a", "priority": 1}, key)
    assert refused.status == 400 and refused.error()["param"] == "priority"
    assert slow.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "priority": -1}, key).status == 200


def test_wrong_keys(slow):
    for headers in (
        {},
        {"authorization": "Bearer carl"},
        {"authorization": "Basic anna"},
        {"authorization": ""},
    ):
        for path in ("/v1/models", "/stats", "/metrics"):
            answer = slow.get(path, headers)
            assert answer.status == 401 and answer.error()["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert slow.post("/v1/completions", {"prompt": "a"}, headers).status == 401
    assert slow.get("/health").status == slow.get("/ready").status == 200


def test_a_body_that_does_not_come(slow, key):
    with socket.create_connection((slow.host, slow.port), timeout=30) as client:
        client.sendall(head(100) + b"{")
        assert client.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_does_not_come_or_end(slow):
    with socket.create_connection((slow.host, slow.port), timeout=30) as client:
        assert client.recv(4096) == b""  # nothing was sent: the server closes
    with socket.create_connection((slow.host, slow.port), timeout=30) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        assert client.recv(4096) == b""
    with socket.create_connection((slow.host, slow.port), timeout=30) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: " + b"x" * 70_000)
        assert client.recv(4096).startswith(b"HTTP/1.1 400 ")
    with socket.create_connection((slow.host, slow.port), timeout=30) as client:
        for _ in range(2):  # a connection that is kept and used again outlives the time for a head
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):  # head and body may come apart
                piece = client.recv(4096)
                assert piece, answer
                answer += piece
            assert answer.startswith(b"HTTP/1.1 200 ")
            time.sleep(0.7)


def test_silence_is_broken_by_pings(slow, key):
    """A stream that waits for its turn says so."""
    first = slow.stream("/v1/completions", key, prompt="a", **LONG)
    next(iter(first))
    second = slow.stream("/v1/completions", key, prompt="b", **LONG)
    assert next(second.lines()) == ": ping"
    first.close()
    second.close()
    slow.until(rest(slow, key), "rest")


def test_progress_of_a_long_prompt(slow, key):
    """return_progress: how much of the prompt is read, every 64 tokens."""
    fields = {"prompt": "word " * 200, "max_tokens": 2, "return_progress": True}
    events = list(slow.stream("/v1/completions", key, **fields))
    told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    read = [progress["processed"] for progress in told]
    assert read == sorted(read) and read[0] in (0, 64) and len(read) > 10
    assert {progress["total"] for progress in told} == {1000} and read[-1] < 1000
    assert events[-1]["choices"][0]["finish_reason"]


def test_kv_exhaustion(start_slow):
    """Four requests in memory for one and a half: they are preempted, and say what they say alone."""
    server = start_slow(step_seconds=0, engine={"kv_blocks": 3, "max_sequences": 4, "prefix_cache": False})
    fields = {"max_tokens": 400, "ignore_eos": True, "temperature": 0.9}
    prompts = ["one", "two", "three", "four"]
    alone = [server.complete(prompt=p, seed=i, **fields) for i, p in enumerate(prompts)]
    together = [None] * len(prompts)

    def ask(i):
        together[i] = server.complete(prompt=prompts[i], seed=i, **fields)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [a["choices"] for a in together] == [a["choices"] for a in alone]
    assert server.engine()["preemptions"] > 0
    assert at_rest(server)
    # Then the API process dies: the engine does not outlive it.
    pid = engine_pid(server)
    server.process.kill()
    server.process.wait()
    server.until(lambda: not os.path.exists(f"/proc/{pid}"), "the engine's end")


@pytest.fixture(scope="module")
def watched(start_slow):
    return start_slow(heartbeat=1.5)


def test_the_engine_is_killed(watched):
    """Its clients get an error event, the API answers 503 meanwhile, and a new engine says the same."""
    server = watched

    # First it only hangs: not ready until it is heard of again.
    def hangs():
        os.kill(engine_pid(server), signal.SIGSTOP)  # again, should anybody wake it
        return server.get("/ready").status == 503

    server.until(hangs, "the silence")
    assert server.get("/ready").json()["models"]["tiny"].startswith("silent for ")
    os.kill(engine_pid(server), signal.SIGCONT)
    server.until(lambda: server.get("/ready").status == 200, "the heartbeat")
    before = server.complete(max_tokens=20)["choices"]
    stream = server.stream("/v1/completions", prompt="Hello", **LONG)
    events = iter(stream)
    next(events)
    waiting = []
    blocked = threading.Thread(
        target=lambda: waiting.append(server.post("/v1/completions", {"prompt": "a", **LONG}))
    )
    blocked.start()
    server.until(lambda: server.engine()["running"] == 2, "both")
    pid = engine_pid(server)
    os.kill(pid, signal.SIGKILL)
    *_, last = events
    assert last["error"]["code"] == "engine_died" and "send it again" in last["error"]["message"]
    blocked.join(30)
    assert waiting[0].status == 503 and waiting[0].error()["code"] == "engine_died"
    refused = server.post("/v1/completions", {"prompt": "a"})
    assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
    assert server.get("/health").status == 200
    assert server.get("/ready").status == 503
    assert server.get("/stats").json()["models"][0]["engine"] is None
    server.until(lambda: server.get("/ready").status == 200, "the restart")
    assert any("engine tiny ended (signal 9)" in line for line in server.log)
    assert engine_pid(server) != pid
    assert server.complete(max_tokens=20)["choices"] == before
    assert server.get("/stats").json()["models"][0]["restarts"] == 1


def test_sigterm(watched):
    """What runs is finished, what comes is refused, and then it ends with status 0."""
    server = watched
    stream = server.stream("/v1/completions", prompt="Hello", max_tokens=60, ignore_eos=True)
    events = iter(stream)
    next(events)
    pid = engine_pid(server)
    server.process.send_signal(signal.SIGTERM)
    server.until(lambda: server.get("/ready").status == 503, "the drain")
    refused = server.post("/v1/completions", {"prompt": "a"})
    assert refused.status == 503 and refused.error()["code"] == "shutting_down"
    assert refused.headers["connection"] == "close"
    *_, last = events
    assert last["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(30) == 0
    assert not os.path.exists(f"/proc/{pid}")


@pytest.fixture(scope="module")
def hasty(start_slow):
    return start_slow(limits={"request_seconds": 0.5, "drain_seconds": 0.2})


def test_an_answer_that_takes_too_long(hasty):
    server = hasty
    answer = server.post("/v1/completions", {"prompt": "a", **LONG})
    assert answer.status == 504 and answer.error()["code"] == "timeout"
    *_, last = server.stream("/v1/completions", prompt="a", **LONG)
    assert last["error"]["code"] == "timeout"
    server.until(lambda: at_rest(server), "rest")


def test_sigterm_does_not_wait_for_ever(hasty):
    server = hasty
    events = iter(server.stream("/v1/completions", prompt="Hello", **LONG))
    next(events)
    server.process.send_signal(signal.SIGTERM)
    *_, last = events
    assert last["error"]["code"] == "shutting_down"
    assert server.process.wait(30) == 0


def test_idle_costs_nothing(server):
    """Both processes together stay below 1% of a processor."""
    server.complete(max_tokens=2)
    pids = [server.process.pid, engine_pid(server)]

    def busy():
        """Seconds on a processor, of all threads."""
        total = 0
        for pid in pids:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/schedstat") as file:
                    total += int(file.read().split()[0])
        return total / 1e9

    time.sleep(0.3)
    before, started = busy(), time.monotonic()
    time.sleep(1.5)
    assert (busy() - before) / (time.monotonic() - started) < 0.01


def test_a_model_that_cannot_be_loaded(tmp_path, start_server):
    """One line that says why, and status 2."""
    (tmp_path / "broken").mkdir()
    with pytest.raises(pytest.fail.Exception, match="the server ended"):
        start_server(tmp_path / "broken")


def test_an_address_in_use(server, tiny_model):
    done = subprocess.run(
        [sys.executable, "-m", "lowbit.cli", "serve", str(tiny_model), "--port", str(server.port)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 2 and "choose another --port" in done.stderr
