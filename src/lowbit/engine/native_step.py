"""The native calls of the engine: one step for all sequences, and the memory of their keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowbit.engine.config import EngineConfig
from lowbit.engine.job import Job


@dataclass(slots=True)
class StepRun:
    """What a step found out about one run: see Decoder.step."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    scores: np.ndarray | None = None
    score_tops: list[list[tuple[int, float]]] = field(default_factory=list)
    failed: bool = False


def step(
    decoder: Any,
    tokens: list[int],
    caches: list[Any],
    counts: list[int],
    samplers: list[Any],
    drafts: list[int] | None = None,
    masks: list[np.ndarray | None] | None = None,
    scores: list[int] | None = None,
) -> Sequence[Any]:
    """Append counts[i] of `tokens` to caches[i] and sample after them where samplers[i] is not None.

    drafts[i]: how many of the run's last tokens are guesses; masks[i]: allowed tokens; scores[i]: likeliest
    tokens to report beside the log-probability of each token of the run after its first, -1 for none.
    """
    batch = np.array(tokens, dtype=np.int32)
    if hasattr(decoder, "step"):
        return decoder.step(batch, caches, counts, samplers, drafts, masks, scores)
    runs: list[StepRun] = []
    start = 0
    sampling: list[int] = []
    for i, count in enumerate(counts):
        run = StepRun()
        runs.append(run)
        if samplers[i] is None:
            decoder.logits(batch[start : start + count], [caches[i]], [count])
        else:
            sampling.append(i)
        start += count
    if sampling:
        ends = np.cumsum(counts)
        part = np.concatenate([batch[ends[i] - counts[i] : ends[i]] for i in sampling])
        ids, logprobs = decoder.sample(
            part, *([column[i] for i in sampling] for column in (caches, counts, samplers))
        )
        for i, token, logprob in zip(sampling, ids.tolist(), logprobs.tolist()):
            runs[i].ids, runs[i].logprobs, runs[i].tops = [token], [logprob], [samplers[i].top()]
    return runs


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
