"""One streamed request to a server that speaks the OpenAI protocol, and when each piece of its answer came.

Written on bare asyncio, because the client shares the machine with the server that it measures: while an
answer arrives only the HTTP framing is read and the clock noted; events and JSON are read when it is whole.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lowbit.errors import RequestError

HEAD_LIMIT = 1 << 16  # bytes of status line and headers
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Endpoint:
    """Where a server is: `base` is the path that every route starts with, such as `/v1`."""

    host: str
    port: int
    base: str = "/v1"
    tls: bool = False
    api_key: str | None = None

    @staticmethod
    def parse(url: str, api_key: str | None = None) -> Endpoint:
        """From `http://host:port`, `https://host/v1`, .. ; without a path it is `/v1`."""
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise RequestError(f"{url!r} is not the address of a server; write http://127.0.0.1:8080")
        tls = parts.scheme == "https"
        return Endpoint(
            parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/") or "/v1", tls, api_key
        )

    def message(self, method: str, route: str, body: bytes = b"") -> bytes:
        """A whole HTTP/1.1 request that ends its connection."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.base}{route} HTTP/1.1", f"Host: {host}:{self.port}", "Connection: close"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}", "Accept: */*"]
        lines += [f"Authorization: Bearer {self.api_key}"] if self.api_key else []
        return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Answer:
    """What became of one request. Moments are of time.perf_counter, in seconds.

    started: when it was due; arrivals: when text came, one entry for all that came together; together: how
    many pieces each of them had; ended: when the answer was whole, had failed or was left. Token counts are
    the server's (`usage`); None if it tells none.
    """

    started: float
    ended: float = 0.0
    status: int = 0
    arrivals: list[float] = field(default_factory=list)
    together: list[int] = field(default_factory=list)
    pieces: int = 0  # events with text
    text: str = ""
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    failure: str | None = None
    left: bool = False  # by us, on purpose

    @property
    def tokens(self) -> int:
        """Tokens of the answer; where the server counts none, its pieces."""
        return self.pieces if self.answer_tokens is None else self.answer_tokens

    @property
    def first_token_seconds(self) -> float | None:
        return self.arrivals[0] - self.started if self.arrivals else None

    @property
    def token_seconds(self) -> float | None:
        """Seconds per token after the first."""
        if self.tokens < 2 or len(self.arrivals) < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1)


class _Exchange(asyncio.Protocol):
    """Sends a request and gathers the answer's body, with the moment of each arrival beside its length."""

    def __init__(
        self, message: bytes, done: asyncio.Future[None], leave_after: int | None, every: float = 0.0
    ):
        self.message, self.done, self.leave_after, self.every = message, done, leave_after, every
        self.status = 0
        self.body = bytearray()
        self.arrivals: list[tuple[int, float]] = []  # (bytes of the body so far, moment)
        self.failure: str | None = None
        self.left = False
        self._raw = bytearray()
        self._framing = ""  # chunked, length or close
        self._remaining = 0  # bytes of this chunk, or of the body
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self.message)

    def data_received(self, data: bytes) -> None:
        now, before = time.perf_counter(), len(self.body)
        self._raw += data
        try:
            whole = (self._framing != "" or self._read_head()) and self._read_body()
        except ValueError:
            self.failure, whole = "bad HTTP framing", True
        if len(self.body) > before:
            self.arrivals.append((len(self.body), now))
            if self.leave_after is not None and len(self.arrivals) >= self.leave_after:
                self.left = whole = True
        if whole:
            self.end()
        elif self.every and self._transport is not None:
            self._transport.pause_reading()
            self.done.get_loop().call_later(self.every, self._transport.resume_reading)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            if self._framing != "close":
                self.failure = "connection reset" if error else "connection closed before the answer ended"
            self.done.set_result(None)

    def end(self) -> None:
        """Hang up; what has come so far is the answer."""
        if not self.done.done():
            self.done.set_result(None)
        if self._transport is not None:
            self._transport.abort() if self.left else self._transport.close()

    def _read_head(self) -> bool:
        """Read status and headers once they are whole. Raises ValueError for what is no HTTP."""
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            if len(self._raw) > HEAD_LIMIT:
                raise ValueError
            return False
        first, *lines = self._raw[:end].decode("latin-1").split("\r\n")
        del self._raw[: end + 4]
        protocol, status = first.split(" ", 2)[:2]
        if not protocol.startswith("HTTP/1."):
            raise ValueError
        self.status = int(status)
        if self.status < 200:  # an interim answer; the real one follows
            return self._read_head()
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if "chunked" in headers.get("transfer-encoding", "").lower():
            self._framing = "chunked"
        elif "content-length" in headers:
            self._framing, self._remaining = "length", int(headers["content-length"])
        else:
            self._framing = "close"
        return True

    def _read_body(self) -> bool:
        """Move what has come into `body`; True when the body is whole."""
        raw = self._raw
        if self._framing != "chunked":
            self.body += raw
            self._remaining -= len(raw)
            raw.clear()
            return self._framing == "length" and self._remaining <= 0
        at, whole = 0, False
        while at < len(raw):
            if self._remaining:
                taken = raw[at : at + self._remaining]
                self.body += taken
                self._remaining -= len(taken)
                at += len(taken)
                continue
            end = raw.find(b"\r\n", at)
            if end < 0:
                break
            line = raw[at:end]
            at = end + 2
            if line:  # the empty one ends the data of the chunk before
                self._remaining = int(line.split(b";")[0], 16)
                if self._remaining == 0:
                    whole = True
                    break
        del raw[:at]
        return whole


async def ask(
    endpoint: Endpoint,
    route: str,
    body: Mapping[str, Any],
    *,
    started: float | None = None,
    timeout: float = 600.0,
    leave_after: int | None = None,
    every: float = 0.0,
) -> Answer:
    """Send `body` to `route` and wait for the whole answer; a failure is named in the Answer, never raised.

    started: the moment from which the answer's times count; default is now. leave_after: hang up without a
    word after so many arrivals; 0: as soon as the request is sent. every: read at most once in so many
    seconds, which costs less and makes arrivals as coarse.
    """
    message = endpoint.message("POST", route, json.dumps(body).encode())
    answer = Answer(time.perf_counter() if started is None else started)
    exchange = await _exchange(endpoint, message, timeout, leave_after, every)
    answer.ended = time.perf_counter()
    answer.status, answer.left, answer.failure = exchange.status, exchange.left, exchange.failure
    read(exchange, answer)
    return answer


async def get(endpoint: Endpoint, route: str, timeout: float = 10.0) -> Any:
    """The JSON at `route`, or None if there is none."""
    exchange = await _exchange(endpoint, endpoint.message("GET", route), timeout, None)
    if exchange.failure or exchange.status != 200:
        return None
    return _json(bytes(exchange.body))


async def _exchange(
    endpoint: Endpoint, message: bytes, timeout: float, leave_after: int | None, every: float = 0.0
) -> _Exchange:
    loop = asyncio.get_running_loop()
    exchange = _Exchange(message, loop.create_future(), leave_after, every)
    tls = ssl.create_default_context() if endpoint.tls else None
    connecting = loop.create_connection(lambda: exchange, endpoint.host, endpoint.port, ssl=tls)
    try:
        await asyncio.wait_for(connecting, CONNECT_SECONDS)
        if leave_after == 0:
            exchange.left = True
            await asyncio.sleep(0.02)  # let the request leave first
            exchange.end()
        await asyncio.wait_for(exchange.done, timeout)
    except asyncio.TimeoutError:
        exchange.failure = "timeout"
        exchange.end()
    except ConnectionRefusedError:
        exchange.failure = "connection refused"
    except OSError as error:
        exchange.failure = f"cannot connect: {error.strerror or type(error).__name__}"
    return exchange


def read(exchange: _Exchange, answer: Answer) -> None:
    """Fill in what the body says. A failure that the answer has already keeps its name."""
    body = bytes(exchange.body)
    if answer.status and answer.status != 200:
        answer.failure = answer.failure or f"HTTP {answer.status}{_reason(_json(body))}"
        return
    texts: list[str] = []
    done, at = False, 0
    for end, data in events(body):
        if data == b"[DONE]":
            done = True
            continue
        event = _json(data)
        if not isinstance(event, dict):
            answer.failure = answer.failure or "an event that is no JSON object"
            continue
        if event.get("error"):
            answer.failure = answer.failure or f"error event{_reason(event)}"
            continue
        _count(event.get("usage"), answer)
        text = _text(event, answer)
        if text:
            texts.append(text)
            answer.pieces += 1
            while exchange.arrivals[at][0] < end:
                at += 1
            moment = exchange.arrivals[at][1]
            if not answer.arrivals or answer.arrivals[-1] != moment:
                answer.arrivals.append(moment)
                answer.together.append(0)
            answer.together[-1] += 1
    answer.text = "".join(texts)
    if not (done or answer.finish_reason or answer.left or answer.failure):
        answer.failure = "the stream ended before the answer"


def events(body: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset of its end, data) of every server-sent event with data. All else is skipped."""
    data: list[bytes] = []
    at = 0
    while at < len(body):
        end = body.find(b"\n", at)
        line = body[at : end if end >= 0 else len(body)].rstrip(b"\r")
        at = end + 1 if end >= 0 else len(body)
        if line.startswith(b"data:"):
            data.append(line[6:] if line[5:6] == b" " else line[5:])
        elif not line and data:
            yield at, b"\n".join(data)
            data = []
    if data:  # a last event without its blank line
        yield len(body), b"\n".join(data)


def _text(event: Mapping[str, Any], answer: Answer) -> str:
    """New text of an event, of whatever kind; notes why the answer ended."""
    found = ""
    for choice in event.get("choices") or ():
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        delta = choice.get("delta") or {}
        for value in (choice.get("text"), *(delta.get(key) for key in ("content", "reasoning_content"))):
            found += value or ""
        for call in delta.get("tool_calls") or ():
            found += (call.get("function") or {}).get("arguments") or ""
    return found


def _count(usage: Any, answer: Answer) -> None:
    if isinstance(usage, dict):
        answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
        answer.answer_tokens = usage.get("completion_tokens", answer.answer_tokens)
        details = usage.get("prompt_tokens_details") or {}
        answer.cached_tokens = details.get("cached_tokens", answer.cached_tokens)


def _reason(value: Any) -> str:
    """` (code)` of an error body, as far as it has one."""
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict):
        error = error.get("code") or error.get("type") or error.get("message")
    return f" ({str(error)[:80]})" if error else ""


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None
