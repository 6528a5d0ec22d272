"""What C code prints is kept out of standard output: HiGHS 1.12 reports a repaired solution there, whatever
`disp` says, and it would stand in the middle of a command's JSON.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_output() -> Iterator[None]:
    """Nothing written to file descriptor 1 inside the block comes through."""
    try:
        library = ctypes.CDLL(None)
        kept = os.dup(1)
    except (OSError, TypeError):  # no such library (Windows), or no standard output
        yield
        return
    library.fflush(None)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
