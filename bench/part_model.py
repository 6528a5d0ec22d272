"""The parts about one model: accuracy, quality beside bytes, start, memory, quantizing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import process
import quality
import spread
import targets
from context import Bench
from targets import OPENVINO, OURS, PEER_TYPE, SCHEME, SMALL, THEIRS, Row, row

PROMPT = "Write one sentence about the sea."


def quality_section(bench: Bench) -> tuple[list[Row], Any]:
    """Perplexity and bytes of SmolLM2 in our 4 bits and in llama.cpp's, in one harness on one text."""
    name = SMALL
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
    openvino = bench.openvino_model(name, "int8")
    if openvino is not None and bench.openvino is not None:
        data["models"][f"{OPENVINO} int8"] = openvino_quality(bench, openvino)
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


def openvino_quality(bench: Bench, path: Path) -> dict[str, Any]:
    """OpenVINO's perplexity on the same windows of tokens: its speed is that of the same model."""
    import numpy as np

    assert bench.openvino is not None
    windows = bench.cache / "models" / f"{SMALL}.windows.npy"
    np.save(windows, quality.windows(bench.source(SMALL), bench.text, bench.tokens))
    found = bench.openvino.perplexity(path, windows, bench.threads[0])
    bench.say(f"  {OPENVINO} int8: perplexity {found:.4f}")
    return {"perplexity": found, "weight_bytes": models.weight_bytes(path)}


def start_section(bench: Bench) -> tuple[list[Row], Any]:
    """Seconds from the start of `lowbit run` to the first byte it answers; the page cache is warm."""
    path = bench.ours(SMALL)
    arguments = ("run", path, "-p", PROMPT, "--max-tokens", "8")
    times = [process.lowbit(*arguments).first_byte_seconds for _ in range(bench.rounds + 1)][1:]
    if None in times:
        raise process.CommandError("lowbit run: nothing came on stdout, so there is no first token to time")
    found = spread.summary([t for t in times if t is not None])
    value = found["median"]
    note = f"{found['low']:.3f} to {found['high']:.3f} s"
    target = f"< {targets.FIRST_TOKEN_SECONDS} s"
    measure = "SmolLM2, process start to first token"
    return [row(measure, value, "s", target, value < targets.FIRST_TOKEN_SECONDS, note)], found


def memory_section(bench: Bench) -> tuple[list[Row], Any]:
    """Peak resident bytes of `lowbit run` beyond its weights and the keys and values that it held."""
    from lowbit.model.checkpoint import open_checkpoint

    path = bench.ours(SMALL)
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
    limit = targets.MEMORY_OVERHEAD_BYTES
    return [row(measure, beyond / 1e6, "MB", f"<= {limit / 1e6:.0f} MB", beyond <= limit, note)], data


def quantize_section(bench: Bench) -> tuple[list[Row], Any]:
    """Seconds of `lowbit quantize` on SmolLM2, the whole process: start, reading, rounding, writing."""
    told = [bench.quantize(SMALL) for _ in range(3)]
    found = spread.summary([float(run["process_seconds"]) for run in told])
    inside = spread.summary([float(run["seconds"]) for run in told])
    value = found["median"]
    target = f"< {targets.QUANTIZE_SECONDS:g} s"
    note = f"of which lowbit reports {inside['median']:.2f} s"
    measure = f"SmolLM2, round-to-nearest to {SCHEME}"
    data = {"process_seconds": found, "seconds": inside, "bits_per_weight": told[0]["bits_per_weight"]}
    return [row(measure, value, "s", target, value < targets.QUANTIZE_SECONDS, note)], data


def accuracy_section(bench: Bench) -> tuple[list[Row], Any]:
    """SmolLM2 against transformers in float32 on the same dequantized weights."""
    source, cache = bench.source(SMALL), bench.cache / "reference"
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
