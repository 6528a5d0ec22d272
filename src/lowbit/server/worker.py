"""The engine process: one model, one EngineCore, one frame to the API process per step.

Started by supervisor.py as `python -m lowbit.server.worker FD`. Blocks on its socket while there is nothing
to do, and ends when the other side closes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from lowbit.errors import BusyError, LowbitError
from lowbit.server import wire

HEARTBEAT_SECONDS = 1.0
STATS_SECONDS = 0.25  # while busy
COMPILING_SECONDS = 0.002  # between looks at a constraint in the making, while there is nothing else to do
WARM_UP_TOKENS = 16
WARM_UP_SECONDS = 2.0
RECEIVE_BYTES = 1 << 18


class Closed(Exception):
    """The API process is gone."""


class Channel:
    """The worker's end of the socketpair."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._reader = wire.FrameReader(wire.Command)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def receive(self, seconds: float | None) -> list[Any]:
        """Commands that are there, after waiting up to `seconds` for the first. None: without end."""
        commands: list[Any] = []
        while self._poll.poll(None if seconds is None else seconds * 1000):
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except OSError as error:
                raise Closed from error
            if not data:
                raise Closed
            commands += self._reader.feed(data)
            if commands or seconds is not None:
                seconds = 0
        return commands

    def send(self, report: wire.Report) -> None:
        try:
            self._socket.sendall(wire.encode(report))
        except OSError as error:
            raise Closed from error


class Worker:
    """Feeds commands to the core and sends what its steps make.

    interval: seconds between two frames of running streams. Steps that are faster share a frame: to write one
    to every client costs processors that the steps need. A first token, an end or a refusal is sent at once.
    """

    def __init__(self, core: Any, channel: Channel, model: Any = None, interval: float = 0.0) -> None:
        self._core = core
        self._interval = interval
        self._sent = 0.0
        self._urgent = False
        self._open: dict[str, wire.Delta] = {}  # of the next frame, which further tokens may join
        self._speaking: set[str] = set()  # requests whose first token was sent
        self._channel = channel
        self._model = model
        self._grammars: Any = None  # made with the first constraint, like the thread that compiles them
        self._compiler: Any = None
        self._compiling: dict[str, tuple[wire.Add, Any]] = {}
        self._deltas: list[wire.Delta] = []
        self._reading: set[str] = set()  # requests whose reading of the prompt is reported
        self._told = 0.0

    def run(self) -> None:
        """Until the API process closes the socket."""
        while True:
            for command in self._channel.receive(self._patience()):
                self._apply(command)
            if self._compiling:
                self._take_compiled()
            if not self._core.idle:
                for output in self._core.step():
                    self._take(output)
                if self._reading:
                    self._progress()
            self._report()

    def _patience(self) -> float:
        """How long to wait for commands before the next step."""
        if self._deltas or not self._core.idle:
            return 0.0
        return COMPILING_SECONDS if self._compiling else HEARTBEAT_SECONDS

    def _report(self) -> None:
        now = time.monotonic()
        every = HEARTBEAT_SECONDS if self._core.idle else STATS_SECONDS
        due = now - self._told >= every * 0.99
        if not due and not self._urgent and (not self._deltas or now - self._sent < self._interval):
            return
        stats = None
        # After the last token the counters are told at once: an idle engine is seen as idle.
        if due or self._core.idle:
            self._told, stats = now, self._core.stats()
        self._channel.send(wire.Step(self._deltas, stats))
        self._deltas, self._sent, self._urgent = [], now, False
        self._open.clear()

    def _say(self, delta: wire.Delta) -> None:
        """Send this with the next frame, and that at once."""
        self._deltas.append(delta)
        self._urgent = True

    def _take(self, output: Any) -> None:
        """Add an output of the core to the next frame."""
        name = output.request_id
        if output.finish_reason is not None:
            self._urgent = True
            self._speaking.discard(name)
        elif name not in self._speaking:
            self._urgent = True
            self._speaking.add(name)
        delta = self._delta(output)
        earlier = self._open.get(name)
        if earlier is None:
            self._open[name] = delta
            self._deltas.append(delta)
            return
        earlier.ids = earlier.ids + delta.ids
        earlier.logprobs = earlier.logprobs + delta.logprobs
        earlier.tops = earlier.tops + delta.tops
        earlier.finish, earlier.timings, earlier.error = delta.finish, delta.timings, delta.error

    def _apply(self, command: wire.Command) -> None:
        if isinstance(command, wire.Add):
            if command.constraint is None:
                self._say(self._add(command, None))
            else:
                self._compile(command)
        elif isinstance(command, wire.Cancel):
            self._reading.discard(command.id)
            self._speaking.discard(command.id)
            if self._compiling.pop(command.id, None) is None:
                self._core.cancel(command.id, command.reason)

    def _compile(self, command: wire.Add) -> None:
        """Begin to make a constraint, which may take a second: the steps of others go on meanwhile."""
        if self._compiler is None:
            from concurrent.futures import ThreadPoolExecutor

            from lowbit.engine.constraint import Grammars

            model = self._model
            self._grammars = Grammars(model.tokenizer, model.config.vocab_size, sorted(model.eos_ids))
            self._compiler = ThreadPoolExecutor(1)
        made = self._compiler.submit(self._constraint, command.constraint)
        self._compiling[command.id] = command, made

    def _take_compiled(self) -> None:
        """Add the requests whose constraint is made."""
        for name in [name for name, (_, made) in self._compiling.items() if made.done()]:
            command, made = self._compiling.pop(name)
            try:
                self._say(self._add(command, made.result()))
            except LowbitError as error:
                self._say(wire.Delta(name, finish="refused", error=str(error), status=400))

    def _add(self, command: wire.Add, constraint: Any) -> wire.Delta:
        """Admit a request; the answer is an empty delta, or one that says why not."""
        from lowbit.engine.parameters import SamplingParameters
        from lowbit.engine.request import Request

        try:
            request = Request(
                prompt_ids=command.prompt,
                parameters=SamplingParameters(**command.parameters),
                tenant=command.tenant,
                priority=command.priority,
                request_id=command.id,
                constraint=constraint,
                echo_scores=command.echo,
            )
            self._core.add(request)
        except BusyError as error:
            refused = wire.Delta(command.id, finish="refused", error=str(error), status=429)
            refused.retry_after = error.retry_after_seconds
            return refused
        except LowbitError as error:
            return wire.Delta(command.id, finish="refused", error=str(error), status=400)
        if not command.progress:
            return wire.Delta(command.id)
        self._reading.add(command.id)
        return wire.Delta(command.id, progress=0)

    def _constraint(self, form: tuple[str, str]) -> Any:
        from lowbit.engine.constraint import Grammar

        return self._grammars.constraint(Grammar(*form))

    def _delta(self, output: Any) -> wire.Delta:
        delta = wire.Delta(
            output.request_id,
            output.ids,
            output.logprobs,
            output.tops,
            output.finish_reason,
            error=output.error,
        )
        if output.timings is not None:
            delta.timings = dataclasses.asdict(output.timings)
        if output.prompt_scores is not None:
            delta.scores = output.prompt_scores.logprobs.tolist()
            delta.score_tops = output.prompt_scores.tops
        return delta

    def _progress(self) -> None:
        """Add how far the prompts are read to the frame, for those who asked."""
        for name in list(self._reading):
            read = self._core.progress(name)
            if read is None:
                self._reading.discard(name)
            else:
                self._say(wire.Delta(name, progress=read))


def warm_up(core: Any, prompt: list[int]) -> float:
    """Generate a few tokens, which brings the weights into memory; returns tokens per second (0: unknown)."""
    from lowbit.engine.parameters import SamplingParameters
    from lowbit.engine.request import Request

    request = Request(
        prompt, SamplingParameters(max_tokens=WARM_UP_TOKENS, ignore_eos=True), request_id="warm-up"
    )
    core.add(request)
    end = time.perf_counter() + WARM_UP_SECONDS
    times = []
    while not core.idle:
        if any(output.ids for output in core.step()):
            times.append(time.perf_counter())
            if times[-1] > end:
                core.cancel("warm-up")
    half = len(times) // 2  # the first ones map the weights
    return (len(times) - 1 - half) / (times[-1] - times[half]) if len(times) > 3 else 0.0


def keep_apart(threads: int) -> None:
    """Give each of the `threads` that compute a processor of its own, if there are just as many (Linux).

    The API process wakes at every step; else the scheduler makes room for it by putting two of them on one
    processor, and a step waits for the slowest. Those that computed most are meant: call after `warm_up`.
    """
    if not hasattr(os, "sched_setaffinity") or threads < 2:
        return
    processors = sorted(os.sched_getaffinity(0))
    used = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for task in Path("/proc/self/task").iterdir():
            used.append((-int((task / "schedstat").read_text().split()[0]), int(task.name)))
    if len(processors) == threads <= len(used):
        for processor, (_, task_id) in zip(processors, sorted(used)):
            os.sched_setaffinity(task_id, {processor})


def load(command: wire.Configure) -> tuple[Any, Any]:
    """(EngineCore, LanguageModel) for `command`."""
    from lowbit.engine import load as load_model
    from lowbit.engine.core import EngineConfig, EngineCore

    model = load_model(command.path, **command.load)
    options = dict(command.engine)
    if command.draft is not None:
        from lowbit.engine.draft_model import DraftModelSpeculator

        options["speculation"] = DraftModelSpeculator(load_model(command.draft, **command.load), model)
    return EngineCore(model, EngineConfig(**options)), model


def facts(core: Any, model: Any, speed: float) -> dict[str, Any]:
    """What the banner, /stats and the checks of the API process need to know."""
    stats = core.stats()
    return {
        "weights_bytes": model.nbytes,
        "bits_per_weight": model.bits_per_weight,
        "kv_bits": model.model.kv_bits,
        "context": model.context,
        "kv_tokens": stats["kv_tokens_total"],
        "max_sequences": core.config.max_sequences,
        "tokens_per_second": speed,
    }


def main(descriptor: int, load: Any = load) -> int:
    """Serve the socket `descriptor`. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the API process, which closes the socket
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        from lowbit import _native

        [command] = channel.receive(None)
        try:
            core, model = load(command)
            bos = model.tokenizer.bos_id if model.tokenizer is not None else None
            speed = warm_up(core, [bos or 0])
            keep_apart(_native.threads())
        except (LowbitError, OSError, MemoryError) as error:
            channel.send(wire.Failed(str(error) or type(error).__name__))
            return 2
        channel.send(wire.Loaded(facts(core, model, speed), core.stats()))
        Worker(core, channel, model, command.interval).run()
    except Closed:
        return 0
    except Exception as error:
        with contextlib.suppress(Closed):
            channel.send(wire.Failed(f"{type(error).__name__}: {error}", is_bug=True))
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
