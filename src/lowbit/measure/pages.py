"""Pages that commands write: asked for before the work, written whole or not at all after it."""

from __future__ import annotations

import os
from pathlib import Path

from lowbit.errors import RequestError


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise RequestError if no file can be written at `path`: before the work, not after it."""
    folder = Path(path).absolute().parent
    if not folder.is_dir() or Path(path).is_dir():
        raise RequestError(f"report {os.fspath(path)!r}: give a file in a folder that exists")


def write_page(path: str | os.PathLike[str], page: str) -> None:
    """Write the text `page`. Raises RequestError where it cannot be written."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RequestError(f"report {target}: {error.strerror}; choose another file") from error
