"""What is measured, and the figure that each measure has to reach. Change the numbers here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# The 4-bit scheme that stands against llama.cpp's Q4_0 and the options of `lowbit quantize` and of the
# commands that run it: the fastest whose perplexity is no higher and whose bytes are no more.
SCHEME = "int4-g16-m4"
QUANTIZE_OPTIONS: tuple[str, ...] = ()
PEER_TYPE = "Q4_0"
OURS, THEIRS = f"lowbit {SCHEME}", f"llama.cpp {PEER_TYPE}"
SAME_FILE = f"lowbit {PEER_TYPE} file"
OPENVINO = "OpenVINO"

SMALL, LARGE = "smollm2-135m", "llama-1.1b"
TITLES = {SMALL: "SmolLM2", LARGE: "1.1B"}

# Weights of the 1.1B shape by width, and llama.cpp's types of no fewer bits.
WIDTHS = {"8": "int8-g64", "4": SCHEME, "3": "int3-g64", "2": "int2-g64", "1.6": "ternary"}
PEER_TYPES = ("Q8_0", "Q6_K", "Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K", "TQ2_0", "TQ1_0")
# (width, llama.cpp type) -> least ratio of decoding speeds, two threads.
DECODE_RATIOS = {
    ("8", "Q8_0"): 1.0,
    ("4", "Q4_0"): 1.0,
    ("4", "Q4_K_M"): 1.05,
    ("3", "Q3_K_M"): 1.6,
    ("2", "Q2_K"): 1.5,
    ("1.6", "TQ2_0"): 2.0,
    ("1.6", "TQ1_0"): 2.0,
}
PREFILL_OVER_PEER, PREFILL_OVER_BEST_TYPE = 2.5, 1.8

# Least ratio to llama.cpp Q4_0 by threads, and to OpenVINO GenAI int8 with all threads.
SPEED_RATIOS = {
    SMALL: {2: {"decode": 1.6, "prefill": 2.8}, 1: {"decode": 1.2, "prefill": 1.8}},
    LARGE: {2: {"prefill": PREFILL_OVER_PEER}, 1: {"decode": 1.0, "prefill": 1.8}},
}
OPENVINO_PREFILL = {SMALL: 1.3, LARGE: 1.4}
# Least fraction of the bound that bandwidth and int8 peak set.
BOUND_FRACTIONS = {SMALL: {"decode": 0.7, "prefill": 0.5}}
DECODE_FRACTIONS = {"8": 0.9, "4": 0.9, "3": 0.9, "2": 0.9, "1.6": 0.75}
PREFILL_FRACTION = 0.65
AVX2_RATIO = 1.2
LONG_PROMPT, LONG_FRACTION = 4096, 0.6

# Single products.
KERNEL_SHAPE = "4096x4096"
KERNEL_FORMATS = {
    "8": "int8-g64",
    "6": "int6-g64",
    "5": "int5-g64",
    "4": "int4-g64",
    "3": "int3-g64",
    "2": "int2-g64",
    "1.6": "ternary",
    "1": "int1-g64",
}
# Shown beside them, without a target.
OTHER_FORMATS = (
    SCHEME, "int4-g32", "nf4-g64", "mxfp4", "mxfp8_e4m3", "bitmod4-g128", "bcq3-g128", "trit2-g128", "bf16",
)  # fmt: skip
WIDE = ("8", "6", "5", "4", "3", "2")
NARROW = ("1.6", "1")
GEMV_FRACTION, GEMV_NARROW_FRACTION, GEMM_FRACTION = 0.9, 0.75, 0.8
CURVE_FORMATS = ("int8-g64", "int4-g64", "int2-g64", "ternary")
CURVE_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
CURVE_FRACTION = 0.97  # of the best smaller batch: what remains is noise

PLAIN, LOSSLESS = "bf16", "df11"
LOSSLESS_BITS, LOSSLESS_SPEED = 11.2, 0.8
STORIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "weights" / "stories15M"

FIRST_TOKEN_SECONDS = 0.5
MEMORY_OVERHEAD_BYTES = 60_000_000
QUANTIZE_SECONDS = 3.0

# Serving, of SCHEME with 8-bit keys and values.
SERVING_RATE, SERVING_FIRST = 3.0, 0.5  # against llama-server
STRETCH, PREFIX, LOOKUP = 2.0, 5.0, 1.5
KV_MEMORY, KV_LOSS = 0.3, 0.01  # of 4-bit keys and values, against 16 bits
OVERHEAD, IDLE, SOAK_GROWTH = 0.05, 0.01, 0.03

Row = dict[str, Any]


def row(
    measure: str, value: float | None, unit: str, target: str, passed: bool | None, note: str = ""
) -> Row:
    """One line of the table of targets; passed None: no verdict."""
    return {
        "measure": measure,
        "target": target,
        "value": value,
        "unit": unit,
        "passed": passed,
        "note": note,
    }


def at_least(
    measure: str, value: float | None, unit: str, least: float, note: str = "", why_not: str = ""
) -> Row:
    """A row whose value has to reach `least`; a value of None was not measured, because of `why_not`."""
    shown = f"{least:g}{unit}" if unit in ("x", "%") else f"{least:g} {unit}".strip()
    if value is None:
        return row(measure, None, unit, f">= {shown}", None, why_not or "not measured")
    return row(measure, value, unit, f">= {shown}", value >= least, note)


def at_most(
    measure: str, value: float | None, unit: str, most: float, note: str = "", why_not: str = ""
) -> Row:
    """A row whose value may not exceed `most`; a value of None was not measured, because of `why_not`."""
    target = f"<= {most:g}{unit}" if unit in ("x", "%") else f"<= {most:g} {unit}".strip()
    if value is None:
        return row(measure, None, unit, target, None, why_not or "not measured")
    return row(measure, value, unit, target, value <= most, note)


def fraction(measure: str, found: dict[str, float], least: float, what: str = "") -> Row:
    """A row for the worst of several fractions; the note names them all."""
    if not found:
        return at_least(measure, None, "%", 100 * least)
    worst = min(found, key=lambda key: found[key])
    each = ", ".join(f"{key}: {100 * value:.0f}%" for key, value in found.items())
    return at_least(
        measure, 100 * found[worst], "%", 100 * least, f"{what}{each}" if len(found) > 1 else what
    )
