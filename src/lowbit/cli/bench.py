"""`lowbit bench`: speed and memory of a model beside the bounds of the machine."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lowbit.cli import options, output
from lowbit.cli.pull import locate


def configure(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--prefill", type=options.positive, default=512, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--decode", type=options.positive, default=128, metavar="N", help="default %(default)s"
    )
    parser.add_argument(
        "--repeats", type=options.positive, default=3, metavar="N", help="medians of N (default %(default)s)"
    )
    parser.add_argument(
        "--no-first-token",
        action="store_true",
        help="leave out the time to the first token (fresh processes)",
    )
    options.add_runtime(parser, "default: what the model was trained for")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.measure import bench

    return bench(
        str(locate(args.model)),
        activations=args.activations,
        context=args.context,
        threads=args.threads,
        kv_bits=args.kv_bits,
        prefill=args.prefill,
        decode=args.decode,
        repeats=args.repeats,
        first_token=not args.no_first_token,
        progress=lambda text: output.note(f"[{text}]") if sys.stderr.isatty() else None,
    )


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    r = result
    bandwidth, peak = r["bandwidth_bytes_per_second"], r["int8_multiply_adds_per_second"]
    decode = f"{r['decode_tokens_per_second']:,.1f} tokens/s, {r['decode_bound_fraction']:.0%}"
    prefill = f"{r['prefill_tokens_per_second']:,.1f} tokens/s, {r['prefill_bound_fraction']:.0%}"
    first, after = r["time_to_first_token_seconds"], " from the start of a process"
    rows = [
        ("machine", f"{r['cpu']}, {r['isa']}, {r['threads']} threads"),
        ("bits per weight", f"{r['bits_per_weight']:.3f}"),
        ("decode", f"{decode} of the bound that {bandwidth / 1e9:.1f} GB/s of memory set"),
        ("prefill", f"{prefill} of the bound that {peak / 1e9:,.0f} G int8 multiply-adds/s set"),
        (
            "first token",
            "not measured" if first is None else f"{first:.3f} s{after}",
        ),
        ("peak memory", output.megabytes(r["peak_rss_bytes"])),
    ]
    sys.stdout.write(output.pairs(rows))
