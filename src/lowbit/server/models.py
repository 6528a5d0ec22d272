"""A model that the server offers: what the API process keeps of it beside its engine."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import RequestError, UnsupportedError
from lowbit.model.checkpoint import open_checkpoint
from lowbit.server.errors import ApiError, invalid
from lowbit.server.stats import ModelCounters, ModelDescription

if TYPE_CHECKING:
    from lowbit.server.generation import Generation
    from lowbit.server.supervisor import Engine

# Characters that are tokenized on the event loop (about 2 ms); longer texts go to a thread.
INLINE_CHARACTERS = 10_000


class ServedModel:
    """One model: its name, tokenizer and engine.

    The weights are in the engine process; the tokenizer and the configuration are read here too.
    """

    def __init__(self, name: str, path: Path, version: str) -> None:
        with open_checkpoint(path) as checkpoint:
            tokenizer = checkpoint.tokenizer()
            self.config = checkpoint.config
            self.format = format_name(checkpoint)
        if tokenizer is None:
            raise UnsupportedError(f"serve: {path} has no tokenizer; put its tokenizer.json into it")
        self.name = name
        self.path = path
        self.fingerprint = f"lowbit-{version}"  # answers of equal seed are equal where this is
        self.tokenizer = tokenizer
        self.created = int(time.time())
        self.engine: Engine
        self.counters: ModelCounters
        self.generations: set[Generation] = set()

    @property
    def context(self) -> int:
        """Positions of one request."""
        return int(self.engine.facts.get("context", self.config.max_position))

    def describe(self) -> ModelDescription:
        facts = self.engine.facts
        return ModelDescription(
            id=self.name,
            format=self.format,
            bits_per_weight=facts.get("bits_per_weight", 0.0),
            weights_bytes=facts.get("weights_bytes", 0),
            kv_bits=facts.get("kv_bits", 0),
            context=self.context,
            chat=self.tokenizer.chat_template is not None,
        )

    async def encode(self, text: str, add_special: bool, param: str = "prompt") -> list[int]:
        """Token ids of `text`; a long one does not hold up the streams."""
        try:
            if len(text) <= INLINE_CHARACTERS:
                return self.tokenizer.encode(text, add_special)
            return await asyncio.to_thread(self.tokenizer.encode, text, add_special)
        except RequestError as error:
            raise invalid(str(error), param) from error

    def check_ids(self, ids: list[int], param: str) -> None:
        """Raise ApiError 400 for an id outside the vocabulary."""
        vocabulary = self.config.vocab_size
        if max(ids) >= vocabulary:
            raise invalid(
                f"{param}: token id {max(ids)} is outside the vocabulary of {vocabulary}; "
                "encode it with this model's tokenizer (/tokenize)",
                param,
            )

    def check_prompt(self, ids: list[int], param: str) -> None:
        """Raise ApiError 400 unless the engine can continue `ids`. Nothing is ever cut."""
        if not ids:
            raise invalid(f"{param}: 0 tokens; give at least one", param)
        self.check_ids(ids, param)
        context = self.context
        held = self.engine.facts.get("kv_tokens", context)
        if len(ids) >= context:
            raise ApiError(
                400,
                f"{param}: {len(ids)} tokens and the context of {self.name!r} holds {context}, one of them "
                f"to be generated; shorten it to {context - 1}, or serve with a larger --context",
                param=param,
                code="context_length_exceeded",
            )
        if len(ids) >= held:
            raise ApiError(
                400,
                f"{param}: {len(ids)} tokens and the memory for keys and values holds {held}; shorten it, or "
                "serve with a larger --kv-gb or fewer --kv-bits",
                param=param,
                code="context_length_exceeded",
            )


def format_name(checkpoint: Any) -> str:
    """How the weights are stored, such as "int4-g32": the scheme, or the commonest type of the matrices."""
    sizes: dict[str, int] = {}
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        if len(shape) == 2:
            kind = checkpoint.dtype(name)
            sizes[kind] = sizes.get(kind, 0) + shape[0] * shape[1]
    return max(sizes, key=sizes.__getitem__) if sizes else "none"
