"""`lowbit eval`: perplexity of a model on a text, or its accuracy on tasks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lowbit.cli import options, output
from lowbit.errors import RequestError


def configure(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--text", metavar="FILE", help="a UTF-8 text (default: a shipped excerpt of Shakespeare)"
    )
    parser.add_argument(
        "--max-tokens", type=options.positive, metavar="N", help="only the first N tokens of it"
    )
    parser.add_argument(
        "--tasks",
        metavar="A,B",
        help="accuracy on these tasks of lm-evaluation-harness instead, for example arc_easy,piqa,hellaswag",
    )
    parser.add_argument(
        "--task-data", metavar="DIR", help="a folder with the files of the tasks (default: the hub)"
    )
    parser.add_argument(
        "--limit", type=options.positive, metavar="N", help="only the first N documents of a task"
    )
    parser.add_argument(
        "--shots", type=int, metavar="N", help="examples before each question (default: the task's)"
    )
    parser.add_argument("--chat", action="store_true", help="ask the tasks in the model's chat template")
    options.add_runtime(parser, "tokens of a window (default 2048, or what the model holds)")


def execute(args: argparse.Namespace) -> dict[str, Any]:
    for name in ("task_data", "limit", "shots", "chat"):
        if getattr(args, name) and not args.tasks:
            raise options.UsageError(f"--{name.replace('_', '-')} belongs to --tasks; name tasks as well")
    if args.tasks:
        return _tasks(args)
    text = read_text(Path(args.text)) if args.text else demo_text()
    from lowbit.measure import perplexity

    model = options.load_model(args)
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


def _tasks(args: argparse.Namespace) -> dict[str, Any]:
    if args.text or args.max_tokens:
        raise options.UsageError("--text and --max-tokens belong to perplexity; leave them or --tasks out")
    from lowbit.measure.tasks import evaluate_tasks

    model = options.load_model(args)
    with output.Progress("tasks") as bar:
        found = evaluate_tasks(
            model,
            [name.strip() for name in args.tasks.split(",") if name.strip()],
            Path(args.task_data) if args.task_data else None,
            args.limit,
            args.shots,
            args.chat,
            progress=lambda done, total: bar.update(done, total, f"{done} of {total}"),
        )
    return {
        **found,
        "bits_per_weight": model.bits_per_weight,
        "activations": model.model.activations,
        "kv_bits": model.model.kv_bits,
    }


def _show_tasks(result: dict[str, Any]) -> None:
    rows = []
    for name, task in result["tasks"].items():
        for metric, found in task["metrics"].items():
            error = found["standard_error"]
            spread = "" if error is None else f"+- {error:.4f}"
            asked = f"{task['documents']:,}" + (
                "" if task["documents"] == task["of"] else f" of {task['of']:,}"
            )
            rows.append((name, metric, f"{found['value']:.4f}", spread, asked, task["protocol"]))
    header = ("task", "metric", "value", "standard error", "documents", "protocol")
    sys.stdout.write(output.table(header, rows, right=[2, 4]))
    output.note(f"{result['seconds']:,.1f} s at {result['bits_per_weight']:.3f} bits per weight")


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    if args.tasks:
        _show_tasks(result)
        return
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
