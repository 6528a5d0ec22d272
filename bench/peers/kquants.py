"""llama.cpp's K-quants of a GGUF, with and without an importance matrix from our calibration text.

lowbit reads these files as they are, so one comparison measures both programs' weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from peers import llama_cpp
from peers.llama_cpp import PeerError

KINDS = {"Q4_K_M": "4", "Q3_K_M": "3", "Q2_K": "2"}


def rows(
    subject: Any,
    cache: Path,
    missing: dict[str, str],
    only: Sequence[str] | None,
    say: Callable[[str], None],
) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """Rows without measurements, and the files by key. `missing` gets the reason if there is no llama.cpp."""
    wanted = [
        (kind, weighed)
        for kind in KINDS
        for weighed in (False, True)
        if not only or any(fnmatchcase(_key(kind, weighed), one) for one in only)
    ]
    found: list[dict[str, Any]] = []
    made: dict[str, Path] = {}
    try:
        peer = llama_cpp.build(cache, say=say) if wanted else None
        imatrix, watching = None, 0.0
        for kind, weighed in sorted(wanted, key=lambda one: one[1]):
            assert peer is not None
            if weighed and imatrix is None:
                started = time.perf_counter()
                imatrix = _imatrix(peer, subject, cache)
                watching = time.perf_counter() - started  # belongs to each that uses it
            started = time.perf_counter() - watching
            path = cache / "models" / f"{subject.name}.{kind}{'.imatrix' if weighed else ''}.gguf"
            path.parent.mkdir(parents=True, exist_ok=True)
            peer.quantize(subject.source, path, kind, threads=2, imatrix=imatrix)
            seconds = time.perf_counter() - started
            say(f"  {_key(kind, weighed)}: {seconds:.1f} s")
            found.append(
                {
                    "key": _key(kind, weighed),
                    "width": KINDS[kind],
                    "peer": "llama.cpp",
                    "method": "imatrix" if weighed else "rtn",
                    "format": kind,
                    "seconds": seconds,
                    "size_bytes": path.stat().st_size,
                    **_bits(path),
                }
            )
            made[_key(kind, weighed)] = path
    except PeerError as error:
        missing["llama.cpp"] = str(error)[-300:]
        say(f"  going on without llama.cpp: {missing['llama.cpp']}")
    return found, made


def _key(kind: str, weighed: bool) -> str:
    return f"llama.cpp {'imatrix' if weighed else 'rtn'}@{kind}"


def _imatrix(peer: llama_cpp.LlamaCpp, subject: Any, cache: Path) -> Path:
    """What the inputs of every matrix look like on the calibration text; made once in each run."""
    text, windows, length = subject.calibration
    output = cache / "models" / f"{subject.name}.imatrix.gguf"
    return peer.imatrix(subject.source, text, output, context=length, chunks=windows, threads=2)


def _bits(path: Path) -> dict[str, float]:
    """Bits per weight that the file stores, of the layers' matrices and of all matrices."""
    import gguf

    inside = [0, 0]
    every = [0, 0]
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) < 2:
            continue
        for sums in [every, inside] if tensor.name.startswith("blk.") else [every]:
            sums[0] += int(tensor.n_bytes)
            sums[1] += int(tensor.n_elements)
    return {
        "bits_per_weight": 8 * inside[0] / inside[1],
        "model_bits_per_weight": 8 * every[0] / every[1],
    }
