"""What reaches the terminal: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from lowbit.errors import LowbitError

OK, BUG, BAD_REQUEST, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141


def guard(action: Callable[[], Any], as_json: bool) -> int:
    """Run a command; map whatever happens to an exit status and at most one line of complaint."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Unicode must not end a run
    try:
        action()
        sys.stdout.flush()
        return OK
    except LowbitError as error:
        return _complain(type(error).__name__, str(error), as_json)
    except BrokenPipeError:
        # The reader is gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        return BROKEN_PIPE
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return INTERRUPTED
    except MemoryError:
        text = "not enough memory; choose fewer bits, a shorter --context or a smaller model"
        return _complain("MemoryError", text, as_json)
    except OSError as error:
        where = f"{error.filename!r}: " if error.filename else ""
        return _complain(type(error).__name__, f"{where}{error.strerror or error}", as_json)
    except Exception as error:
        import traceback

        traceback.print_exc()
        _complain("InternalError", f"{type(error).__name__}: {error}; this is a bug of lowbit", as_json)
        return BUG


def _complain(kind: str, message: str, as_json: bool) -> int:
    line = " ".join(message.split())
    sys.stderr.write(f"lowbit: {line}\n")
    if as_json:
        write_json({"error": {"type": kind, "message": line}}, sys.stdout)
    return BAD_REQUEST


@contextlib.contextmanager
def stdout_reserved() -> Iterator[TextIO]:
    """Send every print to stderr, and yield the real stdout for the one JSON object."""
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield stdout


def write_json(value: Any, stream: TextIO) -> None:
    """One line of strict JSON: infinities and NaN become null."""
    stream.write(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, bool)) or value is None:
        # Half of a surrogate pair cannot be written as UTF-8.
        return value.encode(errors="replace").decode() if isinstance(value, str) else value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float)) else str(value)


def note(text: str) -> None:
    """A line for the person watching, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if _colour() else text


def dim(text: str) -> str:
    return f"\033[2m{text}\033[0m" if _colour() else text


def _colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """Aligned columns; those numbered in `right` (numbers, as a rule) to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "  ".join(padded).rstrip()

    return "\n".join([bold(line(header)), *(line(row) for row in rows)]) + "\n"


def pairs(items: Sequence[tuple[str, str]]) -> str:
    """`name  value` lines with the values aligned."""
    width = max(len(name) for name, _ in items)
    return "".join(f"{name.ljust(width)}  {value}\n" for name, value in items)


def size_bytes(path: Path) -> int:
    """Size of a file, or of all files of a directory."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def megabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


class Progress:
    """A bar on stderr while it is a terminal; silent otherwise. `update(done, total, text)`."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
            columns += [TimeRemainingColumn(), TextColumn("{task.fields[text]}")]
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None, text="")
        return self

    def update(self, done: float, total: float | None, text: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, text=text)

    def say(self, text: str) -> None:
        """A step without a measure: beside the bar, or as a line of its own."""
        if self._bar is not None:
            self._bar.update(self._task, text=text)
        else:
            note(text)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
