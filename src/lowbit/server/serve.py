"""Start everything, say what was started, and end it in order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from lowbit.errors import LowbitError, UnsupportedError
from lowbit.server import wire
from lowbit.server.app import App
from lowbit.server.connection import connection
from lowbit.server.errors import ApiError
from lowbit.server.limits import Keys, Limits
from lowbit.server.models import ServedModel
from lowbit.server.stats import Counters
from lowbit.server.supervisor import WORKER, Engine

LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEEP_ALIVE_SECONDS = 75
SEND_BUFFER_BYTES = 128 << 10
CLOSING_SECONDS = 3  # for what the drain has left


@dataclass(frozen=True)
class Options:
    """What `lowbit serve` was asked for.

    models: name and path of each. load: arguments of engine.load. engine: of EngineConfig.
    draft: path of a model that guesses. interval: seconds, see worker.Worker.
    tls: files of certificate and key. worker: command of the engine.
    """

    models: Sequence[tuple[str, Path]]
    host: str = "127.0.0.1"
    port: int = 8000
    load: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    draft: Path | None = None
    interval: float = 0.0
    keys: Sequence[str] = ()
    tls: tuple[Path, Path | None] | None = None
    limits: Limits = field(default_factory=Limits)
    version: str = ""
    worker: Sequence[str] = WORKER


class _Server(uvicorn.Server):
    """Signals are ours: a drain comes before the end."""

    def capture_signals(self) -> Any:
        return contextlib.nullcontext()


def serve(options: Options, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT. `say` takes lines for the person who started it.

    Raises LowbitError if a model cannot be loaded, OSError if the address cannot be had.
    """
    listener = _listen(options.host, options.port)
    try:
        models = _models(options)
        config = uvicorn.Config(
            App(models, _counters(models), options.limits, Keys(options.keys), options.version),
            loop="uvloop",
            http=connection(options.limits.body_seconds),
            ws="none",
            lifespan="off",
            log_level="error",  # what clients send wrong is theirs to read
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
            ssl_certfile=options.tls[0] if options.tls else None,
            ssl_keyfile=options.tls[1] if options.tls else None,
        )
        loop_factory = config.get_loop_factory()
        assert loop_factory is not None
        loop = loop_factory()
        try:
            loop.run_until_complete(_run(options, models, config, listener, say))
        finally:
            loop.close()
    finally:
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Of every connection: a client that does not read is noticed, and holds no more than this in the kernel.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UnsupportedError(
            f"serve: {host}:{port}: {error.strerror}; choose another --port or --host"
        ) from error
    listener.setblocking(False)
    return listener


def _models(options: Options) -> dict[str, ServedModel]:
    models = {name: ServedModel(name, path, options.version) for name, path in options.models}
    for model in models.values():
        configure = wire.Configure(
            str(model.path),
            options.load,
            options.engine,
            str(options.draft) if options.draft else None,
            options.interval,
        )
        model.engine = Engine(model.name, configure, options.worker)
    return models


def _counters(models: dict[str, ServedModel]) -> Counters:
    counters = Counters(models)
    for name, model in models.items():
        model.counters = counters.models[name]
        model.engine.on_restart = partial_restart(model)
    return counters


def partial_restart(model: ServedModel) -> Callable[[], None]:
    def count() -> None:
        model.counters.restarts += 1

    return count


async def _run(
    options: Options,
    models: dict[str, ServedModel],
    config: uvicorn.Config,
    listener: socket.socket,
    say: Callable[[str], None],
) -> None:
    app: Any = config.app
    server = _Server(config)
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    serving = asyncio.create_task(server.serve([listener]))
    ticking = asyncio.create_task(app.tick())
    scheme = "https" if options.tls else "http"
    host, port = listener.getsockname()[:2]
    where = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        started = asyncio.create_task(_start_engines(models, say))
        await _first(started, ending, serving)
        if started.done():
            await started  # raises why a model cannot be loaded
            if options.host not in LOOPBACK and not options.keys:
                say("anybody who reaches this address may ask: give an --api-key")
            say(f"listening on {where}  (page: {where}/  API: {where}/v1)")
            await _first(ending, serving)
        else:
            started.cancel()
        app.draining = True
        if any(model.generations for model in models.values()):
            say(f"shutting down: finishing what runs, {options.limits.drain_seconds:g} s at most")
        await _drain(models, ending, options.limits.drain_seconds)
    finally:
        app.draining = True
        for model in models.values():
            await model.engine.stop()
        server.should_exit = True
        ticking.cancel()
        await asyncio.wait([serving], timeout=2 * CLOSING_SECONDS)


async def _first(*waited: Any) -> None:
    """Until one task is done or one event is set."""
    tasks = [asyncio.ensure_future(w.wait()) if isinstance(w, asyncio.Event) else w for w in waited]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, original in zip(tasks, waited):
        if task is not original:
            task.cancel()


async def _start_engines(models: dict[str, ServedModel], say: Callable[[str], None]) -> None:
    """One after the other: each takes its share of the memory that is free then."""
    for model in models.values():
        try:
            await model.engine.start()
        except ApiError as error:
            raise LowbitError(f"serve: {model.name}: {error.message}") from error
        say(banner(model))


async def _drain(models: dict[str, ServedModel], ending: asyncio.Event, seconds: float) -> None:
    """Until nothing runs, the time is over or a second signal comes."""
    ending.clear()
    end = asyncio.get_running_loop().time() + seconds
    while any(model.generations for model in models.values()):
        if asyncio.get_running_loop().time() > end or ending.is_set():
            error = ApiError(503, "the server shut down before the answer was complete", code="shutting_down")
            for model in models.values():
                for generation in list(model.generations):
                    generation.fail(error)
            await asyncio.sleep(0.1)  # for the last events to be written
            return
        await asyncio.sleep(0.05)


def banner(model: ServedModel) -> str:
    """One line: what is loaded and what it can do."""
    facts = model.engine.facts
    speed = facts["tokens_per_second"]
    parts = [
        f"{model.format}, {facts['bits_per_weight']:.2f} bits per weight",
        f"{facts['weights_bytes'] / 1e6:,.0f} MB",
        f"{facts['kv_tokens']:,} KV tokens of {facts['kv_bits']} bits",
        f"{facts['max_sequences']} requests at once",
        f"context {facts['context']:,}",
    ]
    if speed:
        parts.append(f"{speed:.0f} tokens/s alone (measured)")
    return f"{model.name}: {'; '.join(parts)}"


def report_to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
