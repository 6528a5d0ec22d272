"""The parts about serving: SmolLM2 in four bits behind HTTP, beside llama.cpp's server in the same run."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import process
import serving
import spread
import targets
from context import Bench
from lowbit.measure import load
from lowbit.measure.load_plan import Span, uniform
from serving import OURS, THEIRS, Running
from targets import SMALL, Row, at_least, at_most

DEFAULT = "lowbit with prompt lookup"  # as `lowbit serve` starts
CLIENTS, PROMPT, ANSWER = 8, 200, 64
STREAMS, STREAM_TOKENS, LONG_PROMPT = 4, 400, 4000
LONGER = 256  # tokens of eight streams that are timed
SHARED, TAIL, SHARERS = 1000, 20, 8
IDLE_SECONDS = 10.0
READ_SECONDS = 0.05  # how often the clients look, where their own time shall not count
SOAK_KV_GB = 0.25
SOAK_REQUESTS, SOAK_WARM_UP, SOAK_CLIENTS, SOAK_LEAVE = 1000, 1000, 32, 0.3


def servers(bench: Bench, stack: ExitStack, context: int, *options: str) -> dict[str, Running]:
    """lowbit and, if it could be built, llama-server, each with its four bits and without speculation."""
    model = bench.ours(SMALL)
    found = {
        OURS: stack.enter_context(serving.started(serving.ours(model, "--speculation", "none", *options)))
    }
    theirs = bench.theirs(SMALL)
    if bench.server is not None and theirs is not None:
        server = serving.theirs(bench, theirs, slots=CLIENTS, context=context)
        found[THEIRS] = stack.enter_context(serving.started(server))
    return found


def load_section(bench: Bench) -> tuple[list[Row], Any]:
    """Eight clients at once, in turns: lowbit, llama-server, lowbit, .. ; new prompts in every round."""
    rates: dict[str, list[float]] = {}
    firsts: dict[str, list[float]] = {}
    runs: dict[str, list[Any]] = {}
    with ExitStack() as stack:
        running = servers(bench, stack, 512)
        running[DEFAULT] = stack.enter_context(serving.started(serving.ours(bench.ours(SMALL))))
        for turn in range(bench.rounds + 1):
            for label, one in running.items():
                requests = uniform(2 * CLIENTS, Span(PROMPT, PROMPT), Span(ANSWER, ANSWER), turn)
                prompts = type(one.prompts)(turn, one.prompts.per_word, one.prompts.fixed)
                found = load.run(one.target, prompts, requests, concurrency=CLIENTS)
                if found["failures"]:
                    raise process.CommandError(f"{label}: {found['failures']}; {one.server.said()}")
                if turn:
                    rates.setdefault(label, []).append(found["answer_tokens_per_second"])
                    firsts.setdefault(label, []).append(found["first_token_seconds"]["p95"])
                    runs.setdefault(label, []).append(found)
                    bench.say(f"  {label}: {rates[label][-1]:.0f} tokens/s, first {firsts[label][-1]:.3f} s")
    name = f"{CLIENTS} clients, {PROMPT}-token prompts, {ANSWER}-token answers:"
    why = bench.missing.get("llama-server", "")
    if THEIRS not in rates:
        return [
            at_least(f"{name} tokens/s against llama-server", None, "x", targets.SERVING_RATE, why_not=why),
            at_most(f"{name} p95 to first token", None, "x", targets.SERVING_FIRST, why_not=why),
        ], runs
    rate, first = spread.ratio(rates[OURS], rates[THEIRS]), spread.ratio(firsts[OURS], firsts[THEIRS])
    told = [f"{median(rates[label]):.0f}" for label in (OURS, THEIRS)]
    waits = [f"{1000 * median(firsts[label]):.0f}" for label in (OURS, THEIRS)]
    rows = [
        at_least(
            f"{name} tokens/s against llama-server", rate["median"], "x", targets.SERVING_RATE,
            f"{told[0]} against {told[1]} tokens/s; rounds {rate['low']:.2f} to {rate['high']:.2f}; "
            f"as started by default, with prompt lookup: {median(rates[DEFAULT]):.0f}",
        ),
        at_most(
            f"{name} p95 to first token against llama-server", first["median"], "x", targets.SERVING_FIRST,
            f"{waits[0]} against {waits[1]} ms; rounds {first['low']:.2f} to {first['high']:.2f}",
        ),
    ]  # fmt: skip
    return rows, runs


def arrival_section(bench: Bench) -> tuple[list[Row], Any]:
    """What running streams feel of a long prompt: p95 of their gaps while it is read, over that without."""
    data: dict[str, Any] = {}
    with ExitStack() as stack:
        for label, one in servers(bench, stack, 5120, "--stream-ms", "0").items():
            one.together([(0.0, one.prompt(100, 1), 8)])
            series = [stretch(one, turn) for turn in range(2 if label == OURS else 1)]
            data[label] = {key: median(each[key] for each in series) for key in series[0]}
            bench.say(f"  {label}: {data[label]}")
    found = data[OURS]
    note = f"{1000 * found['with']:.1f} against {1000 * found['without']:.1f} ms; the prompt took "
    note += f"{found['first']:.2f} s"
    if THEIRS in data:
        note += f"; llama-server {data[THEIRS]['with'] / data[THEIRS]['without']:.1f}x, longest gap "
        note += (
            f"{data[THEIRS]['longest']:.2f} s (lowbit {found['longest']:.2f}), {data[THEIRS]['first']:.2f} s"
        )
    measure = f"p95 between tokens of {STREAMS} streams while a {LONG_PROMPT:,}-token prompt arrives, of idle"
    return [at_most(measure, found["with"] / found["without"], "x", targets.STRETCH, note)], data


def stretch(one: Running, turn: int) -> dict[str, float]:
    """Seconds: p95 gap of streams without and with a long prompt, the longest gap, its first token."""

    def streams(seed: int) -> list[tuple[float, str, int]]:
        return [(0.0, one.prompt(50, seed + i), STREAM_TOKENS) for i in range(STREAMS)]

    alone = one.together(streams(1000 * turn + 100))
    since = max(answer.arrivals[0] for answer in alone)
    until = min(answer.arrivals[-1] for answer in alone)
    quiet = serving.gaps(alone, since, until)
    # The long prompt comes when a fifth of the answers is out.
    long = (0.2 * (until - since), one.prompt(LONG_PROMPT, 1000 * turn + 300), 4)
    *others, reader = one.together([*streams(1000 * turn + 200), long])
    busy = serving.gaps(others, reader.started, reader.arrivals[0])
    return {
        "without": float(np.percentile(quiet, 95)),
        "with": float(np.percentile(busy, 95)),
        "longest": max(busy),
        "first": reader.arrivals[0] - reader.started,
        "gaps": float(len(busy)),
    }


def prefix_section(bench: Bench) -> tuple[list[Row], Any]:
    """Eight requests at once that share 1,000 tokens, after one that read them; the same without cache."""
    model, waits = bench.ours(SMALL), {}
    for label, options in (("cached", ()), ("without", ("--no-prefix-cache",))):
        with serving.started(serving.ours(model, *options)) as one:
            series = []
            for turn in range(min(bench.rounds, 3)):
                prompts = [one.prompt(SHARED + TAIL, 50 + 10 * turn + i, SHARED) for i in range(SHARERS + 1)]
                one.together([(0.0, prompts[0], 4)])
                answers = one.together([(0.0, prompt, 4) for prompt in prompts[1:]])
                first = [answer.arrivals[0] - answer.started for answer in answers]
                hits = [answer.cached_tokens or 0 for answer in answers]
                series.append({"first_token_seconds": float(np.mean(first)), "cached_tokens": min(hits)})
            waits[label] = series
    means = {label: median(each["first_token_seconds"] for each in series) for label, series in waits.items()}
    note = f"mean {1000 * means['cached']:.0f} against {1000 * means['without']:.0f} ms; "
    note += f"{waits['cached'][-1]['cached_tokens']} tokens from the cache"
    measure = (
        f"{SHARERS} requests with {SHARED:,} tokens in common: to first token, faster than without cache"
    )
    return [at_least(measure, means["without"] / means["cached"], "x", targets.PREFIX, note)], waits


def overhead_section(bench: Bench) -> tuple[list[Row], Any]:
    """Seconds per token of eight streams over HTTP beside the bare native step, in turns; then idle CPU."""
    model = bench.ours(SMALL)
    bare = BareSteps(model, CLIENTS)
    over_http, reading, steps = [], [], []
    with serving.started(serving.ours(model, "--no-prefix-cache", "--speculation", "none")) as one:
        for turn in range(bench.rounds + 1):
            http = stream_seconds(one, 400 * turn, READ_SECONDS)
            seen = stream_seconds(one, 400 * turn + 200, 0.0)
            alone = bare.seconds(PROMPT + ANSWER, LONGER)
            if turn:
                over_http.append(http)
                reading.append(seen)
                steps.append(alone)
                bench.say(f"  {1000 * http:.2f} ms over HTTP, {1000 * alone:.2f} ms bare")
        time.sleep(1.0)
        before = serving.cpu_seconds(one.server.pid)
        time.sleep(IDLE_SECONDS)
        idle = 100 * (serving.cpu_seconds(one.server.pid) - before) / IDLE_SECONDS
    found = spread.ratio(over_http, steps)
    note = f"{1000 * median(over_http):.2f} against {1000 * median(steps):.2f} ms a step; "
    share = 100 * (median(reading) / median(steps) - 1)
    note += f"{share:.1f}% with a client on the same CPUs that reads every token; "
    note += f"rounds {100 * found['low'] - 100:.1f} to {100 * found['high'] - 100:.1f}%"
    rows = [
        at_most(
            f"Python and HTTP per generated token, {CLIENTS} streams, of the step",
            100 * (float(str(found["median"])) - 1), "%", 100 * targets.OVERHEAD, note,
        ),
        at_most("CPU of an idle server", idle, "%", 100 * targets.IDLE, f"over {IDLE_SECONDS:g} s"),
    ]  # fmt: skip
    return rows, {
        "http_step_seconds": over_http,
        "read_step_seconds": reading,
        "bare_step_seconds": steps,
        "idle_cpu_percent": idle,
    }


def stream_seconds(one: Running, number: int, every: float) -> float:
    """Seconds of a step of eight streams over HTTP; number: of the first prompt, all are new."""
    short, long = (
        one.together(
            [(0.0, one.prompt(PROMPT, number + 50 * part + i), tokens) for i in range(CLIENTS)], every
        )
        for part, tokens in enumerate((ANSWER, ANSWER + LONGER))
    )
    return serving.step_seconds(short, long)


class BareSteps:
    """The native step in a loop of its own: as many sequences, nothing around it."""

    def __init__(self, model: Path, sequences: int):
        import lowbit
        from lowbit.engine import SamplingParameters
        from lowbit.engine.sequence import new_cache, new_sampler

        self.model = lowbit.load(str(model))
        self.caches = [new_cache(self.model.decoder, 2048) for _ in range(sequences)]
        self.samplers = [new_sampler(SamplingParameters()) for _ in range(sequences)]

    def seconds(self, prompt: int, tokens: int) -> float:
        """Mean seconds of a step of all sequences, from `prompt` positions on."""
        count = len(self.caches)
        ids = [1 + i % 1000 for i in range(prompt)]
        for cache in self.caches:
            cache.truncate(0)
            self.model.decoder.logits(ids, [cache], [len(ids)])
        last, ones = np.ones(count, np.int32), [1] * count
        started = time.perf_counter()
        for _ in range(tokens):
            runs = self.model.decoder.step(last, self.caches, ones, self.samplers)
            last = np.array([run.ids[0] for run in runs], np.int32)
        return (time.perf_counter() - started) / tokens


def soak_section(bench: Bench) -> tuple[list[Row], Any]:
    """A thousand requests whose clients leave at random: pages and memory, before and after."""
    # A pool that the prefix cache has filled when the warm-up ends: what grows after it is lost.
    with serving.started(serving.ours(bench.ours(SMALL), "--kv-gb", SOAK_KV_GB)) as one:

        def some(count: int, seed: int) -> dict[str, Any]:
            requests = uniform(count, Span(20, 120), Span(4, 24), seed)
            prompts = type(one.prompts)(seed, one.prompts.per_word, one.prompts.fixed)
            return load.run(one.target, prompts, requests, concurrency=SOAK_CLIENTS, abandon=SOAK_LEAVE)

        def settled() -> dict[str, Any]:
            until = time.monotonic() + 10
            while (now := one.stats()["engine"])["running"] + now["waiting"] and time.monotonic() < until:
                time.sleep(0.05)
            return dict(one.stats()["engine"])

        some(SOAK_WARM_UP, 1)
        settled()
        before = serving.rss_bytes(one.server.pid)
        found = some(SOAK_REQUESTS, 2)
        engine = settled()
        after = serving.rss_bytes(one.server.pid)
    leaked = engine["kv_blocks_used"] - engine["kv_blocks_cached"]
    note = f"{found['left']} left, {found['completed']} answered, failures: {found['failures'] or 'none'}; "
    note += f"{engine['kv_blocks_cached']} blocks in the prefix cache"
    growth = 100 * (after - before) / before
    memory = f"{before / 1e6:.0f} to {after / 1e6:.0f} MB after a warm-up of {SOAK_WARM_UP} requests"
    rows = [
        at_most(f"{SOAK_REQUESTS:,} requests, clients leave at random: leaked blocks", leaked, "", 0, note),
        at_most("Memory after them", growth, "%", 100 * targets.SOAK_GROWTH, memory),
    ]
    return rows, {"load": found, "engine": engine, "rss_before_bytes": before, "rss_after_bytes": after}
