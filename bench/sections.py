"""The parts of a benchmark run. Each measures one thing and returns rows against targets plus all raw data.

A row: {"measure", "target" (words), "value", "unit", "passed" (None: no verdict), "note"}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import process
import quality
import speed
import spread
from peers.llama_cpp import LlamaCpp

OURS, THEIRS = "lowbit int4-g32", "llama.cpp Q4_0"
SAME_FILE = "lowbit Q4_0 file"
SCHEME, PEER_TYPE = "int4-g32", "Q4_0"
# Least ratio of lowbit's speed to llama.cpp's.
SPEED_TARGETS = {
    "smollm2-135m": {"decode": 1.2, "prefill": 1.8},
    "llama-1.1b": {"decode": 1.0, "prefill": 1.8},
}
FIRST_TOKEN_SECONDS = 0.5
MEMORY_OVERHEAD_BYTES = 60_000_000
QUANTIZE_SECONDS = 3.0
PROMPT = "Write one sentence about the sea."

Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What every section needs to know."""

    cache: Path
    peer: LlamaCpp | None
    threads: tuple[int, ...]
    rounds: int
    text: Path
    tokens: int
    say: Callable[[str], None]
    made: dict[str, Path] = field(default_factory=dict)  # lowbit directories of this run

    def source(self, name: str) -> Path:
        return models.source_gguf(name, self.cache, self.say)

    def ours(self, name: str) -> Path:
        if name not in self.made:
            self.quantize(name)
        return self.made[name]

    def quantize(self, name: str) -> dict[str, Any]:
        """Make lowbit's directory of the model, again if it is there; returns what `quantize` said."""
        self.made[name], told = models.lowbit_directory(name, self.source(name), SCHEME, self.cache)
        return told

    def theirs(self, name: str, kind: str = PEER_TYPE) -> Path | None:
        if self.peer is None:
            return None
        return models.peer_gguf(name, self.source(name), kind, self.cache, self.peer)


def row(
    measure: str, value: float | None, unit: str, target: str, passed: bool | None, note: str = ""
) -> Row:
    """One line of the table of targets."""
    return {
        "measure": measure,
        "target": target,
        "value": value,
        "unit": unit,
        "passed": passed,
        "note": note,
    }


def quality_section(bench: Bench) -> tuple[list[Row], Any]:
    """Perplexity and bytes of SmolLM2 in our 4 bits and in llama.cpp's, in one harness on one text."""
    name = "smollm2-135m"
    files = {OURS: bench.ours(name), "source Q4_1": bench.source(name)}
    theirs = bench.theirs(name)
    if theirs is not None:
        files[THEIRS] = theirs
    data: dict[str, Any] = {"text": bench.text.name, "tokens": bench.tokens, "context": quality.CONTEXT}
    data["models"] = {
        label: quality.evaluate(path, bench.text, bench.tokens, bench.threads[0])
        for label, path in files.items()
    }
    for label, found in data["models"].items():
        bench.say(f"  {label}: perplexity {found['perplexity']:.4f}, {found['weight_bytes'] / 1e6:.1f} MB")
    if theirs is None or bench.peer is None:
        return [], data
    # A second opinion on the harness: the peer scores its own file, and we repeat that with its own rule.
    chunks = data["models"][THEIRS]["tokens"] // (quality.CONTEXT - 1)  # a window scores all but its first
    data["peer_rule"] = {
        "rule": "windows as above, only the second half of each is scored",
        "llama-perplexity": bench.peer.perplexity(
            theirs, bench.text, context=quality.CONTEXT, threads=bench.threads[0], chunks=chunks
        ),
        "lowbit": quality.second_half_perplexity(theirs, bench.text, chunks),
    }
    a, b = data["models"][OURS], data["models"][THEIRS]
    peer_rule = data["peer_rule"]
    note = f"llama-perplexity by its own rule {peer_rule['llama-perplexity']:.4f}, lowbit by that rule"
    note += f" {peer_rule['lowbit']:.4f}, on the same Q4_0 file"
    rows = [
        row(
            f"SmolLM2 perplexity, {SCHEME} against {PEER_TYPE} ({b['perplexity']:.4f})",
            a["perplexity"],
            "",
            "no higher",
            a["perplexity"] <= b["perplexity"],
            note,
        ),
        row(
            f"SmolLM2 weight bytes, {SCHEME} against {PEER_TYPE} ({b['weight_bytes'] / 1e6:.1f} MB)",
            a["weight_bytes"] / 1e6,
            "MB",
            "no more",
            a["weight_bytes"] <= b["weight_bytes"],
        ),
    ]
    return rows, data


def speed_section(bench: Bench, name: str) -> tuple[list[Row], Any]:
    """Decode of 128 and prefill of 512 tokens against llama.cpp, in turns, for each number of threads."""
    ours = bench.ours(name)
    contestants = {OURS: speed.lowbit_contestant(ours)}
    files = {OURS: ours}
    theirs = bench.theirs(name)
    if theirs is not None and bench.peer is not None:
        contestants |= {
            THEIRS: speed.llama_contestant(bench.peer, theirs),
            SAME_FILE: speed.lowbit_contestant(theirs),
        }
        files |= {THEIRS: theirs, SAME_FILE: theirs}
    rows, data = [], []
    for threads in bench.threads:
        series = speed.take_turns(contestants, threads, bench.rounds, bench.say)
        found = {
            "model": name,
            "threads": threads,
            "weight_bytes": {label: models.weight_bytes(path) for label, path in files.items()},
            "contestants": {
                label: {key: spread.summary(values) for key, values in figures.items()}
                for label, figures in series.items()
            },
            "ratios": {},
        }
        for phase, least in SPEED_TARGETS[name].items():
            measure = f"{name} {phase}, {threads} threads" if threads > 1 else f"{name} {phase}, 1 thread"
            if THEIRS not in series:
                rows.append(row(measure, None, "x", f">= {least}x", None, "llama.cpp was not measured"))
                continue
            against = spread.ratio(series[OURS][phase], series[THEIRS][phase])
            found["ratios"][phase] = against
            note = f"rounds {against['low']:.2f} to {against['high']:.2f}"
            rows.append(
                row(measure, against["median"], "x", f">= {least}x", against["median"] >= least, note)
            )
        data.append(found)
    return rows, data


def start_section(bench: Bench) -> tuple[list[Row], Any]:
    """Seconds from the start of `lowbit run` to the first byte it answers; the page cache is warm."""
    path = bench.ours("smollm2-135m")
    arguments = ("run", path, "-p", PROMPT, "--max-tokens", "8")
    times = [process.lowbit(*arguments).first_byte_seconds for _ in range(bench.rounds + 1)][1:]
    if None in times:
        raise process.CommandError("lowbit run: nothing came on stdout, so there is no first token to time")
    found = spread.summary([t for t in times if t is not None])
    value = found["median"]
    note = f"{found['low']:.3f} to {found['high']:.3f} s"
    target = f"< {FIRST_TOKEN_SECONDS} s"
    measure = "SmolLM2, process start to first token"
    return [row(measure, value, "s", target, value < FIRST_TOKEN_SECONDS, note)], found


def memory_section(bench: Bench) -> tuple[list[Row], Any]:
    """Peak resident bytes of `lowbit run` beyond its weights and the keys and values that it held."""
    from lowbit.model.checkpoint import open_checkpoint

    path = bench.ours("smollm2-135m")
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        sizes = {key: getattr(config, key) for key in ("n_layers", "n_kv_heads", "head_dim")}
    prompt = bench.text.read_text(encoding="utf-8")[:2000]
    told, peak = process.peak_rss("run", path, "--raw", "-p", prompt, "--max-tokens", "128")
    tokens = told["prompt_tokens"] + told["generated_tokens"]
    weights, kv = models.weight_bytes(path), models.kv_bytes(sizes, tokens)
    beyond = peak - weights - kv
    data = {"peak_rss_bytes": peak, "weight_bytes": weights, "kv_bytes": kv, "tokens": tokens}
    note = f"peak {peak / 1e6:.1f} MB, weights {weights / 1e6:.1f}, KV {kv / 1e6:.1f}"
    measure = "SmolLM2, peak memory beyond weights and KV"
    limit = MEMORY_OVERHEAD_BYTES
    return [row(measure, beyond / 1e6, "MB", f"<= {limit / 1e6:.0f} MB", beyond <= limit, note)], data


def quantize_section(bench: Bench) -> tuple[list[Row], Any]:
    """Seconds of `lowbit quantize` on SmolLM2, the whole process: start, reading, rounding, writing."""
    told = [bench.quantize("smollm2-135m") for _ in range(3)]
    found = spread.summary([float(run["process_seconds"]) for run in told])
    inside = spread.summary([float(run["seconds"]) for run in told])
    value = found["median"]
    target = f"< {QUANTIZE_SECONDS:g} s"
    note = f"of which lowbit reports {inside['median']:.2f} s"
    measure = f"SmolLM2, round-to-nearest to {SCHEME}"
    data = {"process_seconds": found, "seconds": inside, "bits_per_weight": told[0]["bits_per_weight"]}
    return [row(measure, value, "s", target, value < QUANTIZE_SECONDS, note)], data


def accuracy_section(bench: Bench) -> tuple[list[Row], Any]:
    """SmolLM2 against transformers in float32 on the same dequantized weights."""
    source, cache = bench.source("smollm2-135m"), bench.cache / "reference"
    found = quality.reference(source, bench.text, bench.tokens, bench.threads[0], cache)
    if found is None:
        return [row("SmolLM2 against transformers", None, "", "", None, "needs torch and transformers")], None
    rows = []
    for activations, limit in quality.PERPLEXITY_TARGETS.items():
        apart = found[activations]["relative_difference"]
        note = f"{found[activations]['perplexity']:.4f} against {found['reference_perplexity']:.4f}"
        measure = f"SmolLM2 perplexity from its GGUF, {activations} activations, off transformers float32"
        target = f"within {limit:.1%}"
        rows.append(row(measure, 100 * apart, "%", target, abs(apart) <= limit, note))
    equal, apart = found["int16"]["greedy_equal"], found["int16"]["greedy_differences"]
    passed = equal >= quality.GREEDY_TARGET * found["prompts"] / 20 and quality.explained(apart)
    gaps = ", ".join(f"{d['reference_gap']:.3f}" for d in apart) or "none"
    note = f"gaps of the reference's two best logits where they part: {gaps}"
    target = f">= {quality.GREEDY_TARGET} of 20, the rest near-ties"
    measure = "SmolLM2 greedy text, int16 activations, prompts with 32 equal tokens"
    return [*rows, row(measure, equal, f"of {found['prompts']}", target, passed, note)], found


Section = Callable[[Bench], tuple[list[Row], Any]]
SECTIONS: Mapping[str, Section] = {
    "accuracy": accuracy_section,
    "quality": quality_section,
    "smollm2-135m": lambda bench: speed_section(bench, "smollm2-135m"),
    "llama-1.1b": lambda bench: speed_section(bench, "llama-1.1b"),
    "start": start_section,
    "memory": memory_section,
    "quantize": quantize_section,
}
