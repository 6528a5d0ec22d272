"""NumPy's loops run beside each other: they let go of the interpreter while they work on large arrays."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_threads(work: Callable[[int], T], numbers: Iterable[int]) -> list[T]:
    """What `work` gives for each number, in their order. LOWBIT_THREADS limits how many run at a time."""
    count = int(os.environ.get("LOWBIT_THREADS") or 0) or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, numbers))
