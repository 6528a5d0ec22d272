"""Activations and caches of keys and values, rounded by each method: divergence from the unrounded model.

Weights stay float32; what stands before a `+` is a view or a fold that is applied to them first. Rounding is
emulated (lowbit.compress.emulated), so there are no times here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from method_run import Subject

WINDOWS, CALIBRATING = 8, 16  # windows that are scored, and that fix ranges
Row = dict[str, Any]

ACTIVATIONS = (
    "token:bits=8",
    "e4m3",
    "static:bits=8",
    "smoothquant:alpha=0.8+static:bits=8",
    "integer:bits=8",
    "smoothquant:alpha=0.8+integer:bits=8",
    "flexq",
    "token:bits=6",
    "hadamard+token:bits=6",
    "group:bits=4",
    "fmpq",
    "token:bits=4",
    "hadamard+token:bits=4",
    "llmfp4",
    "llmfp4+llmfp4",
)
CACHES = (
    "token:bits=8",
    "xquant:bits=8",
    "kivi:bits=4,window=32",
    "token:bits=4",
    "bfp:bits=4",
    "bfp:bits=4,sort=yes",
    "ksort+bfp:bits=4",
    "xquant:bits=4",
    "xquant:bits=4,latent=yes",
    "kivi:bits=2,window=32",
    "token:bits=2",
)


def rows(subject: Subject, say: Callable[[str], None]) -> list[Row]:
    """[{"kind": "activations" | "cache", "method", "bits", "kl_nats_per_token", "top1_agreement"}]"""
    from lowbit.compress.calibration import read_text, windows
    from lowbit.compress.emulated import emulated_logits
    from lowbit.model.checkpoint import open_checkpoint

    text, _, length = next(iter(subject.texts.values()))
    calibrating, _, calibrating_length = subject.calibration
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="lowbit-rounded-") as work:
        with open_checkpoint(subject.source) as checkpoint:
            tokenizer = checkpoint.tokenizer()
            assert tokenizer is not None
            scored = windows(read_text(text), tokenizer, WINDOWS, length)
            calibration = windows(read_text(calibrating), tokenizer, CALIBRATING, calibrating_length)
            exact = _log_probabilities(emulated_logits(checkpoint, scored).logits)
        for kind, before, method in cases():
            source = _prepared(subject.source, before, calibration, Path(work)) if before else subject.source
            with open_checkpoint(source) as checkpoint:
                if kind == "activations":
                    run = emulated_logits(checkpoint, scored, activations=method, calibration=calibration)
                    bits = run.activation_bits
                else:
                    run = emulated_logits(checkpoint, scored, kv=method)
                    bits = run.kv_bits
            told = divergence(exact, _log_probabilities(run.logits))
            name = f"{before}+{method}" if before else method
            found.append({"kind": kind, "method": name, "bits": bits, **told})
            say(f"  {kind} {name}: KL {told['kl_nats_per_token']:.4f} at {bits:.2f} bits")
    return found


def cases() -> Iterator[tuple[str, str, str]]:
    """(kind, what is done to the weights before or "", method)"""
    for kind, names in (("activations", ACTIVATIONS), ("cache", CACHES)):
        for name in names:
            before, _, method = name.rpartition("+")
            yield kind, before, method


def divergence(exact: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Of log probabilities [windows, positions, vocab]."""
    kl = sum(float((np.exp(p) * (p - q)).sum()) for p, q in zip(exact, other, strict=True))
    count = exact.shape[0] * exact.shape[1]
    same = float((exact.argmax(-1) == other.argmax(-1)).mean())
    return {"kl_nats_per_token": kl / count, "top1_agreement": same}


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """Two tables, the least divergence first."""
    parts = [
        f"Weights in float32, {WINDOWS} of the same windows, ranges fixed on {CALIBRATING} calibration "
        "windows; rounding is emulated. Bits of a cache are per number of keys and values, what a window "
        "keeps in 16 bits included, as it is at the end of these windows."
    ]
    for kind, title in (("activations", "Activations"), ("cache", "Keys and values")):
        chosen = sorted((r for r in found if r["kind"] == kind), key=lambda r: r["kl_nats_per_token"])
        lines = [f"| {title.lower()} | bits | KL | same top token |", "|---|---|---|---|"]
        lines += [
            f"| {r['method']} | {r['bits']:.2f} | {r['kl_nats_per_token']:.4f} | {r['top1_agreement']:.1%} |"
            for r in chosen
        ]
        parts += [f"**{title}**", "\n".join(lines)]
    return "\n\n".join(parts)


def _prepared(source: Path, before: str, calibration: np.ndarray, work: Path) -> Path:
    """The model after a view or a fold, in float32."""
    from lowbit.compress import quantize_checkpoint
    from lowbit.compress.recipe import parse_recipe
    from lowbit.formats import Scheme, parse_format

    target = work / before.replace(":", "-").replace("=", "-")
    if not target.exists():
        scheme = Scheme(parse_format("fp32"))
        method = f"{before}+rtn"
        text = calibration if parse_recipe(method).calibrated else None
        quantize_checkpoint(source, scheme, target, method=method, calibration=text)
    return target


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(
        logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True, dtype=np.float64)), np.float32
    )
