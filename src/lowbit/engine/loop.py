"""The engine's thread: steps the core and hands out what it says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from lowbit.engine.answer import Sink
from lowbit.engine.core import EngineCore
from lowbit.engine.request import Output
from lowbit.errors import LowbitError, RequestError, UnsupportedError


class Loop:
    """The core and who waits for what; only the thread in `run` touches either."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        # Everything that others want done; None: stop. A SimpleQueue may be filled from destructors, too.
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._over: Exception | None = None

    # ---- For any thread

    def add(self, sink: Sink) -> None:
        self._command(partial(self._add, sink))

    def cancel(self, request_id: str) -> None:
        self._command(partial(self._cancel, request_id))

    def ask(self, question: Callable[[], Any]) -> Any:
        """The answer of the core, between two steps."""
        answer: Future[Any] = Future()
        self._command(lambda: answer.set_result(question()))
        return answer.result()

    def stop(self) -> None:
        self._commands.put(None)

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        if self._over is not None:  # nobody else will look
            self._drain()

    # ---- For the engine's thread

    def run(self) -> None:
        over: Exception = RequestError("engine: it is closed; make a new one")
        try:
            while self._obey():
                for output in self.core.step():
                    self._deliver(output)
            for request_id in list(self._sinks):
                self.core.cancel(request_id)
            for output in self.core.step():
                self._deliver(output)
        except Exception as error:
            over = LowbitError(f"engine: stopped by {type(error).__name__}: {error}; make a new one")
            over.__cause__ = error
        self._over = over
        for sink in self._sinks.values():
            sink.fail(over)
        self._sinks.clear()
        self._drain()

    def _obey(self) -> bool:
        """Do what others want; with nothing to compute, wait for it. False: stop."""
        wait = self.core.idle
        while True:
            try:
                command = self._commands.get(block=wait)
            except Empty:
                return True
            if command is None:
                return False
            command()
            wait = False

    def _drain(self) -> None:
        while True:
            try:
                command = self._commands.get(block=False)
            except Empty:
                return
            if command is not None:
                command()

    def _add(self, sink: Sink) -> None:
        if self._over is not None:
            sink.fail(self._over)
            return
        try:
            self.core.add(sink.request)
        except Exception as error:
            sink.fail(error)
        else:
            self._sinks[sink.request.request_id] = sink

    def _cancel(self, request_id: str) -> None:
        if self._over is None:
            self.core.cancel(request_id)

    def _deliver(self, output: Output) -> None:
        sink = self._sinks[output.request_id]
        stopped = sink.take(output)
        if output.finish_reason is None:
            if stopped:
                self.core.cancel(output.request_id, "stop")
            return
        del self._sinks[output.request_id]
        if output.finish_reason == "error":
            sink.fail(UnsupportedError(output.error or "generate: the engine could not go on"))
        else:
            assert output.timings is not None
            sink.end(output.finish_reason, output.timings)


def stop(loop: Loop, thread: threading.Thread) -> None:
    loop.stop()
    if thread is not threading.current_thread():
        thread.join()
