"""One product at a time: how near each format's kernel comes to what the machine allows.

Matrix-vector products (decode) are held against the memory bandwidth, matrix-matrix products (prefill)
against the peak of int8 multiply-adds; both are measured in the same run. A matrix-vector product walks
through enough copies of the matrix to find its weights in memory, not in a cache. Each kernel's result is
checked before it is timed.

    python bench/kernels.py --formats int4-g32,ternary --shapes 2048x2048 --threads 2
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import machine
import spread

FORMATS = (
    "int1-g64,int2-g64,ternary,int3-g64,int4-g32,int4-g64,int4a-g64,int5-g64,int6-g32,int8-g32,nf4-g64,"
    "mxfp4,nvfp4,mxfp6_e2m3,mxfp8_e4m3,bitmod4-g128,bcq3-g128,fp16,bf16"
)
SHAPES = "576x576,1536x576,49152x576,2048x2048,5632x2048,2048x5632,4096x4096"
# Weights of consecutive products together: several times any last-level cache that the machine reports.
COLD_CACHES, LEAST_COLD_BYTES, MOST_COPIES = 4, 128 * 2**20, 512
PATTERN_ROWS = 64  # rows that are really quantized; the others repeat them, which changes no timing
ERROR_LIMIT = {8: 0.02, 16: 0.001}  # relative error in the 2-norm that rounding the activations explains
SERIES, SERIES_SECONDS = 5, 0.2


def random_matrix(name: str, out_features: int, in_features: int) -> Any:
    """A PackedMatrix in format `name`: PATTERN_ROWS rows of normal weights, repeated to `out_features`."""
    from lowbit.formats import parse_format
    from lowbit.packed import BLOCK_ROWS, PackedMatrix
    from lowbit.quantize import round_to_nearest

    rng = np.random.default_rng(0)
    rows = min(PATTERN_ROWS, out_features)
    weight = rng.standard_normal((rows, in_features), dtype=np.float32)
    pattern = round_to_nearest(weight, parse_format(name), search="minmax")
    meta, arrays = pattern.state()
    # The first axis of every packed array is blocks of 32 rows; tables of levels belong to no row.
    blocks = -(-out_features // BLOCK_ROWS)
    repeated = {
        key: a if key.endswith(".levels") else np.resize(a, (blocks, *a.shape[1:]))
        for key, a in arrays.items()
    }
    return PackedMatrix.from_state({**meta, "shape": [out_features, in_features]}, repeated)


def copies_of(matrix: Any, total_bytes: int) -> list[Any]:
    """`matrix` and enough copies in memory of their own to fill `total_bytes`."""
    from lowbit.packed import PackedMatrix

    count = max(1, min(MOST_COPIES, -(-total_bytes // matrix.nbytes)))
    meta, arrays = matrix.state()
    return [matrix] + [
        PackedMatrix.from_state(meta, {key: a.copy() for key, a in arrays.items()}) for _ in range(count - 1)
    ]


def check(name: str, in_features: int, activation_bits: int) -> float:
    """Relative error against float64 on the dequantized weights; raises if rounding does not explain it."""
    from lowbit import _native

    matrix = random_matrix(name, PATTERN_ROWS, in_features)
    x = np.random.default_rng(1).standard_normal((3, in_features), dtype=np.float32)
    expected = x.astype(np.float64) @ matrix.dequantize().astype(np.float64).T
    found = _native.matmul(x, matrix.native(), activation_bits)
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    if not error <= ERROR_LIMIT[activation_bits]:
        limit = ERROR_LIMIT[activation_bits]
        raise ArithmeticError(f"{name}, {in_features} inputs: relative error {error:.2g} is above {limit}")
    return error


def seconds_per_call(calls: list[Callable[[], object]]) -> dict[str, Any]:
    """Median and spread of the seconds of one call, over SERIES rounds through all of `calls`."""
    started = time.perf_counter()
    for call in calls:
        call()
    once = time.perf_counter() - started
    rounds = max(1, round(SERIES_SECONDS / max(once, 1e-9)))
    values = []
    for _ in range(SERIES):
        started = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        values.append((time.perf_counter() - started) / (rounds * len(calls)))
    return spread.summary(values)


def measure(
    name: str, shape: tuple[int, int], tokens: int, activation_bits: int, bounds: dict[str, float]
) -> dict[str, Any]:
    """Time one product of `tokens` rows. Rates are per second; fractions are of the measured bounds."""
    from lowbit import _native

    out_features, in_features = shape
    matrix = random_matrix(name, out_features, in_features)
    cold = max(LEAST_COLD_BYTES, COLD_CACHES * int(bounds["l3_bytes"])) if tokens == 1 else 1
    matrices = [m.native() for m in copies_of(matrix, cold)]
    x = np.random.default_rng(2).standard_normal((tokens, in_features), dtype=np.float32)
    found = seconds_per_call([lambda m=m: _native.matmul(x, m, activation_bits) for m in matrices])
    seconds = found["median"]
    byte_rate, add_rate = matrix.nbytes / seconds, out_features * in_features * tokens / seconds
    return {
        "format": name,
        "shape": f"{out_features}x{in_features}",
        "tokens": tokens,
        "activation_bits": activation_bits,
        "bits_per_weight": matrix.bits_per_weight,
        "copies": len(matrices),
        "seconds": found,
        "bytes_per_second": byte_rate,
        "bandwidth_fraction": byte_rate / bounds["bandwidth_bytes_per_second"],
        "multiply_adds_per_second": add_rate,
        "int8_peak_fraction": add_rate / bounds["int8_multiply_adds_per_second"],
    }


def runs(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every product asked for, after its kernel's result has been checked."""
    from lowbit import _native
    from lowbit.errors import FormatError

    l3_bytes = machine.cache_bytes(3) or 0
    for threads in map(int, options.threads.split(",")):
        _native.set_threads(threads)
        bounds = {
            "bandwidth_bytes_per_second": float(_native.measure_bandwidth(512 * 2**20, 0.5)),
            "int8_multiply_adds_per_second": float(_native.measure_int8_peak(0.5)),
            "l3_bytes": float(l3_bytes),
        }
        yield {"threads": threads, **bounds}
        for name in options.formats.split(","):
            for shape in options.shapes.split(","):
                size = parse_shape(shape)
                try:
                    error = check(name, size[1], options.activation_bits)
                except FormatError as refusal:
                    yield {"format": name, "shape": shape, "skipped": str(refusal)}
                    continue
                for tokens in map(int, options.tokens.split(",")):
                    found = measure(name, size, tokens, options.activation_bits, bounds)
                    yield {**found, "threads": threads, "relative_error": error}


def parse_shape(text: str) -> tuple[int, int]:
    """`5632x2048` -> (5632, 2048): out_features, in_features."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise SystemExit(f"kernels.py: shape {text!r} is not OUTxIN, for example 5632x2048")
    return int(parts[0]), int(parts[1])


def line(found: dict[str, Any]) -> str:
    """One result as a line of text; the bandwidth column speaks at 1 token, the peak column at many."""
    if "format" not in found:
        bandwidth = found["bandwidth_bytes_per_second"] / 1e9
        peak = found["int8_multiply_adds_per_second"] / 1e9
        head = f"\n{found['threads']} threads: {bandwidth:.1f} GB/s, {peak:.0f} G multiply-adds/s (int8)\n"
        return head + (
            f"{'format':<14}{'shape':<12}{'tokens':>6}{'bits':>7}{'us':>10}{'+-%':>6}"
            f"{'GB/s':>8}{'of it':>7}{'GMA/s':>8}{'of it':>7}{'error':>9}"
        )
    if "skipped" in found:
        return f"{found['format']:<14}{found['shape']:<12} skipped: {found['skipped']}"
    seconds = found["seconds"]
    noise = 50 * (seconds["high"] - seconds["low"]) / seconds["median"]
    return (
        f"{found['format']:<14}{found['shape']:<12}{found['tokens']:>6}{found['bits_per_weight']:>7.2f}"
        f"{seconds['median'] * 1e6:>10.1f}{noise:>6.1f}"
        f"{found['bytes_per_second'] / 1e9:>8.1f}{found['bandwidth_fraction']:>7.0%}"
        f"{found['multiply_adds_per_second'] / 1e9:>8.0f}{found['int8_peak_fraction']:>7.0%}"
        f"{found['relative_error']:>9.1e}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/kernels.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--shapes", default=SHAPES, help="OUTxIN, separated by commas")
    parser.add_argument("--tokens", default="1,512", help="rows of activations (default 1,512)")
    parser.add_argument("--threads", default="2,1")
    parser.add_argument("--activation-bits", type=int, choices=(8, 16), default=8)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    options = parser.parse_args()
    found = []
    for entry in runs(options):
        print(line(entry), flush=True)
        found.append(entry)
    if options.json:
        about = {"date": machine.now(), **machine.commit(), "machine": machine.describe()}
        options.json.write_text(json.dumps({**about, "results": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
