"""The end of every quantization: what was written is loaded again and held against the original."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.engine import load
from lowbit.measure.compare import compare
from lowbit.measure.machine import memory_bytes
from lowbit.model.checkpoint import open_checkpoint

TOKENS = 1024
CONTEXT = 512


def verify(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> dict[str, Any]:
    """Compare `output` with `source` on a page of Shakespeare, and record the result in its lowbit.json.

    Returns {"text", "tokens", "kl_nats_per_token", "kl_standard_error", "top1_agreement", "perplexity",
    "source_perplexity"}, or {"skipped": why} for a model without tokenizer and for one whose original
    does not fit the memory at hand.
    Raises CheckpointError if what was written cannot be loaded.
    """
    measured = divergence(source, output)
    if "skipped" not in measured:
        _record(Path(output) / "lowbit.json", measured)
    return measured


def divergence(
    source: str | os.PathLike[str], output: str | os.PathLike[str], activations: str | None = None
) -> dict[str, Any]:
    """The same, recorded nowhere.

    activations: of `output`, such as "int16" to see the weights alone; None: its own
    """
    reason = _obstacle(Path(source))
    if reason is not None:
        return {"skipped": reason}
    reference, model = load(source, activations="int16", kv_bits=16), load(output, activations=activations)
    context = min(CONTEXT, reference.context, model.context)
    text = (Path(__file__).parent / "demo.txt").read_text(encoding="utf-8")
    found = compare(reference, [model], text, context, max_tokens=TOKENS)
    measured: dict[str, Any] = {
        "text": "a page of Shakespeare",
        "tokens": found.tokens,
        "kl_nats_per_token": found.models[0].kl_nats_per_token,
        "kl_standard_error": found.models[0].kl_standard_error,
        "top1_agreement": found.models[0].top1_agreement,
        "perplexity": found.models[0].perplexity,
        "source_perplexity": found.reference_perplexity,
    }
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in measured.items()}


def _obstacle(source: Path) -> str | None:
    """Why the original cannot be run here; None: it can."""
    with open_checkpoint(source) as checkpoint:
        if checkpoint.tokenizer() is None:
            return "the model has no tokenizer"
        stored = source.stat().st_size
        if source.is_dir():
            stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    available = memory_bytes("MemAvailable")
    if available is not None and 1.5 * stored > available:
        return f"the original needs {stored / 1e9:.1f} GB and {available / 1e9:.1f} GB are free"
    return None


def _record(path: Path, measured: dict[str, Any]) -> None:
    details = json.loads(path.read_text(encoding="utf-8"))
    details["measured"] = measured
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(
        json.dumps(details, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    os.replace(partial, path)
