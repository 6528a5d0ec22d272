"""Blocks of keys and values that are counted and hold nothing: the scheduler's memory in a simulation."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lowbit.engine.job import Job

BLOCK_POSITIONS = 256  # as the native pool's


class _Handle:
    """Holds one block for as long as it lives, as the prefix cache's handles of the pool do."""

    __slots__ = ("block", "memory")

    def __init__(self, memory: BlockMemory, block: int) -> None:
        self.memory, self.block = memory, block
        memory.holders[block] += 1

    def __del__(self) -> None:
        self.memory.drop(self.block)


class BlockMemory:
    """See engine.job.Memory. A job's cache is the list of its blocks' numbers."""

    block_positions = BLOCK_POSITIONS

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.holders: Counter[int] = Counter()
        self._free = list(range(blocks))

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def open(self, job: Job) -> None:
        job.cache, job.reserved = [], 0

    def reserve(self, job: Job, length: int) -> bool:
        more = -(-length // BLOCK_POSITIONS) - len(job.cache)
        if more > len(self._free):
            return False
        job.cache += [self._take() for _ in range(more)]
        job.reserved = len(job.cache) * BLOCK_POSITIONS
        return True

    def adopt(self, job: Job, blocks: list[Any], length: int) -> bool:
        whole = length // BLOCK_POSITIONS
        if length % BLOCK_POSITIONS:
            if not self._free:
                return False
            copy = self._take()
        for handle in blocks[:whole]:
            self.holders[handle.block] += 1
            job.cache.append(handle.block)
        if length % BLOCK_POSITIONS:
            job.cache.append(copy)
        return True

    def held(self, job: Job) -> list[Any]:
        return [_Handle(self, block) for block in job.cache[: -(-job.computed // BLOCK_POSITIONS)]]

    def close(self, job: Job) -> None:
        for block in job.cache:
            self.drop(block)
        job.cache, job.reserved = None, 0

    def drop(self, block: int) -> None:
        self.holders[block] -= 1
        if not self.holders[block]:
            self._free.append(block)

    def _take(self) -> int:
        block = self._free.pop()
        self.holders[block] += 1
        return block
