"""`lowbit.Engine`: many requests at once on one model, from any thread or event loop.

    with lowbit.Engine("smollm2-135m") as engine:
        for answer in engine.generate(["The sky is", "Water is"], lowbit.SamplingParameters(max_tokens=8)):
            print(answer.text)

A thread of its own steps the engine core; callers talk to it through a queue. Every token of an answer is the
one that `LanguageModel.generate` gives for the same prompt and parameters, whoever else is being served.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from queue import SimpleQueue
from typing import Any

from lowbit.engine.answer import Answer, Sink
from lowbit.engine.config import EngineConfig
from lowbit.engine.constraint import Grammar, Grammars
from lowbit.engine.core import EngineCore
from lowbit.engine.generate import Generation, LanguageModel, Message, load
from lowbit.engine.loop import Loop, stop
from lowbit.engine.parameters import SamplingParameters
from lowbit.engine.request import Request
from lowbit.engine.sequence import check_prompt
from lowbit.errors import BusyError, RequestError

AHEAD = 16  # requests of a batch that wait in the engine, beyond those that it computes at the same time

# Text, token ids, or a conversation for the model's chat template.
Prompt = str | Sequence[int] | Sequence[Message]
Prompts = Sequence[str] | Sequence[Sequence[int]] | Sequence[Sequence[Message]]
Parameters = SamplingParameters | Sequence[SamplingParameters] | None


class Engine:
    """Continuous batching for Python: sync, async and many prompts at once.

    model: a LanguageModel, or what `lowbit.load` takes.
    config: limits and switches; see EngineConfig. None of them changes a token.
    draft: a second model with the same tokenizer, to guess ahead (fewer bits of the same weights will do).

    Every method may be called from any thread. A prompt is text, token ids or a conversation (a list of
    {"role": ..., "content": ...}). `parameters` are one SamplingParameters for all prompts, or a list with
    one for each. `grammar` gives an answer its form. A request of higher `priority` goes first. Close the
    engine, or use it in a `with` statement.
    """

    def __init__(
        self,
        model: LanguageModel | str | PathLike[str],
        config: EngineConfig | None = None,
        *,
        draft: LanguageModel | str | PathLike[str] | None = None,
    ) -> None:
        self.model = model if isinstance(model, LanguageModel) else load(model)
        self.config = config or EngineConfig()
        if draft is not None:
            from lowbit.engine.draft_model import DraftModelSpeculator

            if self.config.speculation is not None:
                raise RequestError("engine: draft and config.speculation are both given; give one of them")
            small = draft if isinstance(draft, LanguageModel) else load(draft)
            drafter = DraftModelSpeculator(small, self.model)
            self.config = dataclasses.replace(self.config, speculation=drafter)
        self._loop = Loop(EngineCore(self.model, self.config))
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()
        thread = threading.Thread(target=self._loop.run, name="lowbit-engine", daemon=True)
        thread.start()
        # Runs also when the engine is forgotten and at the end of the program, so that no thread is left in
        # native code.
        self._finish = weakref.finalize(self, stop, self._loop, thread)

    def generate(
        self,
        prompts: Any,
        parameters: Parameters = None,
        *,
        grammar: Grammar | None = None,
        priority: int = 0,
    ) -> Any:
        """Continue a prompt, or many: a Generation, or a list of them in the order of the prompts.

        Raises RequestError, before anything is computed, if a prompt does not fit; none is ever shortened.
        """
        if _is_one(prompts):
            return self._start(self._request(prompts, parameters, grammar, priority)).generation
        found = dict(self.batch(prompts, parameters, grammar=grammar, priority=priority))
        return [found[i] for i in range(len(found))]

    async def agenerate(
        self,
        prompts: Any,
        parameters: Parameters = None,
        *,
        grammar: Grammar | None = None,
        priority: int = 0,
    ) -> Any:
        """`generate` for an event loop. Cancelling the task ends the request."""
        if _is_one(prompts):
            make = await asyncio.to_thread(self._request, prompts, parameters, grammar, priority)
            return await self._start(make).wait()
        makers = await asyncio.to_thread(self._requests, prompts, parameters, grammar, priority)
        room = asyncio.Semaphore(self.config.max_sequences + AHEAD)

        async def one(make: _Maker) -> Generation:
            async with room:
                while True:
                    try:
                        return await self._start(make).wait()
                    except BusyError as busy:
                        await asyncio.sleep(busy.retry_after_seconds)

        tasks = [asyncio.ensure_future(one(make)) for make in makers]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def chat(
        self,
        conversations: Any,
        parameters: Parameters = None,
        *,
        grammar: Grammar | None = None,
        priority: int = 0,
    ) -> Any:
        """Answer a conversation, or many, in the model's own template."""
        _check_conversations(conversations)
        return self.generate(conversations, parameters, grammar=grammar, priority=priority)

    async def achat(
        self,
        conversations: Any,
        parameters: Parameters = None,
        *,
        grammar: Grammar | None = None,
        priority: int = 0,
    ) -> Any:
        """`chat` for an event loop."""
        _check_conversations(conversations)
        return await self.agenerate(conversations, parameters, grammar=grammar, priority=priority)

    def stream(
        self,
        prompt: Prompt,
        parameters: SamplingParameters | None = None,
        *,
        grammar: Grammar | None = None,
        priority: int = 0,
    ) -> Answer:
        """An answer piece by piece. Leave the loop, and the request ends and its memory is free."""
        return self._start(self._request(prompt, parameters, grammar, priority), streaming=True)

    def astream(
        self,
        prompt: Prompt,
        parameters: SamplingParameters | None = None,
        *,
        grammar: Grammar | None = None,
        priority: int = 0,
    ) -> Answer:
        """`stream` for an event loop: `async for piece in engine.astream(prompt)`."""
        return self.stream(prompt, parameters, grammar=grammar, priority=priority)

    def batch(
        self,
        prompts: Prompts,
        parameters: Parameters = None,
        *,
        grammar: Grammar | None = None,
        priority: int = 0,
    ) -> Iterator[tuple[int, Generation]]:
        """Continue any number of prompts; yields (index, Generation) as each is finished."""
        return self._run(self._requests(prompts, parameters, grammar, priority))

    def cancel(self, request_id: str) -> None:
        """End a request (Answer.request_id); its answer is what there is. An unknown id is no error."""
        self._loop.cancel(request_id)

    def stats(self) -> dict[str, Any]:
        """Requests, memory, speculation and speed; see EngineCore.stats."""
        return self._loop.ask(self._loop.core.stats)

    def close(self) -> None:
        """End all requests and the engine's thread. May be called again."""
        self._finish()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- Inside

    def _requests(
        self, prompts: Prompts, parameters: Parameters, grammar: Grammar | None, priority: int
    ) -> list[_Maker]:
        """Checks every prompt before the first is started."""
        if _is_one(prompts):
            raise RequestError("generate: batch takes a list of prompts and this is one; put it into a list")
        each = [parameters] * len(prompts)
        if parameters is not None and not isinstance(parameters, SamplingParameters):
            each = list(parameters)
            if len(each) != len(prompts):
                raise RequestError(
                    f"generate: {len(prompts)} prompts and {len(each)} parameters; give one, or as many"
                )
        makers = []
        for i, prompt in enumerate(prompts):
            try:
                makers.append(self._request(prompt, each[i], grammar, priority))
            except RequestError as error:
                raise RequestError(f"{error} (prompt {i})") from error
        return makers

    def _request(self, prompt: Any, parameters: Any, grammar: Grammar | None, priority: int) -> _Maker:
        """A checked request that can be made any number of times (each has a grammar state of its own)."""
        parameters = SamplingParameters() if parameters is None else parameters
        if not isinstance(parameters, SamplingParameters):
            raise RequestError(
                f"generate: parameters is a {type(parameters).__name__}; give one SamplingParameters"
            )
        chat = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
        ids = self.model.encode_chat(prompt) if chat else self.model.encode(prompt)
        check_prompt(len(ids), self.model.context)
        self.model.assembler(parameters, not chat)  # raises if it cannot be made
        constrain = None
        if grammar is not None:
            with self._lock:
                if self._grammars is None:
                    eos = sorted(self.model.eos_ids)
                    self._grammars = Grammars(self.model.tokenizer, self.model.config.vocab_size, eos)
            constrain = partial(self._grammars.constraint, grammar)
            constrain()

        def make(streaming: bool) -> Sink:
            constraint = constrain() if constrain else None
            request = Request(ids, parameters, priority=priority, constraint=constraint)
            return Sink(request, self.model.assembler(parameters, not chat), streaming)

        return make

    def _start(self, make: _Maker, streaming: bool = False) -> Answer:
        sink = make(streaming)
        answer = Answer(sink, self._loop.cancel, owner=self)
        self._loop.add(sink)
        return answer

    def _run(self, makers: list[_Maker]) -> Iterator[tuple[int, Generation]]:
        waiting = deque(enumerate(makers))
        running: dict[int, Answer] = {}
        finished: SimpleQueue[int] = SimpleQueue()
        while waiting or running:
            while waiting and len(running) < self.config.max_sequences + AHEAD:
                i, make = waiting.popleft()
                running[i] = self._start(make)
                running[i].when_done(partial(finished.put, i))
            i = finished.get()
            answer = running.pop(i)
            try:
                generation = answer.generation
            except BusyError as busy:
                waiting.appendleft((i, makers[i]))
                if not running:
                    time.sleep(busy.retry_after_seconds)
                continue
            yield i, generation


_Maker = Callable[[bool], Sink]


def _is_one(prompts: Any) -> bool:
    """Whether this is one prompt: text, token ids, or the messages of a conversation."""
    return isinstance(prompts, str) or (
        len(prompts) > 0 and (isinstance(prompts[0], Mapping) or hasattr(prompts[0], "__index__"))
    )


def _check_conversations(conversations: Any) -> None:
    each = [conversations] if _is_one(conversations) else conversations
    for conversation in each:
        if isinstance(conversation, str) or not conversation or not isinstance(conversation[0], Mapping):
            raise RequestError('chat: a conversation is a list of {"role": ..., "content": ...}; pass one')
