"""Measure this machine for planning: steps of small networks of many shapes, in under a minute.

Whole steps of the decoder are timed, not single products: they hold everything a user waits for, in place,
with warm threads and reused memory. Shapes, formats, tokens, contexts and widths of keys and values vary, so
that least squares can tell the parts apart (lowbit.plan.fit). Other networks, which take no part in the fit,
give the errors from which intervals are made. Every time is the median of a few rounds, each of which is a
median: what a user meets, not the best that there is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.formats import Scheme
from lowbit.kernels import tuning
from lowbit.measure.machine import memory_bytes
from lowbit.measure.resident import NOTHING, memory_cases, resident_bytes
from lowbit.measure.synthetic import Stepper, forget, llama, synthetic

REFERENCE = "int4-g32"
FORMATS = (
    "int2-g32", "int3-g32", "int4-g128", "int4a-g64", "int5-g32", "int6-g32", "int8-g32",
    "int3-g16-m4", "nf4-g32", "mxfp4", "ternary-g64", "bf16",
)  # fmt: skip
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96)
FORMAT_TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 96)
LONG_TOKENS = (192, 480)
FEW = 4  # tokens up to which the memory's bandwidth decides
ROUNDS, PASSES = 4, 2  # medians of so many steps, so often
LONG_SECONDS = 0.05  # of a step from which two make a round
MEASURE_BYTES, MEASURE_SECONDS = 256 * 2**20, 0.2
CONTEXT = 0  # positions before a decoded token where attention is not the point

Progress = Callable[[float, float, str], None]


@dataclass(frozen=True)
class Measured:
    """A network, a scheme and the step that was timed. kind: what it is for."""

    kind: str
    config: dict[str, Any]
    scheme: Scheme
    kv_bits: int
    prompts: tuple[tuple[int, int], ...]
    contexts: tuple[int, ...]
    seconds: float
    rounds: tuple[float, ...]


Step = tuple[tuple[tuple[int, int], ...], tuple[int, ...]]  # prompts, contexts


def _decode(tokens: int, context: int = CONTEXT) -> Step:
    return (), (context,) * tokens


def _read(tokens: int, before: int = 0) -> Step:
    return ((tokens, before),), ()


@dataclass(frozen=True)
class Case:
    """Steps to time on one network. shared: its layers have the same matrices."""

    kind: str
    config: dict[str, Any]
    scheme: Scheme
    kv_bits: int
    steps: tuple[Step, ...]
    shared: bool = False


def cases() -> Iterator[Case]:
    """What is timed for the fit."""
    plain = Scheme.parse(REFERENCE)
    steps = tuple(_decode(t) if t <= 32 else _read(t) for t in TOKENS)
    # More weights than the last cache holds, as a model has. The smallest has many layers.
    for config in (
        llama(140, 256, 768, 4, 2),
        llama(24, 640, 1792, 10, 5),
        llama(10, 1024, 2816, 16, 4),
        llama(3, 2048, 8192, 32, 8),
    ):
        yield Case("shape", config, plain, 8, steps)
    yield Case("shape", llama(24, 640, 1792, 10, 2), plain, 8, tuple(_read(t) for t in (2, 4, 8, 16, 24, 32)))
    deep = llama(128, 640, 1792, 10, 5)
    yield Case("long", deep, plain, 8, tuple(_read(t) for t in LONG_TOKENS), shared=True)
    # The longest first: the others cut its cache.
    alone = (_decode(1, 4096), _read(96, 1984), _decode(1, 1024), _read(96, 448), _read(64))
    attention = (*alone, _decode(4, 768))
    for bits in (16, 8, 4, 2):
        for heads, kv_heads, dim in ((16, 16, 64), (16, 4, 64), (16, 2, 128))[
            : {16: 3, 8: 3, 4: 2, 2: 1}[bits]
        ]:
            config = llama(8, 512, 1536, heads, kv_heads, head_dim=dim)
            yield Case("attention", config, plain, bits, attention)
    for name in FORMATS:
        scheme = Scheme.parse(name)
        # A model is far beyond any cache: few tokens take a third more time there than on 100 MB.
        deep = llama(3 if name == "bf16" else 7, 2048, 8192, 32, 8)
        yield Case("format", deep, scheme, 8, tuple(_decode(t) for t in FORMAT_TOKENS if t <= FEW))
        size = llama(2 if name == "bf16" else 3, 2048, 8192, 32, 8)
        yield Case("format", size, scheme, 8, tuple(_decode(t) for t in FORMAT_TOKENS if t > FEW))
    for name in ("int6-g32", "int8-g32", REFERENCE, "bf16"):
        scheme = Scheme(plain.weights, Scheme.parse(name).weights, kv_bits=8)
        head = tuple(_decode(t) for t in (1, 2, 4, 8, 12, 16, 48))
        yield Case("head", llama(1, 1024, 256, 4, 2, vocab=49152), scheme, 8, head)
    for name in (REFERENCE, "int8-g32"):
        wide = Scheme(Scheme.parse(name).weights, activations="int16", kv_bits=16)
        steps = tuple(_decode(t) for t in FORMAT_TOKENS)
        yield Case("int16", llama(4, 1024, 4096, 16, 4), wide, 16, steps)


def held_out() -> Iterator[Case]:
    """What is timed to know the errors: other shapes, mixed formats, contexts between those above."""
    mixed = Scheme.parse(
        {"weights": "int4-g32", "embedding": "int6-g32", "layers": {"*.down_proj.weight": "int6-g32"}}
    )
    decode = (_decode(1, 100), _decode(1, 900), _decode(2, 300), _decode(5, 60), _decode(10, 40))
    read = (_read(64), _read(128, 200), _read(256))
    for config, scheme, bits in (
        (llama(12, 768, 2048, 12, 4, vocab=32000), Scheme.parse(REFERENCE), 8),
        (llama(4, 1536, 4096, 24, 8, vocab=32000), mixed, 8),
        (llama(2, 2048, 5632, 16, 2, vocab=16384), Scheme.parse("int8-g32"), 8),
        (llama(6, 896, 3072, 14, 2, vocab=49152), Scheme.parse("int3-g32"), 4),
        (llama(4, 1280, 3584, 20, 20, vocab=8192), Scheme.parse("nf4-g32"), 16),
        (llama(12, 512, 2048, 8, 8, vocab=32000), Scheme.parse("int4-g64"), 8),
        (llama(2, 3072, 6144, 24, 6, vocab=16384), Scheme.parse("int2-g32"), 8),
        (llama(16, 576, 1280, 9, 3, vocab=24576), Scheme.parse("int6-g32"), 8),
    ):
        yield Case("held out", config, scheme, bits, decode + read)


def measure(which: Sequence[Case], progress: Progress, begin: float, end: float) -> list[Measured]:
    """Time every step of `which`; progress goes from `begin` to `end` (of 1)."""
    found = []
    for number, case in enumerate(which):
        progress(begin + (end - begin) * number / len(which), 1.0, case.kind)
        model = synthetic(case.config, case.scheme, case.kv_bits, case.shared)
        stepper = Stepper(model)
        for prompts, contexts in case.steps:
            rounds = stepper.time(prompts, contexts, ROUNDS, PASSES, LONG_SECONDS)
            found.append(
                Measured(
                    case.kind,
                    case.config,
                    case.scheme,
                    case.kv_bits,
                    prompts,
                    contexts,
                    statistics.median(rounds),
                    tuple(rounds),
                )
            )
    forget()
    return found


def measure_profile(progress: Progress | None = None) -> dict[str, Any]:
    """Everything that lowbit.plan makes a profile from.

    Returns bandwidth_bytes_per_second, int8_multiply_adds_per_second, float_multiply_adds_per_second,
    memory_bytes, runtime_bytes (of a process with everything but a model), crossovers, `fit` and `held_out`
    (lists of Measured), `memory` (pairs of a case and resident bytes), seconds_taken.
    """
    from lowbit import _native

    say = progress or (lambda done, total, what: None)
    started = time.perf_counter()
    crossovers = tuning.tune()
    bandwidth = max(float(_native.measure_bandwidth(MEASURE_BYTES, MEASURE_SECONDS)) for _ in range(2))
    result: dict[str, Any] = {
        "bandwidth_bytes_per_second": bandwidth,
        "int8_multiply_adds_per_second": float(_native.measure_int8_peak(MEASURE_SECONDS)),
        "float_multiply_adds_per_second": float(_native.measure_float_peak(MEASURE_SECONDS)),
        "memory_bytes": memory_bytes("MemTotal"),
        "runtime_bytes": resident_bytes(NOTHING),
        "crossovers": crossovers._asdict(),
    }
    result["fit"] = measure(list(cases()), say, 0.1, 0.75)
    result["held_out"] = measure(list(held_out()), say, 0.75, 0.95)
    say(0.95, 1.0, "memory of processes")
    result["memory"] = [(case, resident_bytes(case)) for case in memory_cases()]
    say(1.0, 1.0, "")
    return {**result, "seconds_taken": time.perf_counter() - started}
