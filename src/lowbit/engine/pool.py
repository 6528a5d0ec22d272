"""The engine's native memory: blocks of keys and values from one pool."""

from __future__ import annotations

from typing import Any

from lowbit.engine.config import EngineConfig
from lowbit.engine.job import Job


class PoolMemory:
    """Blocks of keys and values that the jobs of one engine share (the scheduler's Memory)."""

    def __init__(self, decoder: Any, config: EngineConfig, context: int) -> None:
        from lowbit import _native

        probe = _native.KvPool(decoder, 1)  # address space only
        self.block_positions: int = probe.block_positions
        self.block_bytes: int = probe.block_bytes
        self.blocks = config.blocks(self.block_bytes, self.block_positions, context)
        self._capacity = min(context, self.blocks * self.block_positions)
        self._pool = _native.KvPool(decoder, self.blocks)
        self._new_cache = _native.KvCache

    @property
    def free_blocks(self) -> int:
        return self._pool.free_blocks

    def open(self, job: Job) -> None:
        job.cache, job.reserved = self._new_cache(self._pool, self._capacity), 0

    def reserve(self, job: Job, length: int) -> bool:
        """Blocks for positions below `length`; False and nothing changed if there are too few."""
        if not job.cache.reserve(length):
            return False
        job.reserved = -(-length // self.block_positions) * self.block_positions
        return True

    def adopt(self, job: Job, blocks: list[Any], length: int) -> bool:
        """Begin with the first `length` positions of `blocks`; False if the block for a copy is lacking."""
        return job.cache.adopt(blocks, length)

    def cut(self, job: Job, length: int) -> None:
        """Forget the positions from `length` on; the job keeps as many blocks as it has reserved."""
        if job.cache.truncate(length) != length or not self.reserve(job, min(job.reserved, self._capacity)):
            raise AssertionError("a cache could not be cut by one position")

    def held(self, job: Job) -> list[Any]:
        """Handles of the blocks below the job's length; their content stays while they live."""
        return job.cache.blocks()

    def close(self, job: Job) -> None:
        """Give up the job's cache; blocks that nobody else holds are free."""
        job.cache.clear()
        job.cache, job.reserved = None, 0

    def trim(self) -> None:
        """Give the memory of free blocks back to the system."""
        self._pool.trim()
