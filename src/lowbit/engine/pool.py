"""The engine's native memory: blocks of keys and values from one pool."""

from __future__ import annotations

from typing import Any

from lowbit.engine.config import EngineConfig
from lowbit.engine.job import Job


class PoolMemory:
    """Blocks of keys and values that the jobs of one engine share (the scheduler's Memory)."""

    def __init__(self, decoder: Any, config: EngineConfig, context: int) -> None:
        from lowbit import _native

        self._native = _native
        self._decoder = decoder
        self.block_positions = 256
        self.block_bytes = _native.KvCache(decoder, self.block_positions).nbytes
        self.blocks = config.blocks(self.block_bytes, self.block_positions, context)
        self._capacity = min(context, self.blocks * self.block_positions)
        self._pool = _native.KvPool(decoder, self.blocks) if hasattr(_native, "KvPool") else None
        self._taken = 0

    @property
    def shares(self) -> bool:
        """Whether a cache can begin with blocks of another."""
        return self._pool is not None

    @property
    def free_blocks(self) -> int:
        return self._pool.free_blocks if self._pool else self.blocks - self._taken

    def open(self, job: Job) -> None:
        if self._pool:
            job.cache = self._native.KvCache(self._pool, self._capacity)
        else:
            job.cache = self._native.KvCache(self._decoder, job.limit)
        job.reserved = 0

    def reserve(self, job: Job, length: int) -> bool:
        """Blocks for positions below `length`; False and nothing changed if there are too few."""
        count = -(-length // self.block_positions)
        if self._pool:
            if not job.cache.reserve(length):
                return False
        else:
            more = count - job.reserved // self.block_positions
            if more > self.free_blocks:
                return False
            self._taken += more
        job.reserved = count * self.block_positions
        return True

    def adopt(self, job: Job, blocks: list[Any], length: int) -> bool:
        if not job.cache.adopt(blocks, length):
            return False
        job.reserved = -(-length // self.block_positions) * self.block_positions
        return True

    def held(self, job: Job) -> list[Any]:
        """Handles of the blocks below the job's length; their content stays while they live."""
        return job.cache.blocks()

    def close(self, job: Job) -> None:
        """Give up the job's cache; blocks that nobody else holds are free."""
        if job.cache is None:
            return
        if self._pool:
            job.cache.clear()
        else:
            self._taken -= job.reserved // self.block_positions
        job.cache, job.reserved = None, 0

    def trim(self) -> None:
        if self._pool:
            self._pool.trim()
