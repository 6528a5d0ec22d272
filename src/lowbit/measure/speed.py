"""Speed beside the bound that the machine sets.

Decode reads every weight once per token, so its bound is bytes over memory bandwidth. Prefill
multiplies every weight by every token, so its bound is multiply-adds over the int8 peak. Both are
measured just before each repetition of a speed, since on a shared machine they change from minute to
minute, and the fractions say how near the code comes.
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
BOUND_SECONDS = 0.15
FIRST_TOKEN_PROMPT = "Once upon a time"


def bench(
    path: str,
    *,
    activations: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv_bits: int | None = None,
    prefill: int = 512,
    decode: int = 128,
    repeats: int = 3,
    first_token: bool = True,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a model; medians of `repeats`. Keys end in their units; the fractions are of the bound.

    memory_bytes: what the peak is made of; the keys and values of both measurements count. "all else" is
    the program, its libraries, the tokenizer and the activations.

    prefill and decode are shortened to what the context holds; the figures used are in the result.
    time_to_first_token_seconds is None for a model without tokenizer, or if `first_token` is false.
    """
    from lowbit import _native

    if min(prefill, decode, repeats) < 1:
        raise RequestError(f"bench: prefill={prefill}, decode={decode}, repeats={repeats}; each must be >= 1")
    say = progress or (lambda text: None)
    model = load(path, activations=activations, context=context, threads=threads, kv_bits=kv_bits)
    first_token_time = None
    if first_token and model.tokenizer is not None:
        say("time to first token of a fresh process")
        first_token_time = first_token_seconds(
            path, activations=activations, context=context, threads=threads, kv_bits=kv_bits, repeats=repeats
        )
    prefill = min(prefill, model.context)
    decode = min(decode, model.context - WARM_UP_STEPS - 1)
    if decode < 1:
        raise RequestError(
            f"bench: a context of {model.context} has no room to decode in; raise --context to 16 at least"
        )
    say(f"prefill of {prefill} tokens, decode of {decode}")
    prefill_cache, decode_cache = (
        new_cache(model.decoder, prefill),
        new_cache(model.decoder, decode + WARM_UP_STEPS + 1),
    )
    prefill_once(model, prefill, prefill_cache)
    decode_once(model, 1, decode_cache)
    peak_rss = peak_rss_bytes()  # before the buffers that the bounds are measured with
    held = prefill_cache.nbytes + decode_cache.nbytes
    weight_bytes = weight_bytes_per_token(model)
    kv_bytes = kv_bytes_per_token(model, WARM_UP_STEPS + decode / 2)
    operations = prefill_multiply_adds(model, prefill)
    rounds = []
    for _ in range(repeats):
        int8_peak = float(_native.measure_int8_peak(BOUND_SECONDS))
        prefill_seconds = prefill_once(model, prefill, prefill_cache)
        bandwidth = float(_native.measure_bandwidth(BANDWIDTH_BUFFER_BYTES, BOUND_SECONDS))
        decode_seconds = decode_once(model, decode, decode_cache)
        of_peak = operations / int8_peak / prefill_seconds
        of_bandwidth = (weight_bytes + kv_bytes) / bandwidth / decode_seconds
        rounds.append((prefill_seconds, decode_seconds, bandwidth, int8_peak, of_bandwidth, of_peak))
    prefill_seconds, decode_seconds, bandwidth, int8_peak, of_bandwidth, of_peak = (
        statistics.median(values) for values in zip(*rounds)
    )
    return {
        "isa": _native.isa(),
        "threads": _native.threads(),
        "bits_per_weight": model.bits_per_weight,
        "prefill_tokens_per_second": prefill / prefill_seconds,
        "decode_tokens_per_second": 1 / decode_seconds,
        "time_to_first_token_seconds": first_token_time,
        "peak_rss_bytes": peak_rss,
        "memory_bytes": {
            "weights": model.nbytes,
            "keys and values": held,
            "all else": max(0, peak_rss - model.nbytes - held),
        },
        "bandwidth_bytes_per_second": bandwidth,
        "int8_multiply_adds_per_second": int8_peak,
        "decode_bound_fraction": of_bandwidth,
        "prefill_bound_fraction": of_peak,
        "cpu": cpu_name(),
        "activations": model.model.activations,
        "kv_bits": model.model.kv_bits,
        "prefill_tokens": prefill,
        "decode_tokens": decode,
        "weight_bytes_per_token": weight_bytes,
        "kv_bytes_per_token": round(kv_bytes),
    }


def measure_prefill(model: LanguageModel, tokens: int, repeats: int) -> float:
    """Median seconds from `tokens` prompt tokens to the logits of the last one, after a warm-up."""
    cache = new_cache(model.decoder, tokens)
    return statistics.median([prefill_once(model, tokens, cache) for _ in range(repeats + 1)][1:])


def prefill_once(model: LanguageModel, tokens: int, cache: Any) -> float:
    """Seconds of reading `tokens` random tokens into the emptied cache."""
    ids = _random_tokens(model, tokens)
    cache.truncate(0)
    started = time.perf_counter()
    for at in range(0, tokens, PREFILL_CHUNK):
        piece = ids[at : at + PREFILL_CHUNK]
        model.decoder.logits(piece, [cache], [len(piece)])
    return time.perf_counter() - started


def measure_decode(model: LanguageModel, tokens: int, repeats: int) -> float:
    """Median over `repeats` of the mean seconds of one greedy step, from an almost empty cache."""
    cache = new_cache(model.decoder, tokens + WARM_UP_STEPS + 1)
    return statistics.median([decode_once(model, tokens, cache) for _ in range(repeats)])


def decode_once(model: LanguageModel, tokens: int, cache: Any) -> float:
    """Mean seconds of one of `tokens` greedy steps, after WARM_UP_STEPS others from an emptied cache."""
    cache.truncate(0)
    samplers = [new_sampler(SamplingParameters())]
    ids = _random_tokens(model, 1)
    started = time.perf_counter()
    for step in range(WARM_UP_STEPS + tokens):
        if step == WARM_UP_STEPS:
            started = time.perf_counter()
        ids, _ = model.decoder.sample(ids, [cache], [1], samplers)
    return (time.perf_counter() - started) / tokens


def first_token_seconds(
    path: str,
    *,
    activations: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv_bits: int | None = None,
    repeats: int = 3,
) -> float:
    """Median seconds from the start of a fresh `lowbit run` to the first text on its output."""
    command = [sys.executable, "-m", "lowbit.cli", "run", str(path), "--raw", "-p", FIRST_TOKEN_PROMPT]
    command += ["--max-tokens", "1"]
    if activations is not None:
        command += ["--activations", activations]
    command += ["--context", str(context)] if context is not None else []
    command += ["--threads", str(threads)] if threads is not None else []
    command += ["--kv-bits", str(kv_bits)] if kv_bits is not None else []
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
    """Bytes of keys and values that a step at `length` tokens of context reads."""
    config = model.config
    one = model.model.cache(64).nbytes / 64  # of one position; 4 and 2 bits come in pages of 64
    windows = config.windows or (0,) * config.n_layers
    seen = sum(min(length, window) if window else length for window in windows)
    return seen * one / config.n_layers


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
