"""Speed beside the bound that the machine sets.

Decode reads every weight once per token, so its bound is bytes over memory bandwidth. Prefill
multiplies every weight by every token, so its bound is multiply-adds over the int8 peak. Both are
measured in the same process as the speeds, and the fractions say how near the code comes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from lowbit.engine import LanguageModel, SamplingParameters, load
from lowbit.engine.sequence import PREFILL_CHUNK, new_cache, new_sampler
from lowbit.errors import RequestError, UnsupportedError
from lowbit.measure.machine import cpu_name, peak_rss_bytes

WARM_UP_STEPS = 4
BANDWIDTH_BUFFER_BYTES = 512 * 2**20  # well beyond any last-level cache
FIRST_TOKEN_PROMPT = "Once upon a time"


def bench(
    path: str,
    *,
    activations: str = "int8",
    context: int | None = None,
    threads: int | None = None,
    prefill: int = 512,
    decode: int = 128,
    repeats: int = 3,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model; medians of `repeats`. Keys end in their units; the fractions are of the bound.

    prefill and decode are shortened to what the context holds; the figures used are in the result.
    time_to_first_token_seconds is None for a model without tokenizer.
    """
    from lowbit import _native

    if min(prefill, decode, repeats) < 1:
        raise RequestError(f"bench: prefill={prefill}, decode={decode}, repeats={repeats}; each must be >= 1")
    say = progress or (lambda text: None)
    model = load(path, activations=activations, context=context, threads=threads)
    first_token = None
    if model.tokenizer is not None:
        say("time to first token of a fresh process")
        first_token = first_token_seconds(
            path, activations=activations, context=context, threads=threads, repeats=repeats
        )
    prefill = min(prefill, model.context)
    decode = min(decode, model.context - WARM_UP_STEPS - 1)
    if decode < 1:
        raise RequestError(
            f"bench: a context of {model.context} has no room to decode in; raise --context to 16 at least"
        )
    say(f"prefill of {prefill} tokens")
    prefill_seconds = measure_prefill(model, prefill, repeats)
    say(f"decode of {decode} tokens")
    decode_seconds = measure_decode(model, decode, repeats)
    peak_rss = peak_rss_bytes()  # before the buffers of the next two
    say("memory bandwidth and int8 peak")
    bandwidth = float(_native.measure_bandwidth(BANDWIDTH_BUFFER_BYTES, 0.5))
    int8_peak = float(_native.measure_int8_peak(0.5))
    weight_bytes = weight_bytes_per_token(model)
    kv_bytes = kv_bytes_per_token(model, WARM_UP_STEPS + decode / 2)
    operations = prefill_multiply_adds(model, prefill)
    return {
        "isa": _native.isa(),
        "threads": _native.threads(),
        "bits_per_weight": model.bits_per_weight,
        "prefill_tokens_per_second": prefill / prefill_seconds,
        "decode_tokens_per_second": 1 / decode_seconds,
        "time_to_first_token_seconds": first_token,
        "peak_rss_bytes": peak_rss,
        "bandwidth_bytes_per_second": bandwidth,
        "int8_multiply_adds_per_second": int8_peak,
        "decode_bound_fraction": (weight_bytes + kv_bytes) / bandwidth / decode_seconds,
        "prefill_bound_fraction": operations / int8_peak / prefill_seconds,
        "cpu": cpu_name(),
        "activations": activations,
        "prefill_tokens": prefill,
        "decode_tokens": decode,
        "weight_bytes_per_token": weight_bytes,
        "kv_bytes_per_token": round(kv_bytes),
    }


def measure_prefill(model: LanguageModel, tokens: int, repeats: int) -> float:
    """Median seconds from `tokens` prompt tokens to the logits of the last one, after a warm-up."""
    ids = _random_tokens(model, tokens)
    cache = new_cache(model.decoder, tokens)
    seconds = []
    for _ in range(repeats + 1):
        cache.truncate(0)
        started = time.perf_counter()
        for at in range(0, tokens, PREFILL_CHUNK):
            piece = ids[at : at + PREFILL_CHUNK]
            model.decoder.logits(piece, [cache], [len(piece)])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measure_decode(model: LanguageModel, tokens: int, repeats: int) -> float:
    """Median over `repeats` of the mean seconds of one greedy step, from an almost empty cache."""
    cache = new_cache(model.decoder, tokens + WARM_UP_STEPS + 1)
    first = _random_tokens(model, 1)
    seconds = []
    for _ in range(repeats):
        cache.truncate(0)
        samplers = [new_sampler(SamplingParameters())]
        ids = first
        for step in range(WARM_UP_STEPS + tokens):
            if step == WARM_UP_STEPS:
                started = time.perf_counter()
            ids, _ = model.decoder.sample(ids, [cache], [1], samplers)
        seconds.append((time.perf_counter() - started) / tokens)
    return statistics.median(seconds)


def first_token_seconds(
    path: str,
    *,
    activations: str = "int8",
    context: int | None = None,
    threads: int | None = None,
    repeats: int = 3,
) -> float:
    """Median seconds from the start of a fresh `lowbit run` to the first text on its output."""
    command = [sys.executable, "-m", "lowbit.cli", "run", str(path), "--raw", "-p", FIRST_TOKEN_PROMPT]
    command += ["--max-tokens", "1", "--activations", activations]
    command += ["--context", str(context)] if context is not None else []
    command += ["--threads", str(threads)] if threads is not None else []
    # The child must find this package also when it is not installed.
    root = os.path.dirname(os.path.dirname(sys.modules["lowbit"].__file__ or ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *_python_path()])}
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=environment
        ) as child:
            assert child.stdout is not None and child.stderr is not None
            child.stdout.read(1)
            seconds.append(time.perf_counter() - started)
            child.stdout.read()
            message = child.stderr.read().decode(errors="replace")
        if child.returncode != 0:
            last = message.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
            raise UnsupportedError(f"bench: a fresh `lowbit run` failed: {last[0]}")
    return statistics.median(seconds)


def weight_bytes_per_token(model: LanguageModel) -> int:
    """Bytes of weights that one decode step reads: all but an untied embedding (one row of it)."""
    weights = model.model.weights
    skip = "model.embed_tokens.weight" if "lm_head.weight" in weights else None
    return sum(matrix.nbytes for name, matrix in weights.items() if name != skip)


def kv_bytes_per_token(model: LanguageModel, length: float) -> float:
    """Bytes of 16-bit keys and values that a step at `length` tokens of context reads."""
    config = model.config
    windows = config.windows or (0,) * config.n_layers
    seen = sum(min(length, window) if window else length for window in windows)
    return seen * 2 * config.n_kv_heads * config.head_dim * 2


def prefill_multiply_adds(model: LanguageModel, tokens: int) -> int:
    """Multiply-adds of the linear layers for `tokens` tokens; the head works for the last one only."""
    total = 0
    weights = model.model.weights
    for name, matrix in weights.items():
        size = matrix.out_features * matrix.in_features
        if name == "model.embed_tokens.weight":
            total += 0 if "lm_head.weight" in weights else size
        else:
            total += size * (1 if name == "lm_head.weight" else tokens)
    return total


def _random_tokens(model: LanguageModel, n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, n).astype(np.int32)


def _python_path() -> list[str]:
    return [entry for entry in [os.environ.get("PYTHONPATH", "")] if entry]
