"""Perplexity of the measured models, so that a speed is never compared without what it cost in quality.

Both programs' models are scored by one harness (`lowbit eval`) on one text in the same windows. llama.cpp's
own figure follows another rule; it is repeated here under that rule as a check of the harness.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import models
import process

CONTEXT = 512  # tokens per window, llama-perplexity's usual choice
REFERENCE = Path(__file__).resolve().parent / "reference_smollm2.py"
# Relative difference of perplexity from transformers in float32 on the same weights.
PERPLEXITY_TARGETS = {"int16": 0.001, "int8": 0.01}
GREEDY_TARGET = 18  # of 20 prompts, whose first 32 tokens are equal
NEAR_TIE_LOGITS = 0.1  # two tokens whose odds differ by less than 11%


def evaluate(path: Path, text: Path, tokens: int, threads: int, activations: str = "int8") -> dict[str, Any]:
    """`lowbit eval` in windows of CONTEXT tokens; with the bytes of the model's tensors."""
    options = ["--text", text, "--max-tokens", tokens, "--context", CONTEXT, "--threads", threads]
    out = process.lowbit_json("eval", path, *map(str, options), "--activations", activations)
    out["weight_bytes"] = models.weight_bytes(path)
    return out


def second_half_perplexity(path: Path, text: Path, windows: int, activations: str = "int8") -> float:
    """lowbit's perplexity by llama-perplexity's rule: of each window only tokens CONTEXT/2+1 .. CONTEXT-1.

    The first half is context, as in llama.cpp's tools/perplexity; no token is added to a window, which
    is what llama.cpp does for models whose tokenizer adds no beginning-of-text token.
    """
    import numpy as np

    import lowbit
    from lowbit.engine.sequence import new_cache

    model = lowbit.load(str(path), activations=activations, context=CONTEXT)
    ids = np.asarray(model.encode(text.read_text(encoding="utf-8"), add_special=False), dtype=np.int32)
    cache = new_cache(model.decoder, CONTEXT)
    total, count = 0.0, 0
    for i in range(min(windows, len(ids) // CONTEXT)):
        cache.truncate(0)
        log_probs = model.decoder.score(ids[i * CONTEXT : (i + 1) * CONTEXT], cache)[CONTEXT // 2 :]
        total -= float(np.sum(log_probs, dtype=np.float64))
        count += len(log_probs)
    return math.exp(total / count)


def reference(model: Path, text: Path, tokens: int, threads: int, cache: Path) -> dict[str, Any] | None:
    """What bench/reference_smollm2.py finds, or None where torch and transformers are not installed."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return None
    options = [
        "--text",
        text,
        "--tokens",
        tokens,
        "--context",
        CONTEXT,
        "--threads",
        threads,
        "--cache",
        cache,
    ]
    finished = process.watch([sys.executable, str(REFERENCE), str(model), *map(str, options), "--json"])
    return json.loads(finished.stdout)


def explained(differences: list[dict[str, Any]]) -> bool:
    """Whether each parting of two greedy texts is a near-tie: the reference's second token, by little."""
    return all(d["is_second_best"] and d["reference_gap"] <= NEAR_TIE_LOGITS for d in differences)


def windows(model: Path, text: Path, tokens: int) -> Any:
    """Token ids int64 [n, CONTEXT]: the windows that `evaluate` scores, for another program to score."""
    import numpy as np

    import lowbit

    ids = lowbit.load(str(model), context=CONTEXT).encode(text.read_text(encoding="utf-8"), add_special=False)
    count = min(len(ids), tokens) // CONTEXT
    return np.asarray(ids[: count * CONTEXT], np.int64).reshape(count, CONTEXT)
