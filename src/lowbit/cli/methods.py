"""`lowbit methods`: the ways of choosing codes, preparing weights, and rounding activations and caches."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from lowbit.cli import output

HEADER = ("name", "text", "what it does", "options", "source")


def configure(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.compress.folds import FOLDS
    from lowbit.compress.refinements import REFINEMENTS
    from lowbit.compress.views import VIEWS
    from lowbit.quantize.activations import ACTIVATIONS
    from lowbit.quantize.kv import KV_METHODS
    from lowbit.quantize.methods import METHODS

    def described(name: str, entry: Any, calibrated: bool) -> dict[str, Any]:
        return {
            "name": name,
            "summary": entry.summary,
            "calibrated": calibrated,
            "options": entry.options(),
            "source": entry.source,
        }

    return {
        "methods": [described(name, method, method.calibrated) for name, method in METHODS.items()],
        "folds": [described(name, fold, True) for name, fold in FOLDS.items()],
        "views": [described(name, view, False) for name, view in VIEWS.items()],
        "refinements": [described(name, entry, True) for name, entry in REFINEMENTS.items()],
        "activations": [described(name, entry, entry.calibrated) for name, entry in ACTIVATIONS.items()],
        "caches": [described(name, entry, False) for name, entry in KV_METHODS.items()],
    }


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    for title, words in (
        ("methods", "round the weights"),
        ("folds", "move factors between activations and weights first; the function stays the same"),
        ("views", "change the whole model before anything else; the function stays the same"),
        ("refinements", "give a few rows more bits afterwards"),
        ("activations", "round inputs of matrices (emulated: lowbit.compress.emulated, docs/methods.md)"),
        ("caches", "round keys and values (emulated, too)"),
    ):
        rows = [
            (
                entry["name"],
                "yes" if entry["calibrated"] else "no",
                entry["summary"],
                " ".join(f"{key}={value}" for key, value in entry["options"].items()),
                entry["source"],
            )
            for entry in result[title]
        ]
        sys.stdout.write(f"{title.capitalize()} {words}.\n" + output.table(HEADER, rows, right=()) + "\n")
    sys.stdout.write(
        "`lowbit quantize MODEL FORMAT --method VIEW+FOLD+METHOD+REFINEMENT`, each with :OPTION=VALUE,..:\n"
        "any views, any folds, a method, at most one refinement. Those marked with yes run a text through\n"
        "the model (--calibration FILE).\n"
    )
