"""The answers of POST /v1/completions."""

from __future__ import annotations

from typing import Any

from lowbit.server import render
from lowbit.server.generation import Choice, Generation


class CompletionRenderer(render.Chunks):
    """Text after a prompt."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(generation, "cmpl-", "text_completion")
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def opening(self) -> bytes:
        return b""

    def delta(self, choice: Choice) -> bytes:
        generation = self._generation
        events = b""
        if choice.progress is not None:
            events = render.progress_event(generation, choice, **self._head)
        text, logprobs = self._new(choice)
        if choice.finish is not None:
            last = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}
            return events + render.event({**self._head, "choices": [last], "timings": render.timings(choice)})
        if not text and logprobs is None:
            return events
        return b'%s%s{"index":%d,"text":%s,"logprobs":%s,"finish_reason":null}]}\n\n' % (
            events,
            self._prefix,
            choice.index,
            render.encode(text),
            b"null" if logprobs is None else render.encode(logprobs),
        )

    def whole(self) -> dict[str, Any]:
        choices = []
        for choice in self._generation.choices:
            text, logprobs = self._new(choice)
            choices.append(
                {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish}
            )
        return {
            **self._head,
            "choices": choices,
            "usage": render.usage(self._generation),
            "timings": render.timings(self._generation.choices[0]),
            "seed": self._generation.job.seed,
        }

    def _new(self, choice: Choice) -> tuple[str, dict[str, Any] | None]:
        """The text and log-probabilities since the last call; the prompt comes first where it is echoed."""
        job, model = self._generation.job, self._generation.model
        text, scored = choice.take()
        offset = self._offsets.get(choice.index)
        if offset is None:
            offset = 0
            if job.echo:
                begins = choice.prompt[0] == model.tokenizer.bos_id  # the tokenizer wrote it, not the client
                text = model.tokenizer.decode(choice.prompt[begins:], skip_special=False) + text
                scored = [*(choice.prompt_scored or []), *scored]
        self._offsets[choice.index] = offset + len(text)
        if job.logprobs is None or (not scored and not text):
            return text, None
        return text, render.completion_logprobs(model, scored, offset)
