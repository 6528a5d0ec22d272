"""A server in a process of its own, and a small client on the standard library."""

import contextlib
import http.client
import importlib.util
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import lowbit

START_SECONDS = 90  # generous: the machine may be busy

_SPEC = importlib.util.spec_from_file_location(
    "tiny_checkpoint", Path(__file__).resolve().parents[1] / "tiny_checkpoint.py"
)
tiny_checkpoint = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_checkpoint)
tiny_checkpoint.CONTEXT = 4096  # room for tools and for streams that last
tiny_model, base_model = tiny_checkpoint.tiny_model, tiny_checkpoint.base_model


class Answer:
    """status, headers and body of a response."""

    def __init__(self, response, body):
        self.status, self.headers, self.body = response.status, response.headers, body

    def json(self):
        return json.loads(self.body)

    def error(self):
        """The error object, after a check that it has OpenAI's shape."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str) and isinstance(error["type"], str)
        return error


class Stream:
    """Server-sent events as they arrive. `close` leaves without reading the rest."""

    def __init__(self, connection, response):
        self.connection, self.response = connection, response
        self.status = response.status

    def __iter__(self):
        """Objects of `data:` events, without the last [DONE]."""
        for line in self.lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[6:])

    def lines(self):
        while line := self.response.readline():
            if line.strip():
                yield line.decode().rstrip("\n")

    def close(self):
        self.connection.close()


class Server:
    """`lowbit serve` with these arguments. The process is `process`; `log` gathers its stderr."""

    def __init__(self, *arguments, command=(sys.executable, "-m", "lowbit.cli", "serve")):
        root = Path(lowbit.__file__).parents[1]
        self.log = []
        self._lines = queue.Queue()
        self.process = subprocess.Popen(
            [*command, *map(str, arguments), "--port", "0"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        found = self.wait_for(r"listening on (https?)://([\d.]+):(\d+)")
        self.host, self.port = found[2], int(found[3])
        self.url = f"{found[1]}://{self.host}:{self.port}"

    def _read(self):
        for line in self.process.stderr:
            self.log.append(line)
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, pattern):
        """The match of the next line of the log that has `pattern`."""
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no {pattern!r} in the log:\n{''.join(self.log)}")
            if line is None:
                pytest.fail(f"the server ended:\n{''.join(self.log)}")
            if found := re.search(pattern, line):
                return found

    def connect(self):
        return http.client.HTTPConnection(self.host, self.port, timeout=60)

    def request(self, method, path, body=None, headers=None):
        """body: bytes as they are, or something to send as JSON."""
        connection = self.connect()
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, body, {"content-type": "application/json", **(headers or {})})
            response = connection.getresponse()
            return Answer(response, response.read())

    def get(self, path, headers=None):
        return self.request("GET", path, headers=headers)

    def post(self, path, body, headers=None):
        return self.request("POST", path, body, headers)

    def complete(self, **fields):
        """The object of a completion that must succeed."""
        answer = self.post("/v1/completions", {"prompt": "Hello", "temperature": 0, **fields})
        assert answer.status == 200, answer.body
        return answer.json()

    def stream(self, path, headers=None, **fields):
        connection = self.connect()
        body = json.dumps({"stream": True, **fields}).encode()
        connection.request("POST", path, body, {"content-type": "application/json", **(headers or {})})
        return Stream(connection, connection.getresponse())

    def engine(self, model=0):
        """The engine's counters."""
        return self.get("/stats").json()["models"][model]["engine"]

    def until(self, condition, what, seconds=60):
        """Poll `condition()` until it is true; fail after `seconds`."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what} did not come true\n{''.join(self.log)}"
            time.sleep(0.02)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)
        self.process.stderr.close()


@pytest.fixture(scope="module")
def start_server():
    """Return start(*arguments) -> Server; all are stopped at the end of the module."""
    for package in ("uvicorn", "uvloop", "httptools", "msgspec", "prometheus_client", "llguidance"):
        pytest.importorskip(package, reason=f"{package} of lowbit[serve] is not installed")
    servers = []

    def start(*arguments, **more):
        servers.append(Server(*arguments, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(start_server, tiny_model):
    """One server for the module, with the small model."""
    return start_server(tiny_model, "--threads", 1, "--max-sequences", 8, "--max-body-mb", 1)


@pytest.fixture(scope="module")
def start_slow(start_server, tiny_model):
    """Return start(**options of slow_server.py) -> Server."""
    path = Path(__file__).with_name("slow_server.py")

    def start(**options):
        return start_server(tiny_model, json.dumps(options), command=(sys.executable, path))

    return start
