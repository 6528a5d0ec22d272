"""A server that speaks as much of the OpenAI protocol as the load generator does, with known timings."""

import asyncio
import json
import threading

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(value):
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def text_event(text, finish=None):
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def usage_event(prompt, answer, cached=0):
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return event({"choices": [], "usage": usage})


class StandIn:
    """Answers `max_tokens` tokens, two in an event, after `first_seconds`, with `gap_seconds` between events.

    A word is two tokens, and a prompt has three more. `script(body) -> [(seconds, bytes)] or None` replaces
    the answer; `refuses` names fields that are answered with status 400.
    """

    def __init__(self, first_seconds=0.0, gap_seconds=0.0, script=None, refuses=()):
        self.first_seconds, self.gap_seconds, self.script, self.refuses = (
            first_seconds,
            gap_seconds,
            script,
            refuses,
        )
        self.gets = {"/v1/models": {"data": [{"id": "stand-in"}]}}
        self.bodies, self.headers, self.hung_up = [], [], 0
        self.running = self.most_running = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _main(self):
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [line.split(":")[1] for line in head.split("\r\n") if line.startswith("Content-Length")]
        length = int(lengths[0]) if lengths else 0
        body = json.loads(await reader.readexactly(length) or b"{}")
        self.headers.append(head)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            for seconds, data in self._answer(head, body):
                await asyncio.sleep(seconds)
                writer.write(data)
                await writer.drain()
                if reader.at_eof():
                    raise ConnectionResetError
        except ConnectionError:
            self.hung_up += 1
        self.running -= 1
        writer.close()

    def _answer(self, head, body):
        if head.startswith("GET"):
            path = head.split()[1]
            return [(0, self._json(200 if path in self.gets else 404, self.gets.get(path, {})))]
        self.bodies.append(body)
        for name in self.refuses:
            if name in body:
                return [(0, self._json(400, {"error": {"code": "unknown_field", "message": name}}))]
        scripted = self.script(body) if self.script else None
        return self._tokens(body) if scripted is None else scripted

    @staticmethod
    def _json(status, value):
        data = json.dumps(value).encode()
        return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data)

    def _tokens(self, body):
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        count = body["max_tokens"]
        steps = [(self.first_seconds, HEAD + chunk(text_event("ab")))]
        steps += [(self.gap_seconds, chunk(text_event("ab"))) for _ in range(2, count, 2)]
        last = text_event("", "length") + usage_event(2 * len(prompt.split()) + 3, count)
        return [*steps, (0, chunk(last) + chunk(event(b"[DONE]")) + b"0\r\n\r\n")]
