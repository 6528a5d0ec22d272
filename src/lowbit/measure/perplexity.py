"""Perplexity over non-overlapping windows.

The text is encoded once and cut into windows of `context` tokens; the incomplete last one is
dropped. Each window is scored on its own from its second token, and no token is added to it.
This is the protocol most quantization papers use for WikiText-2, so figures compare.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.engine import LanguageModel
from lowbit.engine.sequence import native_step, new_cache
from lowbit.errors import RequestError

DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity: exp of the mean negative log likelihood; tokens: how many were scored."""

    perplexity: float
    tokens: int
    context: int
    windows: int
    seconds: float


def perplexity(
    model: LanguageModel,
    text: str | Sequence[int],
    context: int | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> PerplexityResult:
    """Score `text` (or token ids).

    context: tokens of a window; None: 2048 or what the model holds, if less.
    max_tokens: only the first so many tokens of the text.
    progress: called with (windows done, windows, perplexity so far) after each window.
    """
    size = context if context is not None else min(DEFAULT_CONTEXT, model.context)
    if not 2 <= size <= model.context:
        raise RequestError(
            f"eval: context={size} is outside 2 to {model.context}, what the model holds; choose one in it"
        )
    if max_tokens is not None and max_tokens < 2:
        raise RequestError(f"eval: max_tokens={max_tokens} leaves nothing to score; give at least 2")
    ids = np.asarray(model.encode(text, add_special=False), dtype=np.int32)[:max_tokens]
    windows = len(ids) // size
    if windows == 0:
        raise RequestError(
            f"eval: the text has {len(ids)} tokens, less than one window of {size}; "
            f"give a longer text or a shorter context (--context {max(2, len(ids))})"
        )
    started = time.perf_counter()
    cache = new_cache(model.decoder, size)
    nll, scored = 0.0, 0
    for i in range(windows):
        cache.truncate(0)
        with native_step("eval"):
            log_probs = model.decoder.score(ids[i * size : (i + 1) * size], cache)
        nll -= float(np.sum(log_probs, dtype=np.float64))
        scored += len(log_probs)
        if progress:
            progress(i + 1, windows, safe_exp(nll / scored))
    return PerplexityResult(safe_exp(nll / scored), scored, size, windows, time.perf_counter() - started)


def safe_exp(value: float) -> float:
    """exp, or infinity where it would overflow."""
    return math.exp(value) if value < 700 else math.inf
