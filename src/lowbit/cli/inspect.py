"""`lowbit inspect`: the description, the tensors and the formats of a model, and what of it runs."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli import options, output
from lowbit.cli.pull import locate

if TYPE_CHECKING:
    from lowbit.model.inspection import Entry, Inspection

BAR_WIDTH = 30
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
    from lowbit.model.inspection import inspect_model

    path = locate(args.model)
    found = inspect_model(path)
    weights, n_bytes = sum(e.weights for e in found.entries), sum(e.bytes for e in found.entries)
    run = [entry.run_bytes for entry in found.entries if entry.run_bytes is not None]
    all_run = bool(run) and len(run) == len(found.entries)
    return {
        "path": str(path),
        "kind": found.kind,
        "runs": not found.problems,
        "problems": found.problems,
        "notes": found.notes,
        "files": found.files,
        "metadata": found.metadata,
        "config": found.config,
        "chat_template": found.chat_template,
        "tokenizer_size": found.tokenizer_size,
        "quantization": _quantization(found),
        "weights": weights,
        "bits_per_weight": 8 * n_bytes / weights if weights else 0.0,
        "run_bits_per_weight": 8 * sum(run) / weights if weights and all_run else None,
        "size_bytes": _size(path, found),
        "formats": _histogram(found.entries),
        "tensors": [_tensor(entry) for entry in found.entries],
    }


def _size(path: Path, found: Inspection) -> int:
    if path.is_file() and len(found.files) > 1:  # parts of one model
        return sum(output.size_bytes(path.with_name(name)) for name in found.files)
    return output.size_bytes(path)


def _quantization(found: Inspection) -> dict[str, Any] | None:
    """How a lowbit directory was made and is run; of others what their quantization_config says."""
    if found.kind != "lowbit" or found.config is None:
        return found.quantization
    from lowbit.model.lowbit_checkpoint import LowbitCheckpoint

    with LowbitCheckpoint(found.path) as checkpoint:
        details = checkpoint.details
    scheme = details.get("scheme") or {}
    kept = {key: details.get(key) for key in ("method", "source", "calibration", "measured")}
    return {**kept, "activations": scheme.get("activations"), "kv_bits": scheme.get("kv_bits")}


def _tensor(entry: Entry) -> dict[str, Any]:
    size = entry.run_bytes
    return {
        "name": entry.name,
        "format": entry.format,
        "shape": entry.shape,
        "weights": entry.weights,
        "bytes": entry.bytes,
        "bits_per_weight": entry.bits_per_weight,
        "run_bits_per_weight": None if size is None or not entry.weights else 8 * size / entry.weights,
        "runs_as": entry.runs_as,
        "kernel": entry.kernel,
    }


def _histogram(entries: list[Entry]) -> list[dict[str, Any]]:
    """Per format and way to run: tensors, weights, bytes; the largest first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        start = {"format": entry.format, "tensors": 0, "weights": 0, "bytes": 0, "run_bytes": 0.0}
        row = found.setdefault((entry.format, entry.runs_as), start)
        row |= {"runs_as": entry.runs_as, "kernel": entry.kernel}
        row["tensors"] += 1
        row["weights"] += entry.weights
        row["bytes"] += entry.bytes
        size = entry.run_bytes
        row["run_bytes"] = None if size is None or row["run_bytes"] is None else row["run_bytes"] + size
    return sorted(found.values(), key=lambda row: (-row["bytes"], -row["weights"]))


def _made(result: dict[str, Any]) -> list[tuple[str, str]]:
    made = result["quantization"]
    if made is None:
        return []
    if result["kind"] != "lowbit" or "method" not in made:
        return [("quantized by", str(made.get("quant_method", "no quant_method"))[:80])]
    rows = [("made", f"from {made['source']} by {made['method']}")]
    if made["activations"]:
        rows.append(
            ("runs with", f"{made['activations']} activations, {made['kv_bits']}-bit keys and values")
        )
    if made["measured"]:
        lost, words = made["measured"]["kl_nats_per_token"], made["measured"]["text"]
        rows.append(("measured", f"{lost:.4f} nats per token from the original, on {words}"))
    return rows


def _network(result: dict[str, Any]) -> list[tuple[str, str]]:
    config = result["config"]
    if config is None:
        said = result["metadata"]
        family = said.get("general.architecture") or ", ".join(said.get("architectures", [])) or "not stated"
        return [("network", f"{family}; why it has no description, see below")]
    heads = f"{config['n_heads']} of {config['head_dim']}, {config['n_kv_heads']} for keys and values"
    rows = [("network", config["family"])]
    rows += [(label, f"{config[key]:,}") for label, key in FIELDS]
    if config.get("n_experts"):
        rows.append(("experts", f"{config['experts_per_token']} of {config['n_experts']} for each token"))
    return [*rows, ("heads", heads)]


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    vocabulary = "none" if result["tokenizer_size"] is None else f"{result['tokenizer_size']:,} tokens"
    parts = f", {len(result['files'])} files" if len(result["files"]) > 1 else ""
    rows = [
        ("model", f"{result['path']} ({result['kind']}{parts})"),
        *_network(result),
        ("tokenizer", vocabulary + (", with chat template" if result["chat_template"] else "")),
        ("weights", f"{result['weights']:,}"),
        ("bits per weight", f"{_bits(result['bits_per_weight'])} in the file"),
        ("", f"{_bits(result['run_bits_per_weight'])} as it runs"),
        ("size on disk", output.megabytes(result["size_bytes"])),
        *_made(result),
        ("runs", "yes" if result["runs"] else "no"),
        *(("", problem) for problem in result["problems"]),
        *(("note", note) for note in result["notes"]),
    ]
    sys.stdout.write(output.pairs(rows) + "\n")
    total = sum(row["bytes"] for row in result["formats"]) or 1
    lines = [
        (
            row["format"],
            str(row["tensors"]),
            f"{row['weights']:,}",
            output.megabytes(row["bytes"]),
            _bits(8 * row["bytes"] / max(1, row["weights"])),
            _bits(None if row["run_bytes"] is None else 8 * row["run_bytes"] / max(1, row["weights"])),
            "=" * math.ceil(BAR_WIDTH * row["bytes"] / total),
            row["runs_as"],
        )
        for row in result["formats"]
    ]
    header = ("format", "tensors", "weights", "size", "bits", "run bits", "share of the bytes", "runs as")
    sys.stdout.write(output.table(header, lines, right=range(1, 6)))
    if args.tensors:
        listed = [
            (
                tensor["name"],
                tensor["format"],
                " x ".join(map(str, tensor["shape"])),
                _bits(tensor["bits_per_weight"]),
                _bits(tensor["run_bits_per_weight"]),
            )
            for tensor in result["tensors"]
        ]
        titles = ("tensor", "format", "shape", "bits", "run bits")
        sys.stdout.write("\n" + output.table(titles, listed, right=[3, 4]))
    else:
        output.note(f"{len(result['tensors'])} tensors; --tensors lists them")
