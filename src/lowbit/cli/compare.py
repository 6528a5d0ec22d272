"""`lowbit compare`: how far the predictions of models are from those of a reference."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowbit.cli import options, output
from lowbit.cli.evaluate import demo_text, read_text
from lowbit.cli.pull import locate


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "reference",
        metavar="REFERENCE",
        help=f"{options.MODEL_HELP}; it runs with int16 activations and 16-bit keys and values",
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="what to compare with it")
    parser.add_argument(
        "--text", metavar="FILE", help="a UTF-8 text (default: a shipped excerpt of Shakespeare)"
    )
    parser.add_argument(
        "--max-tokens", type=options.positive, metavar="N", help="only the first N tokens of it"
    )
    parser.add_argument("--html", metavar="FILE", help="also write a report with charts, one HTML page")
    options.add_runtime(parser, "tokens of a window (default 2048, or what the models hold)")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    text = read_text(Path(args.text)) if args.text else demo_text()
    from lowbit.engine import load
    from lowbit.measure import compare
    from lowbit.measure.pages import check_target
    from lowbit.measure.report import write_report

    if args.html:
        check_target(args.html)

    paths = [locate(name) for name in (args.reference, *args.models)]
    common = {"context": args.context, "threads": args.threads}
    reference = load(paths[0], activations="int16", kv_bits=16, **common)
    models = [load(path, activations=args.activations, kv_bits=args.kv_bits, **common) for path in paths[1:]]
    with output.Progress("compare") as bar:

        def step(done: int, total: int, so_far: float) -> None:
            bar.update(done, total, f"KL {so_far:.4f}")

        found = compare(reference, models, text, args.context, args.max_tokens, progress=step)

    def describe(name: str, path: Path, model: Any) -> dict[str, Any]:
        return {
            "model": name,
            "path": str(path),
            "bits_per_weight": model.bits_per_weight,
            "size_bytes": output.size_bytes(path),
            "activations": model.model.activations,
            "kv_bits": model.model.kv_bits,
        }

    rows = zip(args.models, paths[1:], models, found.models)
    result = {
        "reference": {
            **describe(args.reference, paths[0], reference),
            "perplexity": found.reference_perplexity,
        },
        "models": [{**describe(name, path, model), **asdict(one)} for name, path, model, one in rows],
        "text": args.text or "shipped excerpt",
        "tokens": found.tokens,
        "context": found.context,
        "windows": found.windows,
        "seconds": found.seconds,
    }
    if args.html:
        write_report(args.html, result)
    return result


COLUMNS = ("model", "bits/weight", "size", "KL (nats/token)", "same top token", "perplexity")


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    rows = [_cells(result["reference"]), *(_cells(row) for row in result["models"])]
    sys.stdout.write(output.table(COLUMNS, rows, right=range(1, len(COLUMNS))))
    sys.stdout.write(
        f"{result['tokens']:,} tokens in {result['windows']} windows of {result['context']}; "
        f"{result['seconds']:.1f} s\n"
    )
    if args.html:
        output.note(f"report: {args.html}")


def _cells(row: dict[str, Any]) -> list[str]:
    kl = "reference"
    if "kl_nats_per_token" in row:
        kl = f"{row['kl_nats_per_token']:.5f}"
        if row["kl_standard_error"] == row["kl_standard_error"]:
            kl += f" ± {row['kl_standard_error']:.5f}"
    return [
        row["model"],
        f"{row['bits_per_weight']:.3f}",
        output.megabytes(row["size_bytes"]),
        kl,
        f"{row['top1_agreement']:.2%}" if "top1_agreement" in row else "",
        f"{row['perplexity']:.4f}",
    ]
