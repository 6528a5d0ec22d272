"""`lowbit quantize`: a model in, the same model in fewer bits out."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from lowbit.cli import options, output
from lowbit.cli.pull import locate


def configure(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "format",
        metavar="FORMAT",
        help="such as int4-g32, nf4, mxfp4; `lowbit formats` lists; auto: chosen for each matrix, "
        "with --bits or --bytes",
    )
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="the directory to write")
    parser.add_argument(
        "--search",
        choices=["mse", "minmax"],
        default="mse",
        help="how scales are found (default %(default)s)",
    )
    parser.add_argument("--embedding", metavar="FORMAT", help="of token embedding and output head")
    parser.add_argument(
        "--layer",
        metavar="PATTERN=FORMAT",
        action="append",
        default=[],
        help="format of tensors by name, such as '*.down_proj.weight=int8-g32'; may be given again",
    )
    parser.add_argument(
        "--method",
        default="rtn",
        metavar="NAME[:OPTION=VALUE,..]",
        help="how codes are chosen (default %(default)s, round to nearest); `lowbit methods` lists",
    )
    auto = parser.add_argument_group("budget, for the format auto")
    auto.add_argument("--bits", type=float, metavar="B", help="per weight of the layers, scales included")
    auto.add_argument("--bytes", metavar="SIZE", help="of all weights, such as 60MB")
    auto.add_argument("--choices", metavar="LIST", help="formats to choose from, with commas between")
    auto.add_argument(
        "--sensitivity", metavar="NAME", help="how damage is measured: fisher, kl, hawq, output"
    )
    auto.add_argument("--seconds", type=float, metavar="S", help="most that a token's products may take")
    auto.add_argument(
        "--timings", metavar="FILE", help="for --seconds: what `lowbit bench kernels --json` printed here"
    )
    text = parser.add_argument_group("calibration, for methods that watch the activations")
    text.add_argument("--calibration", metavar="FILE", help="a UTF-8 text (default: a shipped one)")
    text.add_argument(
        "--samples", type=options.positive, metavar="N", help="windows of it (default 128, or what it has)"
    )
    text.add_argument("--length", type=options.positive, metavar="N", help="tokens of a window (default 512)")
    text.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of windows")
    text.add_argument(
        "--expert-tokens",
        type=options.positive,
        metavar="N",
        help="of it that every expert of a mixture must see (default 128)",
    )
    text.add_argument(
        "--few-tokens",
        choices=["weights", "error"],
        default="weights",
        help="an expert that sees fewer is rounded by its weights alone, or an error (default %(default)s)",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="leave out loading the result and measuring its divergence from the original",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="write an HTML page: error and bits of each matrix, histograms, time"
    )
    parser.add_argument(
        "--restart", action="store_true", help="throw an unfinished run to DIR away instead of finishing it"
    )
    parser.add_argument("--force", action="store_true", help="replace DIR if it exists")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    if args.report:
        from lowbit.measure import pages, report

        pages.check_target(args.report)
    source, target = locate(args.model), Path(args.output)
    if args.format != "auto":
        for name in ("bits", "bytes", "choices", "sensitivity", "seconds", "timings"):
            if getattr(args, name) is not None:
                raise options.UsageError(
                    f"quantize: --{name} belongs to the format auto, not to {args.format}"
                )
    result = quantize(
        str(source),
        _auto(args) if args.format == "auto" else args.format,
        target,
        search=args.search,
        embedding=args.embedding,
        layers=_layers(args.layer),
        force=args.force,
        method=args.method,
        calibration=args.calibration,
        samples=args.samples,
        length=args.length,
        seed=args.seed,
        restart=args.restart,
        expert_tokens=args.expert_tokens,
        few_tokens=args.few_tokens,
        verify=not args.no_verify,
    )
    if args.report:
        report.write_report(args.report, {**result, "histograms": report.weight_histograms(source, target)})
    return result


def quantize(
    model: str,
    format: Any,
    target: Path,
    *,
    search: str = "mse",
    embedding: str | None = None,
    layers: dict[str, str] | None = None,
    force: bool = False,
    method: str = "rtn",
    calibration: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    restart: bool = False,
    expert_tokens: int | None = None,
    few_tokens: str = "weights",
    verify: bool = True,
) -> dict[str, Any]:
    """Quantize with a progress bar; returns the object that --json prints."""
    import lowbit

    with output.Progress(f"quantize to {format if isinstance(format, str) else 'chosen formats'}") as bar:
        report = lowbit.quantize(
            model,
            format,
            target,
            search=search,
            embedding=embedding,
            layers=layers,
            force=force,
            method=method,
            calibration=calibration,
            samples=samples,
            length=length,
            seed=seed,
            restart=restart,
            expert_tokens=expert_tokens,
            few_tokens=few_tokens,
            verify=verify,
            progress=bar.update,
        )
    return {**report, "size_bytes": output.size_bytes(target)}


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    sys.stdout.write(
        f"{result['output']}: {result['bits_per_weight']:.3f} bits per weight, "
        f"{output.megabytes(result['size_bytes'])}, {len(result['layers'])} tensors "
        f"in {result['seconds']:.1f} s\n"
    )
    if "auto" in result:
        counts = Counter(layer["format"] for layer in result["layers"])
        sys.stdout.write("chosen: " + ", ".join(f"{n} x {name}" for name, n in sorted(counts.items())) + "\n")
    if few := result.get("experts", {}).get("few"):
        named = ", ".join(f"layer {e['layer']} expert {e['expert']} ({e['tokens']})" for e in few[:6])
        sys.stdout.write(
            f"{len(few)} experts saw fewer than {result['experts']['limit']} tokens and were rounded by "
            f"their weights alone: {named}{', ..' if len(few) > 6 else ''}\n"
        )
    measured = result.get("measured", {})
    if "skipped" in measured:
        sys.stdout.write(f"not measured: {measured['skipped']}\n")
    elif measured:
        sys.stdout.write(
            f"on {measured['text']}: {measured['kl_nats_per_token']:.4f} nats per token from the original, "
            f"same top token {measured['top1_agreement']:.1%}, perplexity {measured['perplexity']:.2f} "
            f"({measured['source_perplexity']:.2f} before)\n"
        )
    if sys.stderr.isatty():
        output.note(f"talk to it: lowbit run {result['output']} 'What is a language model?'")


def _auto(args: argparse.Namespace) -> Any:
    from lowbit.formats.auto import Auto, timings_of
    from lowbit.model.json_file import read_json

    given = {name: getattr(args, name) for name in ("bits", "bytes", "choices", "sensitivity", "seconds")}
    found = {name: value for name, value in given.items() if value is not None}
    if args.timings is not None:
        found["timings"] = timings_of(read_json(Path(args.timings)))
    if args.embedding is not None:
        found["embedding"], args.embedding = args.embedding, None
    return Auto(**found)


def _layers(options_given: list[str]) -> dict[str, str] | None:
    layers = {}
    for text in options_given:
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern or not name:
            raise options.UsageError(f"quantize: --layer {text!r} is not PATTERN=FORMAT; see --help")
        layers[pattern] = name
    return layers or None
