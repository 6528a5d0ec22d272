"""What the serving parts share: servers to measure, streams that run together, and what a process uses."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import process
from context import Bench
from lowbit.measure import load
from lowbit.measure.load_client import Answer, Endpoint, ask
from lowbit.measure.load_plan import Prompts
from lowbit.plan.trace import Request
from peers import llama_server
from peers.llama_server import Server

OURS, THEIRS = "lowbit", "llama-server"


@dataclass(frozen=True)
class Running:
    """A server that answers, how to ask it, and prompts of known length for it."""

    server: Server
    target: load.Target
    prompts: Prompts

    def prompt(self, tokens: int, seed: int = 0, shared: int = 0) -> str:
        """`tokens` tokens of text, of which the first `shared` are the same for every seed."""
        made = load.with_shared_prefix(self.prompts, shared)
        return made.text(seed, Request(tokens, 1))

    def together(self, asks: Sequence[tuple[float, str, int]], every: float = 0.0) -> list[Answer]:
        """Stream the answers of [(seconds from now, prompt, tokens)], all at the same time.

        every: see load_client.ask.
        """

        async def one(at: float, prompt: str, tokens: int, start: float) -> Answer:
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            body = self.target.request(prompt, tokens)
            return await ask(self.target.endpoint, self.target.route, body, every=every)

        async def answered() -> list[Answer]:
            start = time.perf_counter()
            return await asyncio.gather(*(one(*each, start) for each in asks))

        answers = asyncio.run(answered())
        failures = sorted({answer.failure for answer in answers if answer.failure})
        if failures:
            raise process.CommandError(
                f"a server did not answer: {', '.join(failures)}; {self.server.said()}"
            )
        return answers

    def stats(self) -> dict[str, Any]:
        """The first model's entry of lowbit's `/stats`."""
        with urllib.request.urlopen(f"{self.server.url}/stats", timeout=10) as answer:
            return dict(json.load(answer)["models"][0])


@contextmanager
def started(server: Server, chat: bool = False) -> Iterator[Running]:
    """The server, asked once or twice; stopped at the end."""
    with server:
        target, prompts = load.prepare(Endpoint.parse(server.url), chat=chat)
        # Greedy, so that answers can be compared.
        yield Running(server, replace(target, body={"temperature": 0}), prompts)


def ours(model: Path, *options: str | int) -> Server:
    """`lowbit serve` from this working tree, with all threads."""
    command = [sys.executable, "-m", "lowbit.cli", "serve", str(model), *map(str, options)]
    path = os.pathsep.join([str(process.ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return Server(command, "/ready", {"PYTHONPATH": path})


def theirs(bench: Bench, model: Path, *, slots: int = 8, context: int = 1024) -> Server:
    """llama-server with the same model in Q4_0; no prompt is in its cache unless it was asked before."""
    assert bench.server is not None
    return llama_server.start(bench.server, model, threads=bench.threads[0], slots=slots, context=context)


def process_tree(pid: int) -> list[int]:
    """The process and all that came from it (Linux)."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all that came from it."""
    ticks = 0
    for each in process_tree(pid):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int:
    """Resident bytes of a process and all that came from it; what they share counts once for each."""
    pages = sum(int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in process_tree(pid))
    return pages * os.sysconf("SC_PAGE_SIZE")


def gaps(answers: Sequence[Answer], since: float, until: float) -> list[float]:
    """Seconds between arrivals of one answer, of those gaps that end within (since, until]."""
    found = []
    for answer in answers:
        for before, after in zip(answer.arrivals, answer.arrivals[1:]):
            if since < after <= until:
                found.append(after - before)
    return found


def step_seconds(short: Sequence[Answer], long: Sequence[Answer]) -> float:
    """Seconds of a step of all streams: what longer answers took beyond shorter ones.

    Arrivals would not tell: tokens of several steps share one, and how many is not said.
    """

    def taken(answers: Sequence[Answer]) -> float:
        return max(answer.ended for answer in answers) - min(answer.started for answer in answers)

    further = min(answer.tokens for answer in long) - max(answer.tokens for answer in short)
    if further < 1:
        raise process.CommandError("step_seconds: long answers no longer than short ones; ask for more")
    return (taken(long) - taken(short)) / further
