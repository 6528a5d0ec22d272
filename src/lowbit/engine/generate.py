"""A loaded model that turns prompts into text."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from lowbit.engine.parameters import SamplingParameters
from lowbit.engine.sequence import TokenLogprob, TokenSequence, check_prompt
from lowbit.engine.text import TextAssembler
from lowbit.errors import RequestError, UnsupportedError

Message = Mapping[str, str]


@dataclass(frozen=True)
class Generation:
    """What a request produced.

    text: without end-of-text tokens and without the stop string.
    token_ids: every sampled token that is not end-of-text.
    seconds: from the first native call to the last token; prompt_seconds: until the first token.
    reused_tokens: prompt tokens whose keys and values were there already.
    finish_reason: "eos", "stop" (a stop string), "length" (max_tokens) or "context" (no room left).
    logprobs: one per token id, or None when not asked for.
    queued_seconds, drafted_tokens, accepted_tokens: in an Engine, the time before the first native call, and
    the guesses of speculation and those of them that came true.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    generated_tokens: int
    seconds: float
    prompt_seconds: float
    finish_reason: str
    reused_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None
    queued_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Rate after the first token (which pays for the prompt); 0 with fewer than two tokens."""
        seconds = self.seconds - self.prompt_seconds
        return (self.generated_tokens - 1) / seconds if self.generated_tokens > 1 and seconds > 0 else 0.0


class TextStream(Iterator[str]):
    """Pieces of text as they become certain; `generation` holds the whole once they are all read."""

    def __init__(self, pieces: Generator[str, None, Generation]) -> None:
        self._pieces = pieces
        self._generation: Generation | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._generation = self._generation or end.value
            raise

    @property
    def generation(self) -> Generation:
        """The result. Reads the rest of the stream if there is one."""
        for _ in self:
            pass
        if self._generation is None:
            raise RequestError("generate: the stream ended by an error and has no result; ask again")
        return self._generation


class LanguageModel:
    """A model ready to generate. Made by `lowbit.load`.

    Greedy unless a temperature is given, so equal calls give equal text.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        self.tokenizer = model.tokenizer
        self.decoder = model.decoder
        self.context: int = model.context
        self.bits_per_weight: float = model.bits_per_weight
        self.nbytes: int = model.nbytes

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a text, by the model's configuration or its tokenizer."""
        known = self.tokenizer.eos_ids if self.tokenizer is not None else ()
        return frozenset((*self.config.eos_ids, *known))

    @property
    def has_chat_template(self) -> bool:
        return self.tokenizer is not None and bool(self.tokenizer.chat_template)

    def encode(self, prompt: str | Sequence[int], add_special: bool = True) -> list[int]:
        """Token ids of `prompt`; ids are passed through after a check against the vocabulary."""
        if isinstance(prompt, str):
            return list(self._tokenizer().encode(prompt, add_special=add_special))
        ids = [int(token) for token in prompt]
        for token in ids:
            if not 0 <= token < self.config.vocab_size:
                raise RequestError(
                    f"generate: token id {token} is outside the vocabulary of {self.config.vocab_size}; "
                    "encode the prompt with this model's tokenizer"
                )
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation in the model's chat template, ready for an answer."""
        if not self.has_chat_template:
            raise UnsupportedError(
                "chat: this model has no chat template (it is a base model); use generate with plain text"
            )
        if isinstance(messages, str) or not messages:
            raise RequestError('chat: messages must be a list of {"role": ..., "content": ...}; pass one')
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise RequestError(f'chat: message {message!r} lacks "role" or "content"; give both')
        # The template writes the beginning-of-text token itself where the model wants one.
        tokenizer = self._tokenizer()
        return list(tokenizer.encode(tokenizer.apply_chat(list(messages)), add_special=False))

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] | str = (),
        logprobs: int | None = None,
    ) -> Generation:
        """Continue `prompt` (text as it is, or token ids). Arguments: see SamplingParameters.

        Raises RequestError if the prompt does not fit the context; it is never shortened.
        """
        return self.stream(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
        ).generation

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] | str = (),
        logprobs: int | None = None,
    ) -> TextStream:
        """As `generate`, piece by piece. Joined, the pieces are exactly `generation.text`."""
        parameters = SamplingParameters(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=logprobs,
        )
        return self.stream_ids(self.encode(prompt), parameters)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int | None = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] | str = (),
        logprobs: int | None = None,
    ) -> Generation:
        """Answer `messages` ([{"role": "user", "content": "..."}, ...]) in the model's own template."""
        parameters = SamplingParameters(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            logprobs=logprobs,
        )
        return self.stream_ids(self.encode_chat(messages), parameters, continuing=False).generation

    def generate_ids(
        self, prompt_ids: Sequence[int], parameters: SamplingParameters | None = None
    ) -> list[int]:
        """Token ids to token ids, without text; needs no tokenizer unless there are stop strings."""
        stream = self.stream_ids(self.encode(prompt_ids), parameters or SamplingParameters())
        return stream.generation.token_ids

    def stream_ids(
        self,
        prompt_ids: Sequence[int],
        parameters: SamplingParameters,
        sequence: TokenSequence | None = None,
        continuing: bool = True,
    ) -> TextStream:
        """The one way to text.

        sequence: keeps keys and values from call to call (see Conversation).
        continuing: the text goes on from the prompt's, so a leading space stays; an answer drops it.
        """
        prompt_ids = list(prompt_ids)
        check_prompt(len(prompt_ids), sequence.capacity if sequence else self.context)
        if sequence is None:
            room = self.context - len(prompt_ids)
            room = min(room, parameters.max_tokens or room)
            sequence = TokenSequence(self.decoder, len(prompt_ids) + room)
        return TextStream(
            self._pieces(prompt_ids, parameters, sequence, self.assembler(parameters, continuing))
        )

    def _pieces(
        self,
        prompt: list[int],
        parameters: SamplingParameters,
        sequence: TokenSequence,
        assembler: TextAssembler | None,
    ) -> Generator[str, None, Generation]:
        eos = () if parameters.ignore_eos else self.eos_ids
        parts: list[str] = []
        tokens: list[TokenLogprob] = []
        started = last = time.perf_counter()
        first: float | None = None
        reason = "context"
        for token in sequence.generate(prompt, parameters, eos):
            last = time.perf_counter()
            first = first or last
            if token.token_id in eos:
                reason = "eos"
                break
            tokens.append(token)
            piece = assembler.push(token.token_id) if assembler else ""
            if piece:
                parts.append(piece)
                yield piece
            if assembler and assembler.stopped:
                reason = "stop"
                break
            if len(tokens) == parameters.max_tokens:
                reason = "length"
                break
        rest = assembler.finish() if assembler and reason != "stop" else ""
        if rest:
            parts.append(rest)
            yield rest
        if assembler and assembler.stopped:
            reason = "stop"
        return Generation(
            text="".join(parts),
            token_ids=[token.token_id for token in tokens],
            prompt_tokens=len(prompt),
            generated_tokens=len(tokens),
            seconds=last - started,
            prompt_seconds=(first or last) - started,
            finish_reason=reason,
            reused_tokens=sequence.reused,
            logprobs=tokens if parameters.logprobs is not None else None,
        )

    def assembler(self, parameters: SamplingParameters, continuing: bool) -> TextAssembler | None:
        """Makes an answer's text from its ids; None without a tokenizer, which stop strings need."""
        if self.tokenizer is None:
            if parameters.stop:
                raise UnsupportedError("generate: stop strings need a tokenizer and this model has none")
            return None
        return TextAssembler(self.tokenizer.stream(continuing=continuing), parameters.stop)

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise UnsupportedError(
                "generate: this model has no tokenizer; pass token ids, or put its tokenizer.json "
                "into the model directory"
            )
        return self.tokenizer


def load(
    path: str | PathLike[str],
    activations: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv_bits: int | None = None,
) -> LanguageModel:
    """Load a model: a directory, a .gguf file, a hub id, or `smollm2-135m`.

    activations: "int8" or "int16" (two int8 limbs: slower, closest to float); None: what the model was
        quantized for, else "int8".
    context: tokens of prompt and answer together; None: what the model was trained for.
    threads: None: what the machine and its cgroup allow, or LOWBIT_THREADS.
    kv_bits: of keys and values: 2, 4, 8 or 16; None: 8 with int8 activations, 16 with int16.
    """
    from lowbit.model.loader import load_model

    found = Path(path).expanduser()
    if not found.exists():
        from lowbit.model.download import resolve  # a tenth of the start-up time, so only when needed

        found = resolve(str(path))
    model = load_model(found, activations=activations, context=context, threads=threads, kv_bits=kv_bits)
    _return_free_memory()
    return LanguageModel(model)


def _return_free_memory() -> None:
    """Give the heap that parsing a tokenizer.json leaves behind (30 MB for 49,000 tokens) back to the system.

    The weights are mapped and come into memory as they are first used, so the peak falls by as much.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc; others have no need or no way
    if trim is not None:
        trim(0)
