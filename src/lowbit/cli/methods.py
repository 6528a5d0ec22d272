"""`lowbit methods`: the ways of choosing codes, with their options and sources."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lowbit.cli import output


def configure(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.compress.folds import FOLDS
    from lowbit.quantize.methods import METHODS

    return {
        "folds": [
            {"name": name, "summary": fold.summary, "options": fold.options(), "source": fold.source}
            for name, fold in FOLDS.items()
        ],
        "methods": [
            {
                "name": name,
                "summary": method.summary,
                "calibrated": method.calibrated,
                "options": method.options(),
                "source": method.source,
            }
            for name, method in METHODS.items()
        ],
    }


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    rows = [
        (m["name"], "yes" if m["calibrated"] else "no", m["summary"], _options(m), m["source"])
        for m in result["methods"]
    ]
    sys.stdout.write(output.table(("method", "text", "what it does", "options", "source"), rows, right=()))
    rows = [(f["name"], "yes", f["summary"], _options(f), f["source"]) for f in result["folds"]]
    sys.stdout.write(
        "\n" + output.table(("fold", "text", "what it does", "options", "source"), rows, right=())
    )
    sys.stdout.write(
        "\n`lowbit quantize MODEL FORMAT --method FOLD+METHOD:OPTION=VALUE,...`: any folds, then a method.\n"
        "Those marked with yes run a text through the model (--calibration FILE).\n"
    )


def _options(entry: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in entry["options"].items())
