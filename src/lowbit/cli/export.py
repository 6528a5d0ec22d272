"""`lowbit export`: a model in, the file that another tool loads out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lowbit.cli import options, output
from lowbit.cli.pull import locate
from lowbit.errors import UnsupportedError


def configure(parser: argparse.ArgumentParser) -> None:
    from lowbit.interop.export import TARGETS

    options.add_model(parser)
    parser.add_argument(
        "--to",
        metavar="TARGET",
        required=True,
        help="; ".join(TARGETS.values()) + "; without a colon every matrix stays as it is stored",
    )
    parser.add_argument("output", metavar="OUT", help="the file or directory to write")
    parser.add_argument(
        "--lossy",
        action="store_true",
        help="round stored codes that the target cannot hold; without it, what would be lost is said",
    )
    parser.add_argument(
        "--embedding", metavar="TYPE", help="of token embedding and output head: q8_0, in a directory fp16"
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="leave out loading the result and measuring its divergence from the model",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.interop.export import export

    source, target = locate(args.model), Path(args.output)
    with output.Progress(f"export to {args.to}") as bar:
        result = export(
            source,
            args.to,
            target,
            lossy=args.lossy,
            force=args.force,
            embedding=args.embedding,
            progress=bar.update,
        )
        if not args.no_verify:
            from lowbit.measure.verify import divergence

            bar.update(1, None, "measuring")
            try:
                result["measured"] = divergence(source, target, activations="int16")
            except UnsupportedError as error:
                result["measured"] = {"skipped": f"lowbit does not run this file itself: {error}"}
    return {**result, "size_bytes": output.size_bytes(target)}


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    tensors = result["tensors"]
    sys.stdout.write(
        f"{result['output']}: {result['bits_per_weight']:.3f} bits per weight, "
        f"{output.megabytes(result['size_bytes'])}, {len(tensors)} matrices in {result['seconds']:.1f} s\n"
    )
    if result["exact"]:
        sys.stdout.write("every code and scale is stored as it was\n")
    kinds: dict[tuple[str, str, str, bool], list[dict[str, Any]]] = {}
    for tensor in tensors:
        key = (tensor["from"], tensor["type"], tensor.get("why", ""), tensor["exact"])
        kinds.setdefault(key, []).append(tensor)
    rows = []
    for (stored, becomes, why, exact), found in kinds.items():
        errors = [tensor["relative_error"] for tensor in found if "relative_error" in tensor]
        changed = [tensor["changed"] for tensor in found if "changed" in tensor]
        rows.append(
            [
                str(len(found)),
                stored,
                becomes,
                "none" if exact else f"{sum(changed) / len(changed):.1%}" if changed else "",
                "none" if exact else f"{max(errors):.2g}" if errors else "",
                why,
            ]
        )
    header = ("matrices", "stored as", "written as", "weights changed", "relative error", "because")
    sys.stdout.write(output.table(header, rows, right=(0, 3, 4)))
    measured = result.get("measured", {})
    if "skipped" in measured:
        sys.stdout.write(f"not measured: {measured['skipped']}\n")
    elif measured:
        sys.stdout.write(
            f"on {measured['text']}: {measured['kl_nats_per_token']:.5f} nats per token from the model, "
            f"same top token {measured['top1_agreement']:.1%}, perplexity {measured['perplexity']:.2f} "
            f"({measured['source_perplexity']:.2f} before)\n"
        )
