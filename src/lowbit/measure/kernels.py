"""One product at a time: how near each format's kernel comes to what the machine allows.

A product reads its weights once and multiplies them with every token, so it takes at least the longer of
weight bytes over memory bandwidth and multiply-adds over the peak. The limit is measured again beside every
timing: on a shared machine it changes from minute to minute. Weights come from memory, not from a cache, as
they do in a model: the product walks through many copies of its matrix. Every kernel's result is compared
with float64 before it is timed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from lowbit.errors import FormatError, RequestError
from lowbit.formats import Format, parse_format
from lowbit.kernels import tuning
from lowbit.measure.machine import cache_bytes, cpu_name
from lowbit.measure.products import (
    PATTERN_ROWS,
    cold_bytes,
    copies_of,
    expected_product,
    parse_shape,
    random_matrix,
    refuse_too_large,
)

FORMATS = (
    "int1-g64", "ternary", "int2-g64", "int3-g64", "int4-g32", "int5-g64", "int6-g64", "int8-g64",
    "nf4-g64", "mxfp4", "mxfp8_e4m3", "bitmod4-g128", "bcq3-g128", "bf16",
)  # fmt: skip
SHAPES = ("4096x4096", "576x576")
BATCHES = (1, 512)
ERROR_LIMIT = {8: 0.02, 16: 0.001}  # relative error in the 2-norm that rounding the activations explains
ROUNDS, ROUND_SECONDS = 5, 0.1
BOUND_SECONDS = 0.05
BANDWIDTH_CACHES, LEAST_BANDWIDTH_BYTES = 8, 256 * 2**20
MOST_BATCH, MOST_THREADS = 65536, 1024

Progress = Callable[[int, int, str], None]


def bench_kernels(
    formats: Sequence[str | Format] = FORMATS,
    shapes: Sequence[str | tuple[int, int]] = SHAPES,
    batches: Sequence[int] = BATCHES,
    threads: Sequence[int] = (),
    activation_bits: int = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time a product of every format, shape, batch (rows of activations) and number of threads.

    formats: names or Formats; shapes: "OUTxIN" or (out_features, in_features); threads: what the machine
    allows if empty; progress: called as (done, total, what comes next).
    Returns cpu, isa, activation_bits, `bounds` (the limits for each number of threads), `kernels` (one entry
    for each product, see `measure_batches`) and `skipped` (format and shape that do not fit, and why).
    Raises RequestError or FormatError before anything is measured if something cannot be measured at all.
    """
    from lowbit import _native

    parsed = [parse_format(fmt) for fmt in formats]
    sizes = [parse_shape(shape) for shape in shapes]
    counts, teams = sorted(set(batches)), list(dict.fromkeys(threads)) or [_native.threads()]
    _check(parsed, sizes, counts, teams, activation_bits)
    say = progress or (lambda done, total, what: None)
    total, done = len(teams) * len(parsed) * len(sizes) * len(counts), 0
    result: dict[str, Any] = {"cpu": cpu_name(), "isa": _native.isa(), "activation_bits": activation_bits}
    result |= {"bounds": [], "kernels": [], "skipped": []}
    before = _native.threads()
    try:
        for team in teams:
            _native.set_threads(team)
            tuning.tune()
            result["bounds"].append({"threads": team, **limits()})
            for fmt, size in itertools.product(parsed, sizes):
                say(done, total, f"{fmt.name} {size[0]}x{size[1]}")
                try:
                    found = measure_batches(fmt, size, counts, activation_bits)
                    result["kernels"] += [{**entry, "threads": team} for entry in found]
                except FormatError as refusal:
                    shape = f"{size[0]}x{size[1]}"
                    result["skipped"].append({"format": fmt.name, "shape": shape, "why": str(refusal)})
                done += len(counts)
    finally:
        _native.set_threads(before)
        tuning.apply()
    say(total, total, "")
    return result


def _check(
    formats: Sequence[Format],
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    threads: Sequence[int],
    activation_bits: int,
) -> None:
    if not (formats and shapes and batches):
        raise RequestError("bench kernels: nothing to measure; give a format, a shape and a batch at least")
    for what, values, most in (("batch", batches, MOST_BATCH), ("threads", threads, MOST_THREADS)):
        for value in values:
            if not 1 <= value <= most:
                raise RequestError(f"bench kernels: {what} {value} is outside 1 to {most}")
    if activation_bits not in ERROR_LIMIT:
        raise RequestError(f"bench kernels: activation_bits={activation_bits}; must be 8 or 16")
    for fmt, shape in itertools.product(formats, shapes):
        refuse_too_large(fmt, shape, max(batches))


def limits() -> dict[str, float]:
    """Bandwidth in bytes per second, peaks in multiply-adds per second, of the threads in use."""
    from lowbit import _native

    return {
        "bandwidth_bytes_per_second": bandwidth(),
        "int8_multiply_adds_per_second": float(_native.measure_int8_peak(BOUND_SECONDS)),
        "float_multiply_adds_per_second": float(_native.measure_float_peak(BOUND_SECONDS)),
    }


def bandwidth() -> float:
    """Bytes per second that the threads in use read from memory."""
    from lowbit import _native

    size = max(LEAST_BANDWIDTH_BYTES, BANDWIDTH_CACHES * (cache_bytes(3) or 0))
    return float(_native.measure_bandwidth(size, BOUND_SECONDS))


def measure_batches(
    fmt: Format, shape: tuple[int, int], batches: Sequence[int], activation_bits: int
) -> list[dict[str, Any]]:
    """Time products of `shape` with each number of tokens; weights are cold. One entry for each batch:

    seconds of one product and bytes_per_second of weights, medians of ROUNDS; bound_fraction: the least
    seconds that memory and arithmetic allow over those taken, and `bound` which of the two decides;
    peak_fraction: of the multiply-adds that the machine can do, int8 ones for codes (two for each weight
    with 16-bit activations, one whatever its planes or limbs), float32 ones for plain float weights.
    """
    out_features, in_features = shape
    matrix = random_matrix(fmt, out_features, in_features)
    check(fmt, in_features, batches, activation_bits)
    copies = [copy.native() for copy in copies_of(matrix, cold_bytes())]
    rng = np.random.default_rng(2)
    entries = []
    for batch in batches:
        x = rng.standard_normal((batch, in_features), dtype=np.float32)
        work = out_features * in_features * batch * (activation_bits // 8 if fmt.float_type is None else 1)
        found = time_product(copies, x, activation_bits, matrix.nbytes, work, fmt.float_type is None)
        entries.append(
            {
                "format": fmt.name,
                "bits_per_weight": matrix.bits_per_weight,
                "out_features": out_features,
                "in_features": in_features,
                "batch": batch,
                "kernel": kernel_name(copies[0], fmt, batch, activation_bits),
                **found,
                "tokens_per_second": batch / found["seconds"],
                "multiply_adds_per_second": out_features * in_features * batch / found["seconds"],
                "activation_bits": activation_bits,
                "copies": len(copies),
            }
        )
    return entries


def time_product(
    copies: Sequence[Any], x: np.ndarray, activation_bits: int, n_bytes: int, work: int, integer: bool
) -> dict[str, Any]:
    """Time one product beside its limit. n_bytes: of the weights; work: multiply-adds at the peak's rate."""
    from lowbit import _native

    peak = float((_native.measure_int8_peak if integer else _native.measure_float_peak)(BOUND_SECONDS))
    rate = bandwidth()
    by_memory = n_bytes / rate > work / peak
    rounds = []
    for _ in range(ROUNDS):
        if by_memory:
            rate = bandwidth()
        else:
            peak = float(
                (_native.measure_int8_peak if integer else _native.measure_float_peak)(BOUND_SECONDS)
            )
        least = max(n_bytes / rate, work / peak)
        seconds = seconds_per_call([partial(_native.matmul, x, copy, activation_bits) for copy in copies])
        rounds.append((seconds, least / seconds, n_bytes / seconds / rate, work / seconds / peak))
    seconds, fraction, of_bandwidth, of_peak = (statistics.median(values) for values in zip(*rounds))
    return {
        "seconds": seconds,
        "seconds_low": min(r[0] for r in rounds),
        "seconds_high": max(r[0] for r in rounds),
        "bytes_per_second": n_bytes / seconds,
        "bound_fraction": fraction,
        "bound": "memory" if by_memory else "arithmetic",
        "bandwidth_fraction": of_bandwidth,
        "peak_fraction": of_peak,
    }


def seconds_per_call(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of one call: the median of passes through all of `calls` within ROUND_SECONDS, at least two."""
    passes: list[float] = []
    begin = time.perf_counter()
    while len(passes) < 2 or time.perf_counter() - begin < ROUND_SECONDS:
        started = time.perf_counter()
        for call in calls:
            call()
        passes.append((time.perf_counter() - started) / len(calls))
    return statistics.median(passes)


def check(fmt: Format, in_features: int, batches: Sequence[int], activation_bits: int) -> float:
    """The worst relative error against float64 on the dequantized weights, over all batches.

    Raises ArithmeticError if rounding the activations does not explain it: such a kernel is not timed.
    """
    from lowbit import _native

    matrix = random_matrix(fmt, PATTERN_ROWS, in_features)
    x = np.random.default_rng(1).standard_normal((max(batches), in_features), dtype=np.float32)
    expected = expected_product(matrix, x)
    worst = 0.0
    for batch in batches:
        found = _native.matmul(x[:batch], matrix.native(), activation_bits)
        error = float(np.linalg.norm(found - expected[:batch]) / np.linalg.norm(expected[:batch]))
        if not error <= ERROR_LIMIT[activation_bits]:
            raise ArithmeticError(
                f"{fmt.name}, {in_features} inputs, batch {batch}: relative error {error:.2g} is above "
                f"{ERROR_LIMIT[activation_bits]}; the kernel is wrong and is not timed"
            )
        worst = max(worst, error)
    return worst


def kernel_name(native: Any, fmt: Format, batch: int, activation_bits: int) -> str:
    """Which kernel computes such a product."""
    if hasattr(native, "kernel"):
        return str(native.kernel(batch, activation_bits))
    return "float" if fmt.float_type is not None else "gemv" if batch == 1 else "gemm"
