"""Decode and prefill speed of several programs on one machine, measured in turns: A, B, A, B, ..

Every figure comes from a process of its own. The first round warms the page cache, the clock and the
allocator and is thrown away. What disturbs the machine for a while then disturbs all contestants alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import process
from peers.llama_cpp import LlamaCpp

PROMPT, GENERATE = 512, 128
# Measured on Zen 5, SmolLM2 Q4_0: flash attention makes llama.cpp 30% faster in both phases.
FLASH = "on"

Contestant = Callable[[int], Mapping[str, float]]


def lowbit_contestant(model: Path, repetitions: int = 2) -> Contestant:
    """`lowbit bench` on `model`, which warms up and takes medians; every number that it tells is kept."""

    def measure(threads: int) -> Mapping[str, float]:
        options = ["--prefill", PROMPT, "--decode", GENERATE, "--repeats", repetitions, "--threads", threads]
        out = process.lowbit_json("bench", model, *map(str, options))
        figures = {key: float(v) for key, v in out.items() if isinstance(v, int | float)}
        figures["prefill"] = figures["prefill_tokens_per_second"]
        figures["decode"] = figures["decode_tokens_per_second"]
        return figures

    return measure


def llama_contestant(peer: LlamaCpp, model: Path, repetitions: int = 2) -> Contestant:
    """llama-bench on `model`: the median of its repetitions, after its own warm-up."""

    def measure(threads: int) -> Mapping[str, float]:
        series = peer.speed(
            model, threads, prompt=PROMPT, generate=GENERATE, repetitions=repetitions, flash=FLASH
        )
        return {phase: median(values) for phase, values in series.items()}

    return measure


def take_turns(
    contestants: Mapping[str, Contestant], threads: int, rounds: int, say: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    """Measure every contestant once per round. Returns {contestant: {figure: [one value per round]}}."""
    series: dict[str, dict[str, list[float]]] = {name: {} for name in contestants}
    for turn in range(rounds + 1):
        for name, measure in contestants.items():
            figures = measure(threads)
            kept = "warm-up" if turn == 0 else f"round {turn}/{rounds}"
            prefill, decode = figures["prefill"], figures["decode"]
            say(f"  {kept}: {name}, {threads} threads: prefill {prefill:.0f}, decode {decode:.1f} tokens/s")
            if turn:
                for key, value in figures.items():
                    series[name].setdefault(key, []).append(value)
    return series
