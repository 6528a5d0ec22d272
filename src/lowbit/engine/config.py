"""The limits of an engine, and how many blocks of keys and values they come to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import RequestError

_CGROUPS = [
    tuple(f"/sys/fs/cgroup/{name}" for name in ("memory.max", "memory.current", "memory.stat")),
    tuple(f"/sys/fs/cgroup/memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")),
]
FREE_SHARE = 0.5  # of the free memory, where no size is given


@dataclass(frozen=True)
class EngineConfig:
    """Limits of an engine. None of them changes a token.

    kv_blocks, kv_bytes: memory for keys and values, in blocks of 256 positions or in bytes (give one); None:
        half of the free memory, at most what max_sequences full contexts need.
    max_sequences: requests computed at the same time.
    target_seconds_between_tokens: what a stream may wait for its next token while prompts are read; None:
        such that nearly every step takes less than twice what it takes without them.
    chunk_tokens: prompt tokens per step, in place of the number fitted to that target.
    prefix_cache: share the keys and values of common beginnings.
    speculation: None, "ngram" (prompt lookup) or an object with propose() and feedback().
    max_queued_tokens: prompt tokens that may wait; more are refused with BusyError.
    preempt_every: take a stream's keys and values away every so many steps (for tests; 0: never).
    """

    kv_blocks: int | None = None
    kv_bytes: int | None = None
    max_sequences: int = 64
    target_seconds_between_tokens: float | None = None
    chunk_tokens: int | None = None
    prefix_cache: bool = True
    speculation: Any = None
    max_queued_tokens: int = 1 << 18
    preempt_every: int = 0

    def __post_init__(self) -> None:
        for name in ("kv_blocks", "kv_bytes", "max_sequences", "chunk_tokens", "max_queued_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"engine: {name}={value} must be at least 1")
        if self.kv_blocks is not None and self.kv_bytes is not None:
            raise RequestError("engine: both kv_blocks and kv_bytes are given; give one")
        if self.target_seconds_between_tokens is not None and self.target_seconds_between_tokens <= 0:
            raise RequestError(
                f"engine: target_seconds_between_tokens={self.target_seconds_between_tokens} must be positive"
            )

    def blocks(self, block_bytes: int, block_positions: int, context: int) -> int:
        """Blocks of `block_bytes` for a model that takes `context` tokens; at least one."""
        if self.kv_blocks is not None:
            return self.kv_blocks
        if self.kv_bytes is not None:
            if self.kv_bytes < block_bytes:
                raise RequestError(
                    f"engine: kv_bytes={self.kv_bytes} is less than a block of {block_bytes} bytes "
                    f"({block_positions} positions); give at least that"
                )
            return self.kv_bytes // block_bytes
        full = self.max_sequences * -(-context // block_positions)
        free = free_memory_bytes()
        return full if free is None else max(1, min(full, int(FREE_SHARE * free) // block_bytes))


def free_memory_bytes() -> int | None:
    """Memory that this process may still take: of the machine or of its control group; None if unknown."""
    found = []
    meminfo = _read("/proc/meminfo")
    for line in (meminfo or "").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for limit, used, stat in _CGROUPS:
        most, now = _read(limit), _read(used)
        if most and now and most.strip().isdigit():
            # Files that are only cached make way.
            lines = (line.split() for line in (_read(stat) or "").splitlines())
            cached = sum(int(value) for name, value in lines if name in ("inactive_file", "active_file"))
            found.append(max(0, int(most) - int(now) + cached))
    return min(found) if found else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None
