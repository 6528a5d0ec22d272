"""`lowbit version`: the version of the package."""

from __future__ import annotations

import argparse
import platform
import sys
from typing import Any

from lowbit import __version__


def configure(parser: argparse.ArgumentParser) -> None:
    """No options of its own."""


def execute(args: argparse.Namespace) -> dict[str, Any]:
    return {"version": __version__, "python": platform.python_version(), "machine": platform.machine()}


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    sys.stdout.write(f"lowbit {result['version']} (Python {result['python']}, {result['machine']})\n")
