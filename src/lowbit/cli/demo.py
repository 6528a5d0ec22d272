"""`lowbit demo`: everything once. Fetch a model, write it in fewer bits, compare, talk."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lowbit.cli import options, output
from lowbit.cli.pull import fetch
from lowbit.cli.quantize import quantize
from lowbit.errors import LowbitError, UnsupportedError

MODEL = "smollm2-135m"
FORMATS = ("int8-g32", "int4-g32", "int3-g16", "int2-g16")
SPOKEN = "int4-g32"
QUESTION = "Explain in one sentence what a language model is."
ANSWER_TOKENS = 100
REPETITION_PENALTY = 1.1  # a model this small likes to repeat itself
EVAL_TOKENS = 4096
EVAL_CONTEXT = 1024
COLUMNS = (
    ("model", 22),
    ("bits/weight", 11),
    ("size", 10),
    ("perplexity", 10),
    ("decode tokens/s", 15),
    ("prefill tokens/s", 16),
    ("memory", 10),
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=MODEL, metavar="MODEL", help=f"{options.MODEL_HELP}; default %(default)s"
    )
    parser.add_argument("-o", "--output", default="demo", metavar="DIR", help="default ./%(default)s")
    parser.add_argument("--question", default=QUESTION, metavar="TEXT", help="what the 4-bit model is asked")
    parser.add_argument(
        "--threads", type=options.positive, metavar="N", help="default: what the machine allows"
    )


def execute(args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    output.note(f"[1/4] fetch {args.model}")
    source = fetch(args.model)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)

    output.note(f"[2/4] write it in {', '.join(FORMATS)}")
    models = {f"original ({_kind(source)})": source}
    for name in FORMATS:
        report = quantize(str(source), name, folder / name, force=True, verify=False)
        output.note(f"      {folder / name}  {report['seconds']:.1f} s")
        models[name] = folder / name

    output.note("[3/4] compare them: perplexity on a page of Shakespeare, speed and memory here")
    if not args.json:
        _print_row([title for title, _ in COLUMNS], heading=True)
    rows = []
    for name, path in models.items():
        row = _measure(name, path, args.threads)
        rows.append(row)
        if not args.json:
            _print_row(_cells(row))

    output.note("      (2 bits by rounding alone ruin a model this small; they are here for honesty)")
    output.note(f"[4/4] ask the model of {SPOKEN}: {args.question}")
    answer = _ask(folder / SPOKEN, args)
    return {
        "rows": rows,
        "question": args.question,
        "answer": answer,
        "seconds": time.perf_counter() - started,
    }


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    output.note(f"\nDone in {result['seconds']:.0f} s. Go on: lowbit chat {Path(args.output) / SPOKEN}")


def _kind(source: Path) -> str:
    return "GGUF" if source.suffix == ".gguf" else "directory"


def _measure(name: str, path: Path, threads: int | None) -> dict[str, Any]:
    """One row. Fresh processes, so that the memory is this model's alone."""
    more = ["--threads", str(threads)] if threads else []
    quality = _lowbit("eval", path, "--max-tokens", EVAL_TOKENS, "--context", EVAL_CONTEXT, *more)
    speed = _lowbit("bench", path, "--prefill", 256, "--decode", 64, *more)
    return {
        "model": name,
        "path": str(path),
        "bits_per_weight": quality["bits_per_weight"],
        "size_bytes": output.size_bytes(path),
        "perplexity": quality["perplexity"],
        "decode_tokens_per_second": speed["decode_tokens_per_second"],
        "prefill_tokens_per_second": speed["prefill_tokens_per_second"],
        "time_to_first_token_seconds": speed["time_to_first_token_seconds"],
        "peak_rss_bytes": speed["peak_rss_bytes"],
    }


def _lowbit(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "lowbit.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    try:
        result = json.loads(done.stdout)
    except ValueError as error:
        raise UnsupportedError(
            f"demo: `lowbit {arguments[0]}` failed: {done.stderr.strip()[-500:]}"
        ) from error
    if "error" in result:
        raise LowbitError(result["error"]["message"])
    return result


def _ask(path: Path, args: argparse.Namespace) -> str:
    from lowbit.engine import Conversation, SamplingParameters, load

    model = load(path, threads=args.threads)
    parameters = SamplingParameters(max_tokens=ANSWER_TOKENS, repetition_penalty=REPETITION_PENALTY)
    if model.has_chat_template:
        pieces = Conversation(model).send(args.question, parameters)
    else:
        pieces = model.stream_ids(model.encode(args.question), parameters)
    said = []
    for piece in pieces:
        said.append(piece)
        if not args.json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if not args.json:
        sys.stdout.write("\n")
    return "".join(said)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["model"],
        f"{row['bits_per_weight']:.2f}",
        output.megabytes(row["size_bytes"]),
        f"{row['perplexity']:.2f}",
        f"{row['decode_tokens_per_second']:.1f}",
        f"{row['prefill_tokens_per_second']:.0f}",
        output.megabytes(row["peak_rss_bytes"]),
    ]


def _print_row(cells: list[str], heading: bool = False) -> None:
    parts = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, (_, w)) in enumerate(zip(cells, COLUMNS))]
    line = "  ".join(parts)
    sys.stdout.write((output.bold(line) if heading else line) + "\n")
    sys.stdout.flush()
