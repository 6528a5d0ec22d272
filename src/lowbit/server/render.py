"""What answers have in common: server-sent events, tokens by name, usage and timings."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from lowbit.engine.request import Timings
from lowbit.server.errors import ApiError

if TYPE_CHECKING:
    from lowbit.server.generation import Choice, Generation, Scored
    from lowbit.server.models import ServedModel

encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


class Renderer(Protocol):
    """Turns a generation into one of the API's answers."""

    def opening(self) -> bytes:
        """Events before the first token."""

    def delta(self, choice: Choice) -> bytes:
        """Events for what is new in `choice`, its end included."""

    def closing(self) -> bytes:
        """Events after the last token of all choices."""

    def failure(self, error: ApiError) -> bytes:
        """The last event of a stream that failed."""

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""


class Chunks:
    """What the streams of chat and of plain completions share: the head of each chunk, and the end."""

    def __init__(self, generation: Generation, id_prefix: str, name: str) -> None:
        """name: the `object` of a chunk."""
        self._generation = generation
        self._head = {
            "id": new_id(id_prefix),
            "object": name,
            "created": generation.created,
            "model": generation.model.name,
            "system_fingerprint": generation.model.fingerprint,
        }
        self._prefix = event({**self._head, "choices": []})[:-4]  # up to the list's content

    def closing(self) -> bytes:
        if not self._generation.job.include_usage:
            return DONE
        return event({**self._head, "choices": [], "usage": usage(self._generation)}) + DONE

    def failure(self, error: ApiError) -> bytes:
        return failure_event(error)


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


def event(value: Any) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


def failure_event(error: ApiError) -> bytes:
    return event(error.body()) + DONE


def usage(generation: Generation) -> dict[str, Any]:
    """Token counts in OpenAI's words; each prompt counts once, however many answers it has."""
    firsts = generation.choices[:: generation.job.n]
    prompt = sum(len(choice.prompt) for choice in firsts)
    completion = sum(choice.tokens for choice in generation.choices)
    accepted = drafted = 0
    for choice in generation.choices:
        if choice.timings is not None:
            accepted += choice.timings["accepted_tokens"]
            drafted += choice.timings["drafted_tokens"]
    cached = sum(choice.timings["cached_tokens"] for choice in firsts if choice.timings is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }


def timings(choice: Choice) -> dict[str, Any] | None:
    """Where the time of one continuation went, with its rate of generation."""
    found = choice.timings
    if found is None:
        return None
    prompt, reading = found["prompt_tokens"] - found["cached_tokens"], found["prompt_seconds"]
    return {
        **found,
        "tokens_per_second": Timings(**found).tokens_per_second,
        "prompt_tokens_per_second": prompt / reading if reading > 0 else 0.0,
    }


def progress_event(generation: Generation, choice: Choice, **head: Any) -> bytes:
    """How much of a prompt is read, for those who asked with return_progress."""
    read, choice.progress = choice.progress, None
    total = len(choice.prompt)
    progress = {"index": choice.index, "processed": read, "total": total}
    return event({**head, "choices": [], "prompt_progress": progress})


def chat_logprobs(model: ServedModel, scored: list[Scored]) -> dict[str, Any]:
    """Log-probabilities as chat completions have them."""
    content = []
    for token in scored:
        top = [_token(model, token_id, logprob) for token_id, logprob in token.top]
        content.append({**_token(model, token.token_id, token.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _token(model: ServedModel, token_id: int, logprob: float | None) -> dict[str, Any]:
    raw = model.tokenizer.token_bytes(token_id)
    return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def token_name(model: ServedModel, token_id: int) -> str:
    """A token as text; one that is no whole character keeps its bytes apart, as OpenAI does."""
    raw = model.tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def completion_logprobs(model: ServedModel, scored: list[Scored], offset: int) -> dict[str, Any]:
    """Log-probabilities as completions have them: parallel lists. offset: characters before the first."""
    names = [token_name(model, token.token_id) for token in scored]
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    tops: list[dict[str, float] | None] = []
    for token, name in zip(scored, names):
        if token.logprob is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for token_id, logprob in token.top:
            top.setdefault(token_name(model, token_id), logprob)
        top.setdefault(name, token.logprob)
        tops.append(top)
    return {
        "tokens": names,
        "token_logprobs": [token.logprob for token in scored],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
