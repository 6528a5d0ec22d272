"""The answers of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from lowbit.server import render
from lowbit.server.generation import Choice, Generation


class ChatRenderer(render.Chunks):
    """The assistant's next message."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(generation, "chatcmpl-", "chat.completion.chunk")
        self._calls: dict[int, int] = {}  # tool calls of each choice so far

    def opening(self) -> bytes:
        first = {"role": "assistant", "content": ""}
        return b"".join(
            render.event({**self._head, "choices": [_choice(choice.index, first)]})
            for choice in self._generation.choices
        )

    def delta(self, choice: Choice) -> bytes:
        events = b""
        if choice.progress is not None:
            events = render.progress_event(self._generation, choice, **self._head)
        text, scored = choice.take()
        logprobs = b"null"
        if scored:
            logprobs = render.encode(render.chat_logprobs(self._generation.model, scored))
        if text or scored:
            events += b'%s{"index":%d,"delta":{"content":%s},"logprobs":%s,"finish_reason":null}]}\n\n' % (
                self._prefix,
                choice.index,
                render.encode(text),
                logprobs,
            )
        for call in choice.take_calls():
            number = self._calls.get(choice.index, 0)
            self._calls[choice.index] = number + 1
            delta = {"tool_calls": [{"index": number, **call}]}
            events += render.event({**self._head, "choices": [_choice(choice.index, delta)]})
        if choice.finish is not None:
            last = _choice(choice.index, {}, _reason(choice))
            events += render.event({**self._head, "choices": [last], "timings": render.timings(choice)})
        return events

    def whole(self) -> dict[str, Any]:
        generation = self._generation
        choices = []
        for choice in generation.choices:
            text, scored = choice.take()
            calls = choice.take_calls()
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message |= {"content": text or None, "tool_calls": calls}
            choices.append(
                {
                    "index": choice.index,
                    "message": message,
                    "logprobs": render.chat_logprobs(generation.model, scored)
                    if generation.job.logprobs is not None
                    else None,
                    "finish_reason": _reason(choice),
                }
            )
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": render.usage(generation),
            "timings": render.timings(generation.choices[0]),
            "seed": generation.job.seed,
        }


def _choice(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


def _reason(choice: Choice) -> str | None:
    return "tool_calls" if choice.calls and choice.finish == "stop" else choice.finish
