"""uvicorn's HTTP connection with bounds on the head of a request, which it has none of.

A client that opens a connection and says nothing, or sends its headers for ever, would hold it (and, in the
second case, memory) until the server ends.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10


class Connection(HttpToolsProtocol):
    """Closes itself if the head of a request is too large or does not come in time."""

    head_seconds = 30.0
    _head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if self._timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The request's head has more than {MAX_HEAD_BYTES} bytes.")

    def _expect_head(self) -> None:
        self._timer = self.loop.call_later(self.head_seconds, self._too_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()


def connection(head_seconds: float) -> type[Connection]:
    """The class for connections whose heads must come within `head_seconds`."""
    return type("Connection", (Connection,), {"head_seconds": head_seconds})
