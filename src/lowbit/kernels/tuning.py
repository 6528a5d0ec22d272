"""Which batches each kernel is taken for: measured once per machine, kept in the user's cache folder.

A matrix meets one token with the kernel `gemv`, up to a few dozen with `few` (or two or three with `gemv`
once per token, where `few` does not cover the format) and many with `gemm`. Where one overtakes another
depends on the machine and changes no result. `lowbit doctor` and `lowbit bench kernels` measure it (`tune`,
about 0.3 s) and loading a model reads what they found (`apply`, 0.2 ms); without them built-in numbers hold.
LOWBIT_TUNING=off ignores the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Crossovers", "apply", "tune"]

MOST = 64  # largest batch that gemv and few may be taken for, as in native/crossover.h
BATCHES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # that are measured
SHAPE, GROUP = (2048, 2048), 64  # large enough that a product takes longer than waking the threads
# Products go round so many copies of the matrix, 36 MB of weights, that these come from memory or the last
# cache as in a model. With one matrix in a nearer cache unpacking overtakes too early, at 9 tokens for 15.
COPIES, REPEATS = 16, 3


_TABLES = "|tables"  # behind the key: which widths of codes go by table lookup


class Crossovers(NamedTuple):
    """The largest batches for the kernels gemv and few, 1 to MOST."""

    gemv: int
    few: int


def apply() -> Crossovers:
    """Take what was measured on this machine, if it was. Returns what holds from now on."""
    from lowbit import _native

    found = None if _is_off() else _read(_key())
    if found is not None:
        _native.set_crossovers(*found)
        widths = _entries().get(_key() + _TABLES)
        if type(widths) is int and 0 <= widths < 1 << 16:
            _native.set_tables(widths)
    return Crossovers(*_native.crossovers())


def tune() -> Crossovers:
    """Measure the crossovers and which codes go by table, use both from now on and keep them for `apply`.

    A cache folder that cannot be written only means that the next process does not find them.
    """
    from lowbit import _native
    from lowbit.kernels import lookup

    if _is_off():
        return Crossovers(*_native.crossovers())
    before = _native.crossovers()
    try:
        found = Crossovers(gemv=_last_better(few=False), few=_last_better(few=True))
    except BaseException:
        _native.set_crossovers(*before)
        raise
    _native.set_crossovers(*found)
    widths = lookup.measure()
    kept: dict[str, Any] = {_key(): found._asdict()}
    if widths is not None:
        _native.set_tables(widths)
        kept[_key() + _TABLES] = widths
    with contextlib.suppress(OSError):
        _write(kept)
    return found


def path() -> Path:
    """The file of measured crossovers: in $LOWBIT_CACHE, else in lowbit in the user's cache folder."""
    given = os.environ.get("LOWBIT_CACHE")
    if given:
        return Path(given) / "kernels.json"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowbit" / "kernels.json"


def _is_off() -> bool:
    return os.environ.get("LOWBIT_TUNING", "").lower() == "off"


def _key() -> str:
    from lowbit import _native

    built = os.stat(_native.__file__)  # what a release changes, and a build in between
    return "|".join([_cpu(), _native.isa(), str(_native.threads()), f"{built.st_size}-{built.st_mtime_ns}"])


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith(("model name", "Model", "cpu model", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _entries() -> dict[str, object]:
    """The file's entries; none if it is missing or damaged."""
    try:
        stored = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _read(key: str) -> Crossovers | None:
    entry = _entries().get(key)
    if not isinstance(entry, dict):
        return None
    gemv, few = entry.get("gemv"), entry.get("few")
    if type(gemv) is not int or type(few) is not int or not (1 <= gemv <= MOST and 1 <= few <= MOST):
        return None
    return Crossovers(gemv, few)


def _write(found: dict[str, Any]) -> None:
    entries = {**_entries(), **found}
    path().parent.mkdir(parents=True, exist_ok=True)
    import tempfile  # a megabyte of modules that reading does not need

    descriptor, temporary = tempfile.mkstemp(dir=path().parent, prefix=".kernels-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            json.dump(entries, out, indent=1)
        os.replace(temporary, path())
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _last_better(few: bool) -> int:
    """The largest measured batch up to which decoding in registers beats unpacking, for levels that `few`
    covers or for others. Two batches in a row must be slower to end the search: one may be noise."""
    from lowbit import _native

    matrices = [_matrix(few) for _ in range(COPIES)]
    best, slower = 1, 0
    for tokens in BATCHES:
        x = np.ones((tokens, SHAPE[1]), np.float32)
        times = []
        for limit in (MOST, 1):
            _native.set_crossovers(limit, limit)
            times.append(_seconds(x, matrices))
        best, slower = (tokens, 0) if times[0] <= times[1] else (best, slower + 1)
        if slower == 2:
            break
    return best


def _seconds(x: np.ndarray, matrices: list[Any]) -> float:
    """The least of several rounds through all matrices: whatever else happens on the machine only adds."""
    from lowbit import _native

    least = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        for matrix in matrices:
            _native.matmul(x, matrix)
        least = min(least, time.perf_counter() - started)
    return least


def _matrix(even: bool) -> Any:
    """A native matrix of 4-bit codes, of even levels or of some that take two bytes each."""
    from lowbit import _native

    out_features, in_features = SHAPE
    blocks, groups = out_features // 32, in_features // GROUP
    codes = np.random.default_rng(0).integers(0, 256, out_features * in_features // 2, np.uint8)
    levels = np.arange(16, dtype=np.float32) - 8
    matrix = _native.Matrix(out_features, in_features)
    scales = np.ones((blocks, groups, 32), np.float16)
    with warnings.catch_warnings():  # LOWBIT_KERNEL=table is not about this matrix
        warnings.simplefilter("ignore", RuntimeWarning)
        matrix.add_code_term(4, codes, "fp16", scales, GROUP, (levels if even else levels**3)[None])
    return matrix
