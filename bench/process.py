"""Run `lowbit` as its users do, in a process of its own, and watch its time, first byte and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class CommandError(RuntimeError):
    """A `lowbit` command failed; the text ends with what it wrote to stderr."""


@dataclass(frozen=True)
class Finished:
    """What a process did. `first_byte_seconds`: from its start to the first byte that it wrote."""

    stdout: str
    seconds: float
    first_byte_seconds: float | None
    peak_rss_bytes: int


def lowbit(*arguments: str | Path) -> Finished:
    """Run `lowbit ARGUMENTS` from this working tree and wait for it. Raises CommandError on failure."""
    return watch([sys.executable, "-m", "lowbit.cli", *map(str, arguments)])


def lowbit_json(*arguments: str | Path) -> dict[str, Any]:
    """Run `lowbit ARGUMENTS --json` and return its one object, with the whole process's time beside it."""
    finished = lowbit(*arguments, "--json")
    try:
        told = json.loads(finished.stdout)
    except json.JSONDecodeError as error:
        said = finished.stdout.strip()[-300:]
        raise CommandError(f"lowbit {arguments[0]} --json: not one JSON object ({error}): {said}") from error
    return {**told, "process_seconds": finished.seconds, "process_peak_rss_bytes": finished.peak_rss_bytes}


def watch(command: Sequence[str]) -> Finished:
    """Run `command` to its end. The peak is the process's own (ru_maxrss), mapped weights included."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "src"), *filter(None, [environment.get("PYTHONPATH")])]
    )
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, env=environment
        )
        assert process.stdout is not None
        out = os.read(process.stdout.fileno(), 1)
        first = time.perf_counter() - started if out else None
        out += process.stdout.read()
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    if process.returncode:
        shown = " ".join(command[1:])
        raise CommandError(f"{shown}: exit status {process.returncode}: {said[-1500:]}")
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(out.decode(errors="replace"), seconds, first, usage.ru_maxrss * unit)
