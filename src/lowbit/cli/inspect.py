"""`lowbit inspect`: the description, the tensors and the formats of a model, without running it."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from typing import TYPE_CHECKING, Any

from lowbit.cli import options, output
from lowbit.cli.pull import locate

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint

BAR_WIDTH = 40
# Shown first; the rest of the description is in --json.
FIELDS = (
    ("layers", "n_layers"),
    ("width", "hidden_size"),
    ("mlp width", "intermediate_size"),
    ("vocabulary", "vocab_size"),
    ("context", "max_position"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.model.checkpoint import open_checkpoint

    path = locate(args.model)
    with open_checkpoint(path) as checkpoint:
        tensors = [_tensor(checkpoint, name) for name in checkpoint.names()]
        tokenizer = checkpoint.tokenizer()
        result = {
            "path": str(path),
            "kind": checkpoint.kind,
            "config": dataclasses.asdict(checkpoint.config),
            "chat_template": bool(tokenizer and tokenizer.chat_template),
            "tokenizer_size": tokenizer.vocab_size if tokenizer else None,
            "quantization": _quantization(checkpoint),
        }
    weights = sum(t["weights"] for t in tensors)
    n_bytes = sum(t["bytes"] for t in tensors)
    return {
        **result,
        "weights": weights,
        "bits_per_weight": 8 * n_bytes / weights if weights else 0.0,
        "size_bytes": output.size_bytes(path),
        "formats": _histogram(tensors),
        "tensors": tensors,
    }


def _quantization(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """How a lowbit directory was made and is run; None for other checkpoints."""
    from lowbit.model.lowbit_checkpoint import LowbitCheckpoint

    if not isinstance(checkpoint, LowbitCheckpoint):
        return None
    details = checkpoint.details
    scheme = details.get("scheme") or {}
    kept = {key: details.get(key) for key in ("method", "source", "calibration", "measured")}
    return {**kept, "activations": scheme.get("activations"), "kv_bits": scheme.get("kv_bits")}


def _tensor(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    from lowbit.model.gguf_types import TENSOR_TYPES

    bits = {kind.name: 8 * kind.nbytes / kind.block for kind in TENSOR_TYPES.values()}
    shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
    count = math.prod(shape)
    if dtype in bits:
        n_bytes = round(count * bits[dtype] / 8)
    else:
        n_bytes = checkpoint.matrix(name).nbytes
    return {
        "name": name,
        "format": dtype,
        "shape": list(shape),
        "weights": count,
        "bytes": n_bytes,
        "bits_per_weight": 8 * n_bytes / count if count else 0.0,
    }


def _made(made: dict[str, Any] | None) -> list[tuple[str, str]]:
    if made is None:
        return []
    rows = [("made", f"from {made['source']} by {made['method']}")]
    if made["activations"]:
        rows.append(
            ("runs with", f"{made['activations']} activations, {made['kv_bits']}-bit keys and values")
        )
    if made["measured"]:
        lost, words = made["measured"]["kl_nats_per_token"], made["measured"]["text"]
        rows.append(("measured", f"{lost:.4f} nats per token from the original, on {words}"))
    return rows


def _histogram(tensors: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per format: tensors, weights, bytes; the largest first."""
    found: dict[str, dict[str, Any]] = {}
    for t in tensors:
        entry = found.setdefault(t["format"], {"format": t["format"], "tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += t["weights"]
        entry["bytes"] += t["bytes"]
    return sorted(found.values(), key=lambda entry: -entry["bytes"])


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    config = result["config"]
    heads = f"{config['n_heads']} of {config['head_dim']}, {config['n_kv_heads']} for keys and values"
    vocabulary = "none" if result["tokenizer_size"] is None else f"{result['tokenizer_size']:,} tokens"
    rows = [
        ("model", f"{result['path']} ({result['kind']}, {config['family']})"),
        *((label, f"{config[key]:,}") for label, key in FIELDS),
        ("heads", heads),
        ("tokenizer", vocabulary + (", with chat template" if result["chat_template"] else "")),
        ("weights", f"{result['weights']:,}"),
        ("bits per weight", f"{result['bits_per_weight']:.3f}"),
        ("size on disk", output.megabytes(result["size_bytes"])),
        *_made(result["quantization"]),
    ]
    sys.stdout.write(output.pairs(rows) + "\n")
    total = sum(entry["bytes"] for entry in result["formats"]) or 1
    lines = [
        (
            entry["format"],
            str(entry["tensors"]),
            f"{entry['weights']:,}",
            output.megabytes(entry["bytes"]),
            f"{8 * entry['bytes'] / max(1, entry['weights']):.3f}",
            "=" * math.ceil(BAR_WIDTH * entry["bytes"] / total),
        )
        for entry in result["formats"]
    ]
    header = ("format", "tensors", "weights", "size", "bits/weight", "share of the bytes")
    sys.stdout.write(output.table(header, lines, right=range(1, 5)))
    if args.tensors:
        listed = [
            (t["name"], t["format"], " x ".join(map(str, t["shape"])), f"{t['bits_per_weight']:.3f}")
            for t in result["tensors"]
        ]
        sys.stdout.write("\n" + output.table(("tensor", "format", "shape", "bits/weight"), listed, right=[3]))
    else:
        output.note(f"{len(result['tensors'])} tensors; --tensors lists them")
