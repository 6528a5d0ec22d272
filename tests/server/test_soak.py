"""Many requests from clients that leave at random moments: nothing is left of them, in either process."""

import json
import random
import sys
import threading

import pytest

REQUESTS, CLIENTS = 400, 8
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


def ask(server, chance):
    """One request, left after a random number of bytes or read to its end."""
    path = chance.choice(PATHS)
    text = "x" * chance.choice([1, 30, 700])
    tokens = chance.choice([1, 5, 60])
    body = {"stream": chance.random() < 0.7, "temperature": 1.0, "seed": chance.randrange(9)}
    if path.endswith("responses"):
        body |= {"input": text, "max_output_tokens": tokens}
    elif "chat" in path:
        body |= {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "n": chance.choice([1, 2]),
        }
    else:
        body |= {"prompt": text, "max_tokens": tokens, "logprobs": chance.choice([None, 2])}
    connection = server.connect()
    try:
        connection.request("POST", path, json.dumps(body))
        leave = chance.random()
        if leave < 0.2:
            return
        response = connection.getresponse()
        assert response.status == 200
        if leave < 0.5:
            response.read(chance.randrange(1, 400))
        else:
            assert response.read()
    finally:
        connection.close()


def soak(server, requests):
    left = iter(range(requests))
    failures = []

    def run():
        for number in left:
            try:
                ask(server, random.Random(number))
            except Exception as error:  # told by the main thread
                failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not failures, failures


def memory_kb(pid):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc")
def test_soak(server):
    soak(server, REQUESTS // 2)
    children = f"/proc/{server.process.pid}/task/{server.process.pid}/children"
    with open(children) as file:
        pids = [server.process.pid, *map(int, file.read().split())]
    before = [memory_kb(pid) for pid in pids]
    soak(server, REQUESTS)
    server.until(lambda: server.get("/stats").json()["in_flight"] == 1, "the end of all answers")

    def at_rest():
        engine = server.engine()
        idle = engine["running"] == engine["waiting"] == 0
        return idle and engine["kv_blocks_used"] == engine["kv_blocks_cached"]

    server.until(at_rest, "rest")
    stats = server.get("/stats").json()
    assert sum(stats["models"][0]["finished"].values()) >= REQUESTS * 3 // 2 - REQUESTS // 4
    assert not [row for row in stats["requests"] if row["status"] >= 500]
    for pid, kilobytes in zip(pids, before):
        assert memory_kb(pid) < kilobytes + 8000, (memory_kb(pid), kilobytes)
