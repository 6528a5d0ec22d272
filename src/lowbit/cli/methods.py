"""`lowbit methods`: the ways of choosing codes, with their options and sources."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lowbit.cli import output


def configure(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.quantize.methods import METHODS

    return {
        "methods": [
            {
                "name": name,
                "summary": method.summary,
                "calibrated": method.calibrated,
                "options": method.options(),
                "source": method.source,
            }
            for name, method in METHODS.items()
        ]
    }


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    rows = [
        (
            method["name"],
            "yes" if method["calibrated"] else "no",
            method["summary"],
            " ".join(f"{key}={value}" for key, value in method["options"].items()),
            method["source"],
        )
        for method in result["methods"]
    ]
    sys.stdout.write(output.table(("method", "text", "what it does", "options", "source"), rows, right=()))
    sys.stdout.write(
        "\nUse one with `lowbit quantize MODEL FORMAT --method NAME:OPTION=VALUE,...`; those with\n"
    )
    sys.stdout.write("text run a calibration text through the model (--calibration FILE).\n")
