"""A scripted server for the page: it says what a test wants to hear, which no real model does on command."""

import asyncio
import json
import os
import socket
import threading
import time

import pytest

from lowbit.server import page_files
from lowbit.server.stats import Counters, EngineStats, build

ENGINE = dict.fromkeys(EngineStats.__annotations__, 0) | {
    "kv_blocks_total": 40,
    "kv_tokens_total": 40 * 256,
    "steps": {"decode": 0},
    "step_seconds": {"decode": 0.0},
}


def description(name, bits=4.5, size=76_000_000, chat=True):
    return {
        "id": name,
        "format": f"int{int(bits)}-g32",
        "bits_per_weight": bits,
        "weights_bytes": size,
        "kv_bits": 8,
        "context": 2048,
        "chat": chat,
    }


class ScriptedServer:
    """answer(body) -> pieces of text. failures: (status, headers, message) given instead, first to last.

    bodies: what was asked. key: the API key it wants, if any. away: it answers 502. cut: end the stream after
    this many pieces, without [DONE]. aborted: how many streams the client left. rates: tokens per second that
    it claims, by model.
    """

    def __init__(self):
        self.reset()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"

    def reset(self):
        self.models = [description("four"), description("three", bits=3.25, size=55_000_000)]
        self.engines = {model["id"]: dict(ENGINE) for model in self.models}
        self.answer = lambda body: ["Hello ", "there."]
        self.pause = 0.0
        self.rates = {"four": 100.0, "three": 150.0}
        self.failures, self.bodies, self.paths = [], [], []
        self.key, self.away = None, False
        self.aborted = 0
        self.cut = None

    def start(self):
        import uvicorn

        config = uvicorn.Config(self, host="127.0.0.1", port=self.port, log_level="critical", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        end = time.monotonic() + 30
        while not self.server.started:
            assert time.monotonic() < end
            time.sleep(0.01)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(30)

    async def __call__(self, scope, receive, send):
        path = scope["path"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.paths.append(path)
        if path == "/" or path.startswith("/page/"):
            name = "index.html" if path == "/" else path.removeprefix("/page/")
            status, kind, more, body = page_files.respond(name, headers.get("if-none-match"))
            fields = {"content-type": kind.decode()} | {key.decode(): value.decode() for key, value in more}
            await reply(send, status, fields, body)
        elif self.away:
            await reply(send, 502, {}, b"no such host")
        elif self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            await reply(send, *failure(401, "give a key that this server knows"))
        elif path == "/v1/models":
            data = [{"id": model["id"], "object": "model"} for model in self.models]
            await reply(send, 200, {}, json.dumps({"object": "list", "data": data}).encode())
        elif path == "/stats":
            counters = Counters(self.engines)
            stats = build(counters, self.models, self.engines, version="test")
            await reply(send, 200, {}, json.dumps(stats).encode())
        else:
            await self.complete(path, receive, send)

    async def complete(self, path, receive, send):
        message = await receive()
        while message.get("more_body"):
            more = await receive()
            message = {**more, "body": message["body"] + more["body"]}
        body = json.loads(message["body"])
        self.bodies.append(body)
        if self.failures:
            status, headers, text = self.failures.pop(0)
            await reply(send, *failure(status, text, headers))
            return
        await start(send, 200, {"content-type": "text/event-stream"})
        left = asyncio.create_task(receive())
        await event(send, ": ping\n\n")
        for i, piece in enumerate(self.answer(body)):
            if self.cut == i:
                await send({"type": "http.response.body", "body": b""})
                return
            if self.pause:
                await asyncio.sleep(self.pause)
            if left.done():
                self.aborted += 1
                return
            choice = {"text": piece} if path == "/v1/completions" else {"delta": {"content": piece}}
            self.engines[body["model"]]["generated_tokens"] += 1
            await event(send, f"data: {json.dumps({'choices': [{**choice, 'index': 0}]})}\n\n")
        usage = {
            "prompt_tokens": 30,
            "completion_tokens": i + 1,
            "prompt_tokens_details": {"cached_tokens": 20},
            "completion_tokens_details": {"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 1},
        }
        last = {"choices": [{"delta": {}, "index": 0, "finish_reason": "stop"}]}
        if body["model"] in self.rates:
            last["timings"] = {"tokens_per_second": self.rates[body["model"]]}
        await event(send, f"data: {json.dumps(last)}\n\n")
        await event(send, f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n")
        left.cancel()
        await send({"type": "http.response.body", "body": b""})


def failure(status, message, headers=()):
    body = b"busy" if message is None else json.dumps({"error": {"message": message}}).encode()
    return status, dict(headers), body


async def start(send, status, headers):
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})


async def event(send, text):
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def reply(send, status, headers, body):
    await start(send, status, headers)
    await send({"type": "http.response.body", "body": body})


# No name but the machine's own is resolved: the page works offline.
ARGUMENTS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
CHROMIUM = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")


def chromium(playwright):
    """A Chromium of the system or of playwright; skips where there is none."""
    found = next((path for path in CHROMIUM if os.path.exists(path)), None)
    try:
        return playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
    except Exception as error:
        pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")


def watched(context, url):
    """(page, complaints): a page of `url`; whatever it asks of others is a complaint, as is an error."""
    page, complaints = context.new_page(), []
    page.set_default_timeout(20_000)
    page.on(
        "request",
        lambda asked: asked.url.startswith((url, "data:")) or complaints.append(f"asked {asked.url}"),
    )
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("console", lambda line: line.type in ("error", "warning") and complaints.append(line.text))
    page.complaints = complaints
    return page, complaints


def until(page, condition, seconds=20):
    """Wait for `condition()`, letting the page go on meanwhile."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        page.wait_for_timeout(10)


@pytest.fixture(scope="module")
def scripted():
    pytest.importorskip("uvicorn", reason="the page is served by uvicorn")
    server = ScriptedServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright")
    with sync_api.sync_playwright() as playwright:
        yield chromium(playwright)


@pytest.fixture
def server(scripted):
    scripted.reset()
    return scripted


@pytest.fixture(scope="module")
def tab(browser, scripted):
    """One tab for all tests: a new one costs more than most of them."""
    context = browser.new_context()
    yield watched(context, scripted.url)[0]
    context.close()


@pytest.fixture
def page(tab, server):
    """The page, opened for the first time. Ends with no error in the console, and no other host asked."""
    tab.goto(f"{server.url}page/page.css")  # the same origin, without a script that could keep something
    tab.evaluate("localStorage.clear(); sessionStorage.clear()")
    tab.complaints.clear()
    tab.goto(server.url)
    tab.wait_for_selector("#model-a option", state="attached")
    yield tab
    assert tab.complaints == []


# The gauges are read now, instead of once a second.
POLL = "async () => (await import('/page/gauges.js')).pollNow()"


def ask(page, question):
    page.fill("#question", question)
    page.keyboard.press("Enter")


def answered(page, n=1):
    """The texts of the last turn's answers, once all are there."""
    page.wait_for_function(
        "n => document.querySelectorAll('.last .answer[data-status=done]').length === n", arg=n
    )
    return [node.inner_text() for node in page.query_selector_all(".last .text")]
