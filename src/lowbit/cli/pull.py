"""`lowbit pull`: fetch a model and say where it is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lowbit.cli import options, output


def configure(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)


def execute(args: argparse.Namespace) -> dict[str, Any]:
    path = fetch(args.model)
    return {"model": args.model, "path": str(path), "size_bytes": output.size_bytes(path)}


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    sys.stdout.write(f"{result['path']}  ({output.megabytes(result['size_bytes'])})\n")
    if sys.stderr.isatty():
        output.note(f'try it: lowbit run {args.model} "What is a language model?"')


def fetch(model: str) -> Path:
    """Where the model is on this machine, fetched if need be and verified again."""
    from lowbit.model.download import pull

    with output.Progress(f"fetch {model}") as bar:
        return pull(model, progress=bar.say)


def locate(model: str) -> Path:
    """The same for the other verbs: what is here is taken as it is, and nothing is said about it."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    from lowbit.model.download import resolve  # slow to import, see engine.load

    return resolve(model, progress=output.note)
