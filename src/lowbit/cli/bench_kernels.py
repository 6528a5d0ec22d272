"""`lowbit bench kernels`: single products of any format beside the bandwidth and the peak of the machine."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from lowbit.cli import options, output
from lowbit.errors import RequestError

if TYPE_CHECKING:
    from lowbit.formats import Format


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--formats",
        type=_words,
        metavar="LIST",
        help="names, separated by commas (default: a choice of all kinds)",
    )
    parser.add_argument(
        "--format-file",
        action="append",
        default=[],
        metavar="FILE.py",
        help="Python that makes formats of your own, for example FORMAT = Format.codebook([..]); repeatable",
    )
    parser.add_argument(
        "--shapes", type=_words, metavar="LIST", help="OUTxIN, .. (default 4096x4096,576x576)"
    )
    parser.add_argument(
        "--batch", type=_numbers, default=[1, 512], metavar="LIST", help="rows of activations (default 1,512)"
    )
    parser.add_argument(
        "--threads", type=_numbers, default=[], metavar="LIST", help="default: what the machine allows"
    )
    parser.add_argument("--activation-bits", type=int, choices=(8, 16), default=8, help="default %(default)s")
    parser.add_argument("--plot", metavar="FILE", help="draw it (.png, .svg, .pdf); needs lowbit[plot]")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.measure import bench_kernels, kernels, plot

    if args.plot is not None:
        plot.check(args.plot)  # before minutes of measuring
    own = [fmt for path in args.format_file for fmt in read_formats(path)]
    names = args.formats if args.formats is not None else [] if own else list(kernels.FORMATS)
    with output.Progress("measuring") as bar:
        result = bench_kernels(
            [*names, *own],
            args.shapes if args.shapes is not None else kernels.SHAPES,
            args.batch,
            args.threads,
            args.activation_bits,
            bar.update,
        )
    if args.plot is not None:
        plot.draw_kernels(result, args.plot)
        result["plot"] = args.plot
    return result


def read_formats(path: str) -> list[Format]:
    """Run a Python file and return its FORMAT, or every Format that it leaves in a variable."""
    import runpy

    from lowbit.formats import Format

    try:
        names = runpy.run_path(path)
    except OSError:
        raise
    except Exception as error:
        raise RequestError(f"--format-file {path}: {type(error).__name__}: {error}") from error
    found = [names["FORMAT"]] if "FORMAT" in names else [v for v in names.values() if isinstance(v, Format)]
    if not found or not all(isinstance(fmt, Format) for fmt in found):
        raise RequestError(
            f"--format-file {path}: makes no Format; write for example "
            "FORMAT = lowbit.Format.codebook([-1, -0.3, 0.3, 1], group_size=64)"
        )
    return list(dict.fromkeys(found))


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    sys.stdout.write(f"{result['cpu']}, {result['isa']}, {result['activation_bits']}-bit activations\n")
    for bound in result["bounds"]:
        threads = "1 thread" if bound["threads"] == 1 else f"{bound['threads']} threads"
        rates = [bound[f"{what}_multiply_adds_per_second"] / 1e9 for what in ("int8", "float")]
        sys.stdout.write(
            f"{threads}: {bound['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s, "
            f"{rates[0]:,.0f} G multiply-adds/s int8, {rates[1]:,.0f} float32\n"
        )
    header: tuple[str, ...] = ("format", "bits", "shape", "batch", "threads", "kernel")
    header += ("us", "GB/s", "of it", "GMA/s", "of peak", "of bound")
    rows = [_row(entry) for entry in result["kernels"]]
    sys.stdout.write("\n" + output.table(header, rows, right={1, 3, 4, 6, 7, 8, 9, 10, 11}))
    for entry in result["skipped"]:
        sys.stdout.write(f"skipped {entry['format']} {entry['shape']}: {entry['why']}\n")
    sys.stdout.write(
        "\nbits: per weight, scales and tables included. GMA/s: 10^9 multiply-adds per second. of bound: the "
        "least\ntime that bandwidth and peak allow, both measured beside each product, over the time taken.\n"
    )
    if "plot" in result:
        sys.stdout.write(f"drawn: {result['plot']}\n")


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    return (
        entry["format"],
        f"{entry['bits_per_weight']:.2f}",
        f"{entry['out_features']}x{entry['in_features']}",
        str(entry["batch"]),
        str(entry["threads"]),
        entry["kernel"],
        f"{entry['seconds'] * 1e6:,.1f}",
        f"{entry['bytes_per_second'] / 1e9:.1f}",
        f"{entry['bandwidth_fraction']:.0%}",
        f"{entry['multiply_adds_per_second'] / 1e9:,.0f}",
        f"{entry['peak_fraction']:.0%}",
        output.bold(f"{entry['bound_fraction']:.0%}"),
    )


def _words(text: str) -> list[str]:
    """An argparse type: words separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    """An argparse type: whole numbers of at least 1, separated by commas."""
    return [options.positive(word) for word in _words(text)] or [options.positive(text)]
