"""The parts about single products: every width, the curve over the batch, lossless weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import process
import targets
from context import Bench
from targets import Row, at_least, row


def kernels_section(bench: Bench) -> tuple[list[Row], Any]:
    """Matrix-vector products against the bandwidth and 512 tokens against the int8 peak, at every width."""
    found = measure(bench, [*targets.KERNEL_FORMATS.values(), *targets.OTHER_FORMATS], (1, 512))
    widths = {name: width for width, name in targets.KERNEL_FORMATS.items()}
    judged = [e for e in found["kernels"] if e["format"] in widths]
    vector = {widths[e["format"]]: e["bandwidth_fraction"] for e in judged if e["batch"] == 1}
    matrix = {widths[e["format"]]: e["peak_fraction"] for e in judged if e["batch"] == 512}
    threads, shape = bench.threads[0], targets.KERNEL_SHAPE
    title = f"matrix-vector {shape} beyond L3, {threads} threads,"
    wide = {w: vector[w] for w in targets.WIDE if w in vector}
    narrow = {w: vector[w] for w in targets.NARROW if w in vector}
    rows = [
        targets.fraction(f"{title} 2 to 8 bits, of the bandwidth", wide, targets.GEMV_FRACTION),
        targets.fraction(f"{title} 1 and 1.6 bits, of the bandwidth", narrow, targets.GEMV_NARROW_FRACTION),
        targets.fraction(
            f"matrix-matrix {shape}x512, {threads} threads, 2 to 8 bits, of the int8 peak",
            {w: matrix[w] for w in targets.WIDE if w in matrix},
            targets.GEMM_FRACTION,
        ),
    ]
    return rows, found


def curve_section(bench: Bench) -> tuple[list[Row], Any]:
    """Tokens per second of one product over 1 to 512 tokens: no batch may be slower than a smaller one."""
    found = measure(bench, list(targets.CURVE_FORMATS), targets.CURVE_BATCHES)
    falls = {name: worst_fall(found["kernels"], name) for name in targets.CURVE_FORMATS}
    lowest = min(falls, key=lambda name: falls[name][0])
    value, batch = falls[lowest]
    note = f"worst: {lowest} at {batch} tokens" if value < 1 else "never falls"
    title = f"{targets.KERNEL_SHAPE}, tokens/s at 1 to 512 tokens, of the best smaller batch"
    return [at_least(title, 100 * value, "%", 100 * targets.CURVE_FRACTION, note)], found


def worst_fall(kernels: list[dict[str, Any]], name: str) -> tuple[float, int]:
    """Least ratio of a batch's tokens per second to the best of any smaller batch, and that batch."""
    best, worst = 0.0, (float("inf"), 0)
    for entry in sorted((e for e in kernels if e["format"] == name), key=lambda e: e["batch"]):
        rate = entry["tokens_per_second"]
        if best:
            worst = min(worst, (rate / best, entry["batch"]))
        best = max(best, rate)
    return worst


def measure(bench: Bench, formats: list[str], batches: tuple[int, ...]) -> dict[str, Any]:
    """`lowbit bench kernels` in a process of its own."""
    options = ["--formats", ",".join(formats), "--shapes", targets.KERNEL_SHAPE]
    options += ["--batch", ",".join(map(str, batches)), "--threads", str(bench.threads[0])]
    found = process.lowbit_json("bench", "kernels", *options)
    for entry in found["kernels"]:
        bench.say(
            f"  {entry['format']} at {entry['batch']}: {entry['bytes_per_second'] / 1e9:.1f} GB/s, "
            f"{entry['multiply_adds_per_second'] / 1e9:.0f} G multiply-adds/s ({entry['kernel']}), "
            f"{entry['bound_fraction']:.0%} of the bound"
        )
    return found


def lossless_section(bench: Bench) -> tuple[list[Row], Any]:
    """bf16 weights compressed without loss: bits, equality of every bit, and speed beside plain bf16."""
    found = measure(bench, [targets.PLAIN, targets.LOSSLESS], (1,))
    seconds = {entry["format"]: entry["seconds"] for entry in found["kernels"]}
    data: dict[str, Any] = {"products": found}
    rows = []
    if targets.STORIES.exists():
        data["stories15M"] = told = lossless_model(bench.cache / "models")
        bits, same = told["bits_per_weight"], told["equal_matrices"] == told["matrices"]
        target = f"<= {targets.LOSSLESS_BITS}"
        measure_bits = "DFloat11, bits per weight of stories15M cast to bf16"
        rows.append(row(measure_bits, bits, "bits", target, bits <= targets.LOSSLESS_BITS))
        note = f"{told['equal_matrices']} of {told['matrices']} matrices equal"
        title = "DFloat11, weights of stories15M that come back equal to the bit"
        rows.append(row(title, 100.0 * told["equal_weights"], "%", "all", same, note))
    else:
        rows.append(row("DFloat11 on stories15M", None, "", "", None, "the model is not on this machine"))
    ratio = seconds[targets.PLAIN] / seconds[targets.LOSSLESS]
    title = f"DFloat11, matrix-vector {targets.KERNEL_SHAPE} beyond L3, against plain bf16"
    rows.append(at_least(title, ratio, "x", targets.LOSSLESS_SPEED))
    return rows, data


def lossless_model(folder: Path) -> dict[str, Any]:
    """Cast stories15M to bf16, compress that without loss, and compare all weights bit by bit."""
    plain, coded = folder / "stories15M.bf16", folder / "stories15M.lossless"
    process.lowbit_json(
        "quantize", targets.STORIES, targets.PLAIN, "--output", plain, "--force", "--no-verify"
    )
    told = process.lowbit_json(
        "quantize", plain, targets.LOSSLESS, "--output", coded, "--force", "--no-verify"
    )
    return {"bits_per_weight": told["bits_per_weight"], **equal_weights(plain, coded)}


def equal_weights(first: Path, second: Path) -> dict[str, Any]:
    """How many matrices, and which share of all weights, are the same bits in two lowbit directories."""
    import numpy as np

    import lowbit

    a, b = (lowbit.load(str(path)).model.weights for path in (first, second))
    if set(a) != set(b):
        raise process.CommandError(f"{second.name}: not the matrices of {first.name}")
    same = total = equal = 0
    for name, matrix in a.items():
        bits = [m.dequantize().view(np.uint32) for m in (matrix, b[name])]
        matches = int(np.count_nonzero(bits[0] == bits[1]))
        same, total, equal = same + matches, total + bits[0].size, equal + (matches == bits[0].size)
    return {"matrices": len(a), "equal_matrices": equal, "equal_weights": same / total}
