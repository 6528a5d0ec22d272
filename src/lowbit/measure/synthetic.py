"""Networks of any shape with random weights in any format, loaded like any other, to time what decides speed.

Speed does not depend on what the weights are. Layers may share their matrices: then a deep network needs
little memory, which is fine where arithmetic decides, and wrong where the memory's bandwidth does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.engine.parameters import SamplingParameters
from lowbit.engine.sequence import new_cache, new_sampler
from lowbit.formats import Format, Scheme
from lowbit.measure.products import copies_of, random_matrix
from lowbit.model.config import from_transformers
from lowbit.model.loader import LoadedModel, load_model
from lowbit.model.tensors import expected_tensors
from lowbit.packed import PackedMatrix

TEXT_SEED = 0
SPARE = 512  # positions that a cache has room for beyond its first use


def llama(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocab: int = 64,
    head_dim: int | None = None,
    context: int = 1 << 16,
    **more: Any,
) -> dict[str, Any]:
    """The config.json of a Llama of these sizes."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
        **more,
    }


class SyntheticCheckpoint:
    """A Checkpoint that makes its weights up.

    shared: all layers have the matrices of the first; once: no matrix is kept to copy the next from
    """

    kind = "synthetic"

    def __init__(
        self, config: Mapping[str, Any], scheme: Scheme, shared: bool = False, once: bool = False
    ) -> None:
        self.path = Path("synthetic")
        self.config = from_transformers(config)
        self._scheme = scheme
        self._shared, self._once = shared, once
        self._shapes = {tensor.name: tuple(tensor.shape) for tensor in expected_tensors(self.config)}
        self._made: dict[tuple[Format, tuple[int, ...]], list[PackedMatrix]] = {}

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        return self._scheme.format_for(name).name

    def read(self, name: str) -> np.ndarray:
        return np.ones(self._shapes[name], np.float32)

    def matrix(self, name: str) -> PackedMatrix:
        fmt, shape = self._scheme.format_for(name), self._shapes[name]
        if self._once:
            return random_matrix(fmt, *shape)
        if self._shared and ".layers." in name:
            return _pattern(fmt, shape)
        made = self._made.setdefault((fmt, shape), [])
        if not made:
            alike = sum(s == shape and self._scheme.format_for(n) == fmt for n, s in self._shapes.items())
            pattern = _pattern(fmt, shape)
            made += copies_of(pattern, alike * pattern.nbytes)
        return made.pop() if len(made) > 1 else made[0]

    def tokenizer(self) -> None:
        return None

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> SyntheticCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@lru_cache(maxsize=64)
def _pattern(fmt: Format, shape: tuple[int, int]) -> PackedMatrix:
    return random_matrix(fmt, *shape)


def synthetic(
    config: Mapping[str, Any], scheme: Scheme | str, kv_bits: int = 8, shared: bool = False
) -> LoadedModel:
    """Such a network, loaded."""
    scheme = Scheme.parse(scheme)
    checkpoint: Any = SyntheticCheckpoint(config, scheme, shared)
    return load_model(checkpoint, activations=scheme.activations, kv_bits=kv_bits)


def forget() -> None:
    """Let go of the matrices that were kept to make the next network quickly."""
    _pattern.cache_clear()


class Stepper:
    """Times steps of one model. What a cache was filled with is kept for the next, shorter one."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self._kept: tuple[Any, int] | None = None  # a cache, and the positions that it may hold

    def time(
        self,
        prompts: Sequence[tuple[int, int]],
        contexts: Sequence[int],
        steps: int = 5,
        rounds: int = 1,
        long_seconds: float = float("inf"),
    ) -> list[float]:
        """The median seconds of each of `rounds` rounds of `steps` steps (two where one takes
        `long_seconds`).

        prompts: (tokens, positions before them) of runs that read, each to its end
        contexts: positions before the token of each run that decodes
        A step before the first warms up.
        """
        model = self.model
        rng = np.random.default_rng(TEXT_SEED)
        runs = [*prompts, *((1, context) for context in contexts)]
        caches = [self._filled(before, count) for count, before in runs[:1]]
        for count, before in runs[1:]:
            cache = new_cache(model.decoder, before + count + 1)
            fill(model, cache, before)
            caches.append(cache)
        counts = [count for count, _ in runs]
        ids = rng.integers(0, model.config.vocab_size, sum(counts)).astype(np.int32)
        samplers = [new_sampler(SamplingParameters()) for _ in runs]

        def once() -> float:
            started = time.perf_counter()
            model.decoder.step(ids, caches, counts, samplers)
            seconds = time.perf_counter() - started
            for cache, (_, before) in zip(caches, runs):
                cut(model, cache, before)
            return seconds

        warm = once()
        each = 2 if warm >= long_seconds else steps
        return [statistics.median([once() for _ in range(each)]) for _ in range(rounds)]

    def _filled(self, before: int, count: int) -> Any:
        """A cache of `before` positions with room for `count` more: the last one, cut, if it was longer."""
        if self._kept is not None:
            cache, room = self._kept
            if before + count < room and cache.length >= before and cache.truncate(before) == before:
                return cache
        room = before + count + SPARE
        cache = new_cache(self.model.decoder, room)
        fill(self.model, cache, before)
        self._kept = (cache, room)
        return cache


def fill(model: LoadedModel, cache: Any, length: int, chunk: int = 512) -> None:
    """`length` positions of random text."""
    ids = np.random.default_rng(TEXT_SEED).integers(0, model.config.vocab_size, length).astype(np.int32)
    for start in range(0, length, chunk):
        piece = ids[start : start + chunk]
        model.decoder.step(piece, [cache], [len(piece)], [None])


def cut(model: LoadedModel, cache: Any, length: int) -> None:
    """Back to `length` positions; with few bits only whole pages can be cut to, and the rest is read
    again.
    """
    kept = cache.truncate(length)
    if kept < length:
        ids = np.random.default_rng(TEXT_SEED).integers(0, model.config.vocab_size, length - kept)
        model.decoder.step(ids.astype(np.int32), [cache], [length - kept], [None])
