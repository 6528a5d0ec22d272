"""`lowbit eval`: perplexity of a model on a text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lowbit.cli import options, output
from lowbit.cli.pull import locate
from lowbit.errors import RequestError


def configure(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--text", metavar="FILE", help="a UTF-8 text (default: a shipped excerpt of Shakespeare)"
    )
    parser.add_argument(
        "--max-tokens", type=options.positive, metavar="N", help="only the first N tokens of it"
    )
    options.add_runtime(parser, "tokens of a window (default 2048, or what the model holds)")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    text = read_text(Path(args.text)) if args.text else demo_text()
    from lowbit.engine import load
    from lowbit.measure import perplexity

    model = load(
        locate(args.model),
        activations=args.activations,
        context=args.context,
        threads=args.threads,
        kv_bits=args.kv_bits,
    )
    with output.Progress("perplexity") as bar:

        def step(done: int, total: int, so_far: float) -> None:
            bar.update(done, total, f"{so_far:.3f}")

        result = perplexity(model, text, args.context, args.max_tokens, progress=step)
    return {
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "context": result.context,
        "bits_per_weight": model.bits_per_weight,
        "windows": result.windows,
        "seconds": result.seconds,
        "activations": model.model.activations,
        "kv_bits": model.model.kv_bits,
    }


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    sys.stdout.write(
        output.pairs(
            [
                ("perplexity", f"{result['perplexity']:.4f}"),
                (
                    "tokens scored",
                    f"{result['tokens']:,} in {result['windows']} windows of {result['context']}",
                ),
                ("bits per weight", f"{result['bits_per_weight']:.3f}"),
                ("speed", f"{result['tokens'] / result['seconds']:,.0f} tokens/s"),
            ]
        )
    )


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"eval: {path} is not UTF-8 at byte {error.start}; convert it first") from error


def demo_text() -> str:
    """The shipped excerpt (Romeo and Juliet, public domain)."""
    from lowbit import measure

    return (Path(measure.__file__).parent / "demo.txt").read_text(encoding="utf-8")
