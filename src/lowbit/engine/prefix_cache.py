"""Keys and values of beginnings that several requests have in common.

Tokens are hashed in pages of 64, each page together with the hash before it (BLAKE2b with a secret key of
this engine), so that a hash stands for a whole beginning. The first link names the model, the format of its
keys and values, and the tenant: nobody finds out what another tenant has asked. A hash leads to a node, one
block of 256 positions of which the node knows one to four pages. A new request takes whole blocks as they
are and a copy of a partial last one.

Pages are registered as they are computed. While a job still writes a block, the node refers to the job; the
block itself is held only once it is full or the job ends, since a block with two holders is copied before it
is written again. Nodes whose block no running job holds are evicted, the least recently used first and of
one chain the deepest first; each gives one block back.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from hashlib import blake2b
from typing import Any

from lowbit.engine.job import Job, Memory

PAGE = 64  # tokens


class Node:
    """A block and the beginnings that it completes: hashes of its pages, first to last."""

    __slots__ = ("block", "holders", "index", "pages", "writer")

    def __init__(self, index: int, writer: Job) -> None:
        self.index = index  # of the block in its sequence
        self.pages: list[bytes] = []
        self.holders = 0  # running jobs whose cache holds the block
        self.block: Any = None  # the handle; None while `writer` still writes it
        self.writer: Job | None = writer


class PrefixCache:
    """Beginnings by hash. All calls come from the scheduler."""

    def __init__(self, salt: str, block_positions: int = 256, key: bytes | None = None) -> None:
        """salt: model and format of keys and values. key: 1 to 64 secret bytes; None: random."""
        self._salt = salt
        self._key = key or os.urandom(32)
        self._block_pages = block_positions // PAGE
        self._nodes: dict[bytes, Node] = {}
        self._idle: OrderedDict[Node, None] = OrderedDict()  # without holders; the first is evicted next
        self._coming: dict[bytes, Job] = {}  # pages that running jobs are going to compute
        self.hit_tokens = 0
        self.asked_tokens = 0

    @property
    def idle_blocks(self) -> int:
        """Blocks that eviction would free."""
        return len(self._idle)

    def match(self, job: Job, memory: Memory) -> tuple[list[Any], int]:
        """(blocks, positions) of the longest known beginning; the last token is always left to compute.

        The nodes of the whole blocks are held until `release`.
        """
        known = self._known_pages(job)
        whole, part = divmod(known, self._block_pages)
        nodes = [self._nodes[job.pages[(i + 1) * self._block_pages - 1]] for i in range(whole)]
        blocks = [node.block for node in nodes]
        for node in nodes:
            self._hold(job, node)
        if part:
            last = self._nodes[job.pages[known - 1]]
            blocks.append(self._block_of(last, memory))
            if last in self._idle:
                self._idle.move_to_end(last)
        return blocks, known * PAGE

    def started(self, job: Job, length: int) -> None:
        """The job computes from position `length` on: others with the same beginning may wait for it."""
        if not job.preemptions:
            self.hit_tokens += length
            self.asked_tokens += len(job.tokens)
        job.registered_pages = length // PAGE
        self._hash(job, self._whole_pages(job))
        for page in job.pages[length // PAGE :]:
            self._coming.setdefault(page, job)

    def in_flight(self, job: Job) -> bool:
        """Whether a running job of no lower priority is about to compute the next page that `job` needs."""
        known = self._known_pages(job)
        if known >= self._whole_pages(job):
            return False
        other = self._coming.get(job.pages[known])
        return other is not None and other.priority >= job.priority

    def next_page_end(self, job: Job) -> int:
        """Positions at which `register` has something to do."""
        return (job.registered_pages + 1) * PAGE

    def register(self, job: Job, memory: Memory) -> None:
        """Make the job's complete pages known."""
        complete = job.computed // PAGE
        self._hash(job, complete)
        fresh = False
        for i in range(job.registered_pages, complete):
            page = job.pages[i]
            if self._coming.get(page) is job:
                del self._coming[page]
            node = self._nodes.get(page)
            if node is None:
                node = self._node_for(job, i)
                node.pages.append(page)
                self._nodes[page] = node
            elif node in self._idle:
                self._idle.move_to_end(node)
            fresh |= node.writer is job and (i + 1) % self._block_pages == 0
        job.registered_pages = complete
        if fresh:
            self._take_over(job, memory, complete // self._block_pages)

    def release(self, job: Job, memory: Memory) -> None:
        """The job stops: its blocks stay known as long as there is room."""
        for page in job.pages[job.registered_pages :]:
            if self._coming.get(page) is job:
                del self._coming[page]
        if any(node.writer is job for node in job.nodes):
            self._take_over(job, memory, None)
        for node in sorted(job.nodes, key=lambda node: -node.index):
            node.holders -= 1
            if node.holders == 0 and node.pages:
                self._idle[node] = None
        job.nodes = []
        job.registered_pages = 0

    def evict(self, count: int) -> bool:
        """Free up to `count` blocks; False if there was none to free."""
        freed = 0
        while self._idle and freed < count:
            self._forget(self._idle.popitem(last=False)[0])
            freed += 1
        return freed > 0

    # ---- Inside

    def _hash(self, job: Job, pages: int) -> None:
        """Extend the job's chain to `pages` pages."""
        chain = job.pages
        if len(chain) >= pages:
            return
        if chain:
            last = chain[-1]
        else:
            first = f"{self._salt}\0{job.tenant}".encode(errors="surrogatepass")
            last = blake2b(first, digest_size=16, key=self._key).digest()
        for i in range(len(chain), pages):
            tokens = array("i", job.tokens[i * PAGE : (i + 1) * PAGE]).tobytes()
            last = blake2b(last + tokens, digest_size=16, key=self._key).digest()
            chain.append(last)

    def _whole_pages(self, job: Job) -> int:
        return (len(job.tokens) - 1) // PAGE

    def _known_pages(self, job: Job) -> int:
        """Pages of the longest known beginning whose blocks are all there."""
        limit = self._whole_pages(job)
        self._hash(job, limit)
        known = 0
        while known < limit and job.pages[known] in self._nodes:
            known += 1
        return known

    def _node_for(self, job: Job, page: int) -> Node:
        """The node that page number `page` of the job joins: its own for that block, or one it continues."""
        index, within = divmod(page, self._block_pages)
        for node in reversed(job.nodes):
            if node.index == index and node.writer is job:
                return node
        node = Node(index, job)
        if within:
            # A node that ends where this page begins holds a beginning of this block: the longer replaces it.
            before = self._nodes.get(job.pages[page - 1])
            if before is not None and before in self._idle and before.pages[-1] == job.pages[page - 1]:
                del self._idle[before]
                node.pages, before.pages, before.block = before.pages, [], None
                for known in node.pages:
                    self._nodes[known] = node
        self._hold(job, node)
        return node

    def _hold(self, job: Job, node: Node) -> None:
        node.holders += 1
        self._idle.pop(node, None)
        job.nodes.append(node)

    def _block_of(self, node: Node, memory: Memory) -> Any:
        if node.writer is None:
            return node.block
        return memory.held(node.writer)[node.index]

    def _take_over(self, job: Job, memory: Memory, full_blocks: int | None) -> None:
        """Hold the blocks that the job has finished writing (None: all)."""
        blocks = memory.held(job)
        for node in job.nodes:
            if node.writer is job and (full_blocks is None or node.index < full_blocks):
                node.block, node.writer = blocks[node.index], None

    def _forget(self, node: Node) -> None:
        for page in node.pages:
            del self._nodes[page]
        node.pages = []
        node.block = None
