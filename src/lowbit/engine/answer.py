"""What a caller holds of a request: text as it comes, the whole at the end, and the way to stop it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue

from lowbit.engine.generate import Generation
from lowbit.engine.request import Output, Request, Timings
from lowbit.engine.sequence import TokenLogprob
from lowbit.engine.text import TextAssembler


class Sink:
    """The engine thread's end of a request: takes its outputs, makes its text.

    Text is made here and not where it is read, so that a stop string ends the request at once. What is not
    read waits; it is never more than one answer, since the engine goes no further than the request's own end.
    """

    def __init__(self, request: Request, assembler: TextAssembler | None, streaming: bool) -> None:
        self.request = request
        self.result: Future[Generation] = Future()
        self.pieces: SimpleQueue[str | None] = SimpleQueue()  # None: no more
        self.wake: Callable[[], None] | None = None  # tells an event loop that there is something to read
        self._assembler = assembler
        self._streaming = streaming
        self._parts: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def take(self, output: Output) -> bool:
        """Take new tokens in; True if their text has reached a stop string, which ends the request."""
        assembler = self._assembler
        for i, token in enumerate(output.ids):
            self._tokens.append(token)
            if self.request.parameters.logprobs is not None:
                top = tuple(output.tops[i]) if output.tops else ()
                self._logprobs.append(TokenLogprob(token, output.logprobs[i], top))
            if assembler is not None:
                self._tell(assembler.push(token))
                if assembler.stopped:
                    return True
        return False

    def end(self, reason: str, timings: Timings) -> None:
        """The request has ended; what was taken in is the answer."""
        assembler = self._assembler
        if assembler is not None and not assembler.stopped:
            self._tell(assembler.finish())
            if assembler.stopped:
                reason = "stop"
        generation = Generation(
            text="".join(self._parts),
            token_ids=self._tokens,
            prompt_tokens=timings.prompt_tokens,
            generated_tokens=len(self._tokens),
            seconds=timings.prompt_seconds + timings.generation_seconds,
            prompt_seconds=timings.prompt_seconds,
            finish_reason=reason,
            reused_tokens=timings.cached_tokens,
            logprobs=self._logprobs if self.request.parameters.logprobs is not None else None,
            queued_seconds=timings.queued_seconds,
            drafted_tokens=timings.drafted_tokens,
            accepted_tokens=timings.accepted_tokens,
        )
        self._settle(lambda: self.result.set_result(generation))

    def fail(self, error: BaseException) -> None:
        """The request has no result; the caller gets `error`."""
        self._settle(lambda: self.result.set_exception(error))

    def _tell(self, piece: str) -> None:
        if piece:
            self._parts.append(piece)
            if self._streaming:
                self.pieces.put(piece)
                if self.wake is not None:
                    self.wake()

    def _settle(self, settle: Callable[[], None]) -> None:
        if not self.result.done():
            settle()
        self.pieces.put(None)
        if self.wake is not None:
            self.wake()


class Answer(Iterator[str]):
    """An answer on its way. Iterate it, with `for` or `async for`, for pieces of text; joined they are
    `generation.text`.

    An answer that nobody holds any more is cancelled and frees its memory, so leaving a loop early is enough.
    """

    def __init__(self, sink: Sink, cancel: Callable[[str], None], owner: object = None) -> None:
        self._sink = sink
        self._cancel = cancel
        self._owner = owner  # the engine lives as long as somebody waits for it
        self._ready: asyncio.Event | None = None

    @property
    def request_id(self) -> str:
        return self._sink.request.request_id

    @property
    def generation(self) -> Generation:
        """The whole, as soon as it is there. Raises what made the request fail."""
        try:
            return self._sink.result.result()
        except KeyboardInterrupt:
            self.cancel()
            raise

    @property
    def done(self) -> bool:
        return self._sink.result.done()

    def cancel(self) -> None:
        """End it now; `generation` then holds what there is, with finish_reason "cancelled"."""
        if not self.done:
            self._cancel(self.request_id)

    def when_done(self, call: Callable[[], None]) -> None:
        """Call this, from the engine's thread, once `done`."""
        self._sink.result.add_done_callback(lambda _: call())

    def __next__(self) -> str:
        piece = self._sink.pieces.get()
        if piece is None:
            self._end()
            raise StopIteration
        return piece

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> str:
        ready = self._listen()
        while self._sink.pieces.empty():
            ready.clear()
            if self._sink.pieces.empty():
                try:
                    await ready.wait()
                except asyncio.CancelledError:
                    self.cancel()
                    raise
        piece = self._sink.pieces.get()
        if piece is None:
            self._end()
            raise StopAsyncIteration
        return piece

    async def wait(self) -> Generation:
        """`generation`, without blocking the event loop."""
        try:
            return await asyncio.shield(asyncio.wrap_future(self._sink.result))
        except asyncio.CancelledError:
            self.cancel()
            raise

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *error: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()

    def _end(self) -> None:
        """Once all pieces are read: further reads end too, and a failure is raised."""
        self._sink.pieces.put(None)
        self._sink.result.result()

    def _listen(self) -> asyncio.Event:
        """Set when there is something to read. The engine thread calls into the event loop once per wait."""
        if self._ready is None:
            loop, ready = asyncio.get_running_loop(), asyncio.Event()
            cancel, request_id = self._cancel, self.request_id  # not `self`: see __del__

            def wake() -> None:
                try:
                    if loop.is_closed() or not ready.is_set():
                        loop.call_soon_threadsafe(ready.set)
                except RuntimeError:  # it is closed: nobody reads any more
                    cancel(request_id)

            self._ready = ready
            self._sink.wake = wake
        return self._ready
