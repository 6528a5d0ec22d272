"""An engine process as the API process sees it: started, watched, restarted, and the requests within it.

Every frame of the engine is a heartbeat. When its socket closes, every request in it gets an error, and a
new process is started, sooner if the last one lived long.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lowbit.server import wire
from lowbit.server.errors import ApiError

HEARTBEAT_LIMIT_SECONDS = 10.0  # without a frame for longer, /ready says no
FIRST_RESTART_SECONDS = 0.5
SLOWEST_RESTART_SECONDS = 30.0
STEADY_SECONDS = 60.0  # a process that lived longer is restarted at once
KILL_SECONDS = 5.0

WORKER = (sys.executable, "-m", "lowbit.server.worker")


class Sink(Protocol):
    """Who waits for the outputs of a request."""

    def push(self, delta: wire.Delta) -> None: ...
    def fail(self, error: ApiError) -> None: ...


class Engine(asyncio.Protocol):
    """One model's process.

    name: as clients call the model. state: "loading", "ready", "restarting", "stopped" or "failed".
    facts: what the process told about the model (empty until the first load).
    stats: its last counters, None while it is down.
    hang_seconds: a process that is silent for longer while it has work is killed.
    """

    def __init__(
        self,
        name: str,
        configure: wire.Configure,
        worker: Sequence[str] = WORKER,
        hang_seconds: float = 300.0,
    ) -> None:
        self.name = name
        self.state = "loading"
        self.facts: dict[str, Any] = {}
        self.stats: Any = None  # EngineStats | None
        self.failure = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._configure = configure
        self._worker = list(worker)
        self._hang_seconds = hang_seconds
        self.on_restart: Callable[[], None] = lambda: None
        self._sinks: dict[str, Sink] = {}
        self._numbers = itertools.count(1)
        self._transport: Any = None
        self._reader = wire.FrameReader(wire.Report)
        self._heard = 0.0
        self._started = 0.0
        self._delay = FIRST_RESTART_SECONDS
        self._loaded: asyncio.Future[None] | None = None
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """The process has loaded its model and was heard of lately."""
        return self.state == "ready" and self.silent_seconds < HEARTBEAT_LIMIT_SECONDS

    @property
    def silent_seconds(self) -> float:
        return asyncio.get_running_loop().time() - self._heard

    @property
    def requests(self) -> int:
        return len(self._sinks)

    async def start(self) -> None:
        """Start the process and keep one running. Returns once the model is loaded the first time.

        Raises ApiError with the reason if it cannot be."""
        self._loaded = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._supervise())
        await self._loaded

    async def stop(self) -> None:
        """End the process for good; what still runs gets an error."""
        self.state = "stopped"
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._end()

    def submit(self, sink: Sink, **fields: Any) -> str:
        """Send a request (fields of wire.Add without id); its outputs go to `sink`. Returns its id."""
        self.check()
        name = str(next(self._numbers))
        self._sinks[name] = sink
        self._transport.write(wire.encode(wire.Add(name, **fields)))
        return name

    def cancel(self, name: str) -> None:
        """Take a request back; its sink hears nothing more."""
        if self._sinks.pop(name, None) is not None and self._transport is not None:
            self._transport.write(wire.encode(wire.Cancel(name)))

    def stop_request(self, name: str) -> None:
        """End a request whose text is complete; its last output follows."""
        if self._transport is not None:
            self._transport.write(wire.encode(wire.Cancel(name, "stop")))

    def check(self) -> None:
        """Raise 503 unless requests can be taken."""
        if self.state == "ready":
            return
        reasons = {
            "loading": f"the model {self.name!r} is still being loaded; try again in a moment",
            "restarting": f"the engine of {self.name!r} ended unexpectedly and is being restarted; try again",
            "stopped": "the server is shutting down; ask another one",
            "failed": f"the engine of {self.name!r} cannot be started: {self.failure}",
        }
        raise ApiError(503, reasons[self.state], code="engine_unavailable", retry_after=max(self._delay, 1.0))

    # Frames from the process.

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._heard = asyncio.get_running_loop().time()
        try:
            for report in self._reader.feed(data):
                self._take(report)
        except ValueError as error:  # not our frames: the process is broken
            sys.stderr.write(f"lowbit: engine {self.name}: {error}\n")
            self._transport.abort()

    def _take(self, report: wire.Report) -> None:
        if isinstance(report, wire.Step):
            if report.stats is not None:
                self.stats = report.stats
            sinks = self._sinks
            for delta in report.deltas:
                sink = sinks.get(delta.id)
                if sink is not None:
                    if delta.finish is not None:
                        del sinks[delta.id]
                    sink.push(delta)
        elif isinstance(report, wire.Loaded):
            self.facts, self.stats = report.facts, report.stats
            self.state = "ready"
            self._resolve(None)
        elif isinstance(report, wire.Failed):
            self.failure = report.message
            sys.stderr.write(f"lowbit: engine {self.name}: {report.message}\n")
            if not report.is_bug:  # the same file would fail again
                self._resolve(ApiError(503, report.message, code="engine_unavailable"))

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self.state == "ready":
            self.state = "restarting"
        self._lost.set()

    # Life of the process.

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._spawn()
            while not self._lost.is_set():
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._lost.wait(), 1.0)
                if self._sinks and self.state == "ready" and self.silent_seconds > self._hang_seconds:
                    sys.stderr.write(f"lowbit: engine {self.name}: silent for {self.silent_seconds:.0f} s\n")
                    self._kill()
            first_load = self._loaded is not None and not self._loaded.done()
            if first_load or self.state == "failed":
                self.state = "failed"
                self._resolve(ApiError(503, self.failure or "the engine process ended while loading"))
                return
            self.state = "restarting"
            self.stats = None
            self._delay = (
                FIRST_RESTART_SECONDS
                if loop.time() - self._started > STEADY_SECONDS
                else min(self._delay * 2, SLOWEST_RESTART_SECONDS)
            )
            status = await self._end()
            self.on_restart()
            text = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
            sys.stderr.write(f"lowbit: engine {self.name} ended ({text}); a new one in {self._delay:g} s\n")
            await asyncio.sleep(self._delay)

    async def _spawn(self) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        self._lost.clear()
        self._reader = wire.FrameReader(wire.Report)
        self._started = self._heard = loop.time()
        with theirs:
            # A session of its own: Ctrl-C in the terminal is for the API process, which then drains.
            self.process = subprocess.Popen(
                [*self._worker, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        ours.setblocking(False)
        transport, _ = await loop.create_unix_connection(lambda: self, sock=ours)
        transport.write(wire.encode(self._configure))

    async def _end(self) -> int | None:
        """Fail what was running and see the process dead; returns its status."""
        sinks, self._sinks = self._sinks, {}
        for sink in sinks.values():
            sink.fail(
                ApiError(
                    503,
                    f"the engine of {self.name!r} ended while this request ran; send it again",
                    code="engine_died",
                    retry_after=max(self._delay, 1.0),
                )
            )
        if self._transport is not None:
            self._transport.close()
        process, self.process = self.process, None
        if process is None:
            return None
        try:
            await asyncio.to_thread(process.wait, KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        return process.returncode

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def _resolve(self, error: ApiError | None) -> None:
        if self._loaded is None or self._loaded.done():
            return
        if error is None:
            self._loaded.set_result(None)
        else:
            self.state = "failed"
            self._loaded.set_exception(error)
