"""Quantize by each case in a process of its own, then compare what came out with the original."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import process
from method_cases import Case

TOGETHER = 10  # models beside one reference in one comparison; their directories are deleted after it
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model, its texts, and how it is cut.

    texts: name -> (file, tokens that are scored, tokens of a window); the first is the one that decides
    calibration: file, windows, tokens of a window
    embedding: the format of embedding and head, the same for all methods
    """

    name: str
    source: Path
    texts: dict[str, tuple[Path, int, int]]
    calibration: tuple[Path, int, int]
    embedding: str


def run_cases(
    subject: Subject, cases: Sequence[Case], work: Path, say: Callable[[str], None]
) -> Iterator[Row]:
    """One row for each case, in order; refusals and failures are rows as well."""
    for begin in range(0, len(cases), TOGETHER):
        rows: list[Row] = []
        made: dict[str, Path] = {}
        for number, case in enumerate(cases[begin : begin + TOGETHER]):
            output = work / f"{subject.name}-{number}"
            row = quantized(subject, case, output)
            rows.append(row)
            if "refused" not in row:
                made[case.key] = output
            say(f"  {case.key}: " + (row.get("refused") or f"{row['seconds']:.1f} s"))
        eight = {row["key"] for row in rows if row["width"] == "8"}
        found = measured(subject, {key: path for key, path in made.items() if key not in eight})
        found |= measured(subject, {key: path for key, path in made.items() if key in eight}, "int8")
        for row in rows:
            yield {**row, **found.get(row["key"], {})}
        for output in made.values():
            shutil.rmtree(output, ignore_errors=True)


def quantized(subject: Subject, case: Case, output: Path) -> Row:
    """Quantize: time, peak memory and bits of the layers' matrices and of all."""
    shown = " ".join([case.format, *case.options])
    row: Row = {"key": case.key, "width": case.width, "method": case.method, "format": shown}
    arguments = ["quantize", subject.source, case.format, "--method", case.method, *case.options]
    if "--embedding" not in case.options:
        arguments += ["--embedding", subject.embedding]
    arguments += ["--no-verify", "-o", output, "--force", "--restart"]
    if case.format == "auto" or _calibrated(case.method):
        text, windows, length = subject.calibration
        arguments += ["--calibration", text, "--samples", windows, "--length", length]
    try:
        told, peak = process.peak_rss(*map(str, arguments))
    except process.CommandError as error:
        return {**row, "refused": _reason(str(error))}
    layers = [layer for layer in told["layers"] if ".layers." in layer["name"]]
    weights = [layer["shape"][0] * layer["shape"][1] for layer in layers]
    bits = sum(layer["bits_per_weight"] * count for layer, count in zip(layers, weights)) / sum(weights)
    return {
        **row,
        "bits_per_weight": bits,
        "model_bits_per_weight": told["bits_per_weight"],
        "size_bytes": told["size_bytes"],
        "seconds": told["seconds"],
        "peak_rss_bytes": peak,
    }


def measured(subject: Subject, models: dict[str, Path], activations: str = "int16") -> dict[str, Row]:
    """KL, agreement and perplexity of each model on all texts of the subject.

    activations: of the models; the reference has int16 always
    """
    found: dict[str, Row] = {key: {} for key in models}
    for name, (text, tokens, context) in subject.texts.items():
        if not models:
            continue
        arguments = [subject.source, *models.values(), "--text", text, "--max-tokens", tokens]
        arguments += ["--context", context, "--activations", activations, "--kv-bits", "16"]
        told = process.lowbit_json("compare", *map(str, arguments))
        for key, model in zip(models, told["models"]):
            found[key][name] = {
                part: model[part]
                for part in ("kl_nats_per_token", "kl_standard_error", "top1_agreement", "perplexity")
            }
            found[key][name]["reference_perplexity"] = told["reference"]["perplexity"]
    return found


def _calibrated(method: str) -> bool:
    from lowbit.compress.recipe import parse_recipe

    return parse_recipe(method).calibrated


def _reason(text: str) -> str:
    """What went wrong, without the command and the folders."""
    return re.sub(r"[;\s]+\d*$", "", text.rpartition("lowbit: ")[2])[:300]
