"""The little of HTTP that routes need, on ASGI: a body read within limits, an answer, a stream.

No middleware and no framework stands between the engine and the socket: each token costs one write.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from lowbit.server.errors import ApiError
from lowbit.server.generation import Generation
from lowbit.server.render import PING, Renderer, encode

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

JSON = b"application/json"
MAX_DISCARDED_BYTES = 64 << 20
EVENTS = b"text/event-stream; charset=utf-8"


class Disconnected(Exception):
    """The client left before it had sent all of its request."""


async def read_body(scope: Scope, receive: Receive, limit: int, seconds: float) -> bytes:
    """The body, at most `limit` bytes within `seconds`."""
    try:
        return await asyncio.wait_for(_read(receive, limit), seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s; send it faster") from None


async def _read(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        size += len(message["body"])
        if size <= limit:
            parts.append(message["body"])
        else:  # read on for a while, or the client would meet a closed connection and not the reason
            parts.clear()
        if not message.get("more_body") or size > limit + MAX_DISCARDED_BYTES:
            break
    if size > limit:
        raise _too_large(size, limit)
    return b"".join(parts)


def _too_large(size: int, limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body has {size} bytes or more; at most {limit} are allowed: send less, or serve with a larger "
        "--max-body-mb",
        code="request_too_large",
    )


def header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


async def send_bytes(
    send: Send, status: int, body: bytes, kind: bytes = JSON, headers: tuple[tuple[bytes, bytes], ...] = ()
) -> None:
    fields = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, value: Any, status: int = 200) -> None:
    await send_bytes(send, status, encode(value))


async def send_error(send: Send, error: ApiError, close: bool = False) -> None:
    headers: tuple[tuple[bytes, bytes], ...] = ()
    if error.retry_after is not None:
        headers += ((b"retry-after", b"%d" % max(1, round(error.retry_after))),)
    if error.status == 401:
        headers += ((b"www-authenticate", b"Bearer"),)
    if error.allow is not None:
        headers += ((b"allow", error.allow.encode()),)
    if close:
        headers += ((b"connection", b"close"),)
    await send_bytes(send, error.status, encode(error.body()), headers=headers)


async def watch(receive: Receive, generation: Generation) -> None:
    """Ends the generation when its client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.leave("disconnected")


def abort_connection(send: Send) -> None:
    """Drop the connection without waiting for a client that does not read.

    uvicorn's `send` is a method of the object that holds the transport; ASGI has no word for this.
    """
    transport = getattr(getattr(send, "__self__", None), "transport", None)
    if transport is not None:
        transport.abort()


async def answer(generation: Generation, renderer: Renderer, send: Send) -> int:
    """Write the answer of a generation that was started; returns the status."""
    if generation.job.stream:
        return await _stream(generation, renderer, send)
    while not generation.over:
        await generation.wake.wait()
        generation.wake.clear()
    if generation.error is not None:
        await send_error(send, generation.error)
        return generation.error.status
    if generation.done:
        await send_bytes(send, 200, encode(renderer.whole()))
    return 200


async def _stream(generation: Generation, renderer: Renderer, send: Send) -> int:
    wake = generation.wake
    while not (generation.accepted or generation.over):
        await wake.wait()
        wake.clear()
    if generation.error is not None:  # refused before the first byte: a plain error
        await send_error(send, generation.error)
        return generation.error.status
    headers = [(b"content-type", EVENTS), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    data = renderer.opening()
    while True:
        for choice in generation.take_dirty():
            data += renderer.delta(choice)
        if generation.error is not None:
            data += renderer.failure(generation.error)
        elif generation.done:
            data += renderer.closing()
        over = generation.over
        if not data and generation.ping:
            data = PING
        generation.ping = False
        if data or over:
            generation.spoken = generation.writing_since = time.monotonic()
            await send({"type": "http.response.body", "body": data, "more_body": not over})
            generation.writing_since = None
            data = b""
        if over:
            return 200
        await wake.wait()
        wake.clear()


def check_origin(scope: Scope) -> None:
    """Refuse what a page of another site sends through the user's browser: a server on 127.0.0.1 is reachable
    from there, and a page can POST without asking."""
    origin = header(scope, b"origin")
    if origin is None:
        return
    if origin.split(b"://")[-1] != header(scope, b"host"):
        raise ApiError(
            403,
            f"origin {origin.decode(errors='replace')[:100]!r}: pages of other sites may not use this "
            "server; ask from its own page, or from a program",
        )
