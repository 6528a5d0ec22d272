"""Run `lowbit` as its users do, in a process of its own, and watch its time, first byte and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
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
    stderr: str
    seconds: float
    first_byte_seconds: float | None


def lowbit(*arguments: str | Path, isa: str | None = None) -> Finished:
    """Run `lowbit ARGUMENTS` from this working tree and wait for it. Raises CommandError on failure.

    isa: the instruction set to use instead of the machine's best.
    """
    more = {"LOWBIT_ISA": isa} if isa else {}
    return watch([sys.executable, "-m", "lowbit.cli", *map(str, arguments)], more)


def lowbit_json(*arguments: str | Path, isa: str | None = None) -> dict[str, Any]:
    """Run `lowbit ARGUMENTS --json` and return its one object, with the whole process's time beside it."""
    finished = lowbit(*arguments, "--json", isa=isa)
    try:
        told = json.loads(finished.stdout)
    except json.JSONDecodeError as error:
        said = finished.stdout.strip()[-300:]
        raise CommandError(f"lowbit {arguments[0]} --json: not one JSON object ({error}): {said}") from error
    return {**told, "process_seconds": finished.seconds}


# The high-water mark of the process's own memory. ru_maxrss would not do: through fork and exec it begins
# at the peak of the parent, and this parent may have held a model.
_RUN_AND_TELL_PEAK = """
import sys
from pathlib import Path
from lowbit.cli import main
status = main(sys.argv[1:])
lines = Path("/proc/self/status").read_text().splitlines()
sys.stderr.write("\\n" + next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
sys.exit(status)
"""


def peak_rss(*arguments: str | Path) -> tuple[dict[str, Any], int]:
    """`lowbit ARGUMENTS --json` in a fresh process: its object and its peak resident bytes (Linux only)."""
    finished = watch([sys.executable, "-c", _RUN_AND_TELL_PEAK, *map(str, arguments), "--json"])
    return json.loads(finished.stdout), int(finished.stderr.splitlines()[-1]) * 1024


def watch(command: Sequence[str], more: Mapping[str, str] | None = None) -> Finished:
    """Run `command` to its end, timed from outside; `more` is added to its environment."""
    environment = {**os.environ, **(more or {})}
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
        process.wait()
        seconds = time.perf_counter() - started
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip()
    if process.returncode:
        # No folders: the text goes into result files, which travel.
        shown = " ".join(Path(part).name or part for part in command[1:4] if part != "-m")
        last = "; ".join(said.splitlines()[-3:])[-400:].replace(str(ROOT), "")
        raise CommandError(f"{shown}: exit status {process.returncode}: {last or 'it said nothing'}")
    return Finished(out.decode(errors="replace"), said, seconds, first)
