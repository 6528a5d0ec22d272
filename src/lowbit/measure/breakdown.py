"""Where a step's time goes: seconds of every kind of work, beside the bound that the machine sets for it.

The native decoder keeps the time of its phases, as the first thread of the team sees them. A product of one
token is bound by its bytes over the bandwidth, one of many tokens by its multiply-adds over the int8 peak;
both are measured in the same minute.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.engine import LanguageModel
from lowbit.engine.sequence import new_cache
from lowbit.measure.speed import (
    BANDWIDTH_BUFFER_BYTES,
    BOUND_SECONDS,
    WARM_UP_STEPS,
    decode_once,
    kv_bytes_per_token,
    prefill_once,
)

# Phase of the native decoder -> (part of the step, what people call it).
PHASES: dict[str, tuple[str, str]] = {
    "embed": ("around", "embedding and angles"),
    "norms": ("around", "norms and residuals"),
    "qkv": ("attention", "query, key, value"),
    "attention": ("attention", "attention"),
    "output": ("attention", "output projection"),
    "gate_up": ("mlp", "gate and up"),
    "activation": ("mlp", "activation"),
    "down": ("mlp", "down"),
    "experts": ("mlp", "experts"),
    "head": ("head", "output head"),
    "choose": ("head", "choosing the token"),
    "planning": ("around", "planning, start of threads"),
}
PARTS = {"attention": "attention", "mlp": "MLP", "head": "head", "around": "around"}
_MATRICES = {
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.o_proj": "output",
    "mlp.gate_proj": "gate_up",
    "mlp.up_proj": "gate_up",
    "mlp.down_proj": "down",
    "lm_head": "head",
}


def breakdown(
    model: LanguageModel, prefill: int = 512, decode: int = 128, repeats: int = 3
) -> dict[str, Any]:
    """Keys "prefill" (a prompt of so many tokens) and "decode" (one token), each with

    tokens, seconds_per_token, phases: [{phase, part, name, seconds_per_token, share, bytes, multiply_adds,
    bound_seconds, of_bound}], the longest first; bytes and multiply_adds are of one token of a decode, or
    of all tokens of a prompt, and None (as the bound) where a phase has no matrix.
    """
    from lowbit import _native

    prefill = min(prefill, model.context)
    decode = max(1, min(decode, model.context - WARM_UP_STEPS - 1))
    prompts, answers = new_cache(model.decoder, prefill), new_cache(model.decoder, decode + WARM_UP_STEPS + 1)
    result: dict[str, Any] = {}
    works = {
        "prefill": (lambda: prefill_once(model, prefill, prompts), prefill),
        "decode": (lambda: decode_once(model, decode, answers), decode + WARM_UP_STEPS),
    }
    for kind, (work, tokens) in works.items():
        work()
        bandwidth = float(_native.measure_bandwidth(BANDWIDTH_BUFFER_BYTES, BOUND_SECONDS))
        peak = float(_native.measure_int8_peak(BOUND_SECONDS))
        model.decoder.start_profile()
        for _ in range(repeats):
            work()
        _, seconds, phases = model.decoder.stop_profile()
        phases["planning"] = max(0.0, seconds - sum(phases.values()))
        each = repeats * tokens
        reads = _amounts(model, tokens if kind == "prefill" else 1)
        reads["attention"] = (round(kv_bytes_per_token(model, WARM_UP_STEPS + decode / 2)), None)
        if kind == "prefill":
            del reads["attention"]
        rows = [
            _row(name, spent / each, seconds / each, reads.get(name), tokens, kind, bandwidth, peak)
            for name, spent in phases.items()
            if spent > 0
        ]
        result[kind] = {
            "tokens": tokens,
            "seconds_per_token": seconds / each,
            "bandwidth_bytes_per_second": bandwidth,
            "int8_multiply_adds_per_second": peak,
            "phases": sorted(rows, key=lambda row: -row["seconds_per_token"]),
        }
    return result


def _row(
    phase: str,
    seconds: float,
    total: float,
    read: tuple[int, int | None] | None,
    tokens: int,
    kind: str,
    bandwidth: float,
    peak: float,
) -> dict[str, Any]:
    bound = None
    if read is not None:
        if kind == "decode":
            bound = read[0] / bandwidth
        elif read[1] is not None:
            bound = max(read[1] / peak, read[0] / bandwidth) / tokens
    return {
        "phase": phase,
        "part": PHASES[phase][0],
        "name": PHASES[phase][1],
        "seconds_per_token": seconds,
        "share": seconds / total,
        "bytes": None if read is None else read[0],
        "multiply_adds": None if read is None else read[1],
        "bound_seconds": bound,
        "of_bound": None if bound is None else bound / seconds,
    }


def _amounts(model: LanguageModel, tokens: int) -> dict[str, tuple[int, int | None]]:
    """(bytes that are read once, multiply-adds for `tokens` tokens) of the matrices of each phase.

    The head works for one token; a tied head is the embedding. Experts are counted as those that `tokens`
    tokens choose if all are as likely.
    """
    weights, config = model.model.weights, model.config
    found: dict[str, list[float]] = {}
    for name, matrix in weights.items():
        short = name.removesuffix(".weight")
        short = short.split(".", 3)[3] if short.startswith("model.layers.") else short
        size = matrix.out_features * matrix.in_features
        share, worked = 1.0, float(tokens)
        if short.startswith(("mlp.experts.", "mlp.router")):
            phase = "experts"
            if short.startswith("mlp.experts."):
                chosen = config.experts_per_token / config.n_experts
                share, worked = 1 - (1 - chosen) ** tokens, tokens * chosen
        elif short == "lm_head" or (short == "model.embed_tokens" and "lm_head.weight" not in weights):
            phase, worked = "head", 1.0
        elif short in _MATRICES:
            phase = _MATRICES[short]
        else:
            continue
        entry = found.setdefault(phase, [0.0, 0.0])
        entry[0] += matrix.nbytes * share
        entry[1] += size * worked
    return {phase: (round(read), round(work)) for phase, (read, work) in found.items()}


def parts_of(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Share of each part of the step, in the order of PARTS."""
    return {
        part: sum(row["share"] for row in rows if row["part"] == part)
        for part in PARTS
        if any(row["part"] == part for row in rows)
    }
