"""The answers of POST /v1/responses: items, and the events that build them."""

from __future__ import annotations

from typing import Any

from lowbit.server import render
from lowbit.server.errors import ApiError
from lowbit.server.generation import Choice, Generation, Scored


class ResponsesRenderer:
    """A message, then the function calls, each an item of the output."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._id = render.new_id("resp_")
        self._message = render.new_id("msg_")
        self._number = 0
        self._text: list[str] = []
        self._scored: list[Scored] = []
        self._opened = False  # the message
        self._items: list[dict[str, Any]] = []

    def opening(self) -> bytes:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def delta(self, choice: Choice) -> bytes:
        events = b""
        text, scored = choice.take()
        if text or scored:
            events += self._open_message()
            self._text.append(text)
            self._scored += scored
            events += self._event(
                "response.output_text.delta", **self._place(), delta=text, logprobs=self._logprobs(scored)
            )
        calls = choice.take_calls()
        if calls or choice.finish is not None:
            if not self._items and not calls and not self._opened:
                events += self._open_message()  # an empty answer is an empty message
            events += self._close_message()
        for call in calls:
            events += self._call(call)
        return events

    def closing(self) -> bytes:
        response = self._response(self._status())
        return self._event(f"response.{self._status()}", response=response)

    def failure(self, error: ApiError) -> bytes:
        response = self._response("failed")
        response["error"] = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=response)

    def whole(self) -> dict[str, Any]:
        self.delta(self._generation.choices[0])
        return self._response(self._status())

    def _status(self) -> str:
        return "incomplete" if self._generation.choices[0].finish == "length" else "completed"

    def _open_message(self) -> bytes:
        if self._opened:
            return b""
        self._opened = True
        item = self._message_item("in_progress", [])
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return self._event("response.output_item.added", output_index=0, item=item) + self._event(
            "response.content_part.added", **self._place(), part=part
        )

    def _close_message(self) -> bytes:
        if not self._opened or self._items:
            return b""
        part = self._part()
        place = self._place()
        status = "incomplete" if self._generation.choices[0].finish == "length" else "completed"
        item = self._message_item(status, [part])
        self._items.append(item)
        return (
            self._event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
            + self._event("response.content_part.done", **place, part=part)
            + self._event("response.output_item.done", output_index=0, item=item)
        )

    def _call(self, call: dict[str, Any]) -> bytes:
        index = len(self._items)
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        item = {
            "type": "function_call",
            "id": render.new_id("fc_"),
            "call_id": call["id"],
            "name": name,
            "arguments": arguments,
            "status": "completed",
        }
        self._items.append(item)
        place = {"item_id": item["id"], "output_index": index}
        started = {**item, "arguments": "", "status": "in_progress"}
        return (
            self._event("response.output_item.added", output_index=index, item=started)
            + self._event("response.function_call_arguments.delta", **place, delta=arguments)
            + self._event("response.function_call_arguments.done", **place, name=name, arguments=arguments)
            + self._event("response.output_item.done", output_index=index, item=item)
        )

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message, "output_index": 0, "content_index": 0}

    def _part(self) -> dict[str, Any]:
        text = "".join(self._text)
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": self._logprobs(self._scored),
        }

    def _message_item(self, status: str, content: list[Any]) -> dict[str, Any]:
        return {
            "type": "message",
            "id": self._message,
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _logprobs(self, scored: list[Scored]) -> list[Any]:
        return render.chat_logprobs(self._generation.model, scored)["content"] if scored else []

    def _response(self, status: str) -> dict[str, Any]:
        generation = self._generation
        response = {
            "id": self._id,
            "object": "response",
            "created_at": generation.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": generation.model.name,
            "output": list(self._items),
            **generation.job.echoed,
            "usage": None,
            "timings": None,
        }
        if status in ("completed", "incomplete"):
            usage = render.usage(generation)
            response["usage"] = {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0, **usage["completion_tokens_details"]},
                "total_tokens": usage["total_tokens"],
            }
            response["timings"] = render.timings(generation.choices[0])
            response["seed"] = generation.job.seed
        return response

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self._number
        self._number += 1
        data = render.encode({"type": kind, "sequence_number": number, **fields})
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), data)
