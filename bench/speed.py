"""Decode and prefill speed of several programs on one machine, measured in turns: A, B, A, B, ..

Every figure comes from a process of its own, which warms up before it measures. What disturbs the machine for
a while then disturbs all contestants alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import process
from peers.llama_cpp import LlamaCpp
from peers.openvino_peer import OpenVino

PROMPT, GENERATE = 512, 128
# Measured on Zen 5, SmolLM2 Q4_0: flash attention makes llama.cpp 30% faster in both phases.
FLASH = "on"

Contestant = Callable[[int], Mapping[str, float]]


def lowbit_contestant(
    model: Path,
    repetitions: int = 1,
    isa: str | None = None,
    prompt: int = PROMPT,
    generate: int = GENERATE,
    context: int | None = None,
) -> Contestant:
    """`lowbit bench` on `model`, which warms up and takes medians; every number that it tells is kept."""

    def measure(threads: int) -> Mapping[str, float]:
        options = ["--prefill", prompt, "--decode", generate, "--repeats", repetitions, "--threads", threads]
        options += ["--context", context] if context else []
        out = process.lowbit_json("bench", model, "--no-first-token", *map(str, options), isa=isa)
        figures = {key: float(v) for key, v in out.items() if isinstance(v, int | float)}
        figures["prefill"] = figures["prefill_tokens_per_second"]
        figures["decode"] = figures["decode_tokens_per_second"]
        return figures

    return measure


def llama_contestant(peer: LlamaCpp, model: Path, repetitions: int = 1) -> Contestant:
    """llama-bench on `model`: the median of its repetitions, after its own warm-up."""

    def measure(threads: int) -> Mapping[str, float]:
        series = peer.speed(
            model, threads, prompt=PROMPT, generate=GENERATE, repetitions=repetitions, flash=FLASH
        )
        return {phase: median(values) for phase, values in series.items()}

    return measure


def openvino_contestant(peer: OpenVino, model: Path, repetitions: int = 1) -> Contestant:
    """OpenVINO GenAI's pipeline on `model`: the median of its repetitions, after a warm-up."""

    def measure(threads: int) -> Mapping[str, float]:
        series = peer.speed(model, threads, prompt=PROMPT, generate=GENERATE, repetitions=repetitions)
        return {phase: median(values) for phase, values in series.items()}

    return measure


def take_turns(
    contestants: Mapping[str, Contestant],
    threads: int,
    rounds: int,
    say: Callable[[str], None],
    warm_up: bool = True,
) -> dict[str, dict[str, list[float]]]:
    """Measure every contestant once per round. Returns {contestant: {figure: [one value per round]}}.

    warm_up: a first round, which fills the page cache and wakes the clock, is thrown away.
    """
    series: dict[str, dict[str, list[float]]] = {name: {} for name in contestants}
    for turn in range(0 if warm_up else 1, rounds + 1):
        for name, measure in contestants.items():
            figures = measure(threads)
            kept = "warm-up" if turn == 0 else f"round {turn}/{rounds}"
            prefill, decode = figures["prefill"], figures["decode"]
            say(f"  {kept}: {name}, {threads} threads: prefill {prefill:.0f}, decode {decode:.1f} tokens/s")
            if turn:
                for key, value in figures.items():
                    series[name].setdefault(key, []).append(value)
    return series
