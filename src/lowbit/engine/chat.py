"""A conversation that keeps its keys and values from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator

from lowbit.engine.generate import Generation, LanguageModel
from lowbit.engine.parameters import SamplingParameters
from lowbit.engine.sequence import TokenSequence


class Conversation:
    """Turns of a chat with one model.

    Each turn renders the whole conversation; the beginning that the cache already holds is not
    computed again. A turn that is refused leaves the conversation as it was; one that is interrupted
    keeps what has been said.
    """

    def __init__(self, model: LanguageModel, system: str | None = None) -> None:
        self._model = model
        self._system = system
        self._sequence = TokenSequence(model.decoder, model.context)
        self.messages: list[dict[str, str]] = []
        self.last: Generation | None = None
        self.reset()

    def reset(self) -> None:
        """Forget every turn, keep the system message."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        self.last = None

    @property
    def tokens_used(self) -> int:
        """Tokens in the cache; at most the context of the model."""
        return len(self._sequence.tokens)

    @property
    def capacity(self) -> int:
        return self._sequence.capacity

    def send(self, text: str, parameters: SamplingParameters) -> Iterator[str]:
        """Yield the answer to `text` piece by piece; afterwards `last` holds the whole.

        Raises RequestError when the conversation no longer fits the context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._model.encode_chat(messages)
        stream = self._model.stream_ids(prompt, parameters, self._sequence, continuing=False)
        said: list[str] = []
        self.last = None
        try:
            for piece in stream:
                said.append(piece)
                yield piece
            self.last = stream.generation
        finally:
            if said or self.last:
                self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
