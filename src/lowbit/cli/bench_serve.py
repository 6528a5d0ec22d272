"""`lowbit bench serve`: load on a server that speaks the OpenAI protocol, and how long its users wait."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lowbit.cli import options, output
from lowbit.errors import RequestError

READY_SECONDS, STOP_SECONDS = 300.0, 10.0  # of `lowbit serve`, for a model


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", metavar="URL|MODEL", help="http://host:port of a server, or a model to serve meanwhile"
    )
    when = parser.add_argument_group("when requests come (default: --concurrency 8)")
    when.add_argument("--concurrency", type=options.positive, metavar="N", help="so many at once, always")
    when.add_argument("--rate", type=_positive, metavar="R", help="at random, R per second on average")
    when.add_argument(
        "--trace", type=Path, metavar="FILE", help="as in a trace of Azure (CSV) or Mooncake (JSON)"
    )
    when.add_argument("--scale", type=_positive, default=1.0, metavar="S", help="a trace S times as fast")
    what = parser.add_argument_group("what they ask")
    what.add_argument(
        "--requests", type=options.positive, metavar="N", help="default 64; of a trace: the first N"
    )
    what.add_argument(
        "--prompt-tokens", default="200", metavar="N", help="N or LOW-HIGH (default %(default)s)"
    )
    what.add_argument(
        "--answer-tokens", default="64", metavar="N", help="N or LOW-HIGH (default %(default)s)"
    )
    what.add_argument(
        "--length-scale", type=_positive, default=1.0, metavar="S", help="lengths of a trace, S times as long"
    )
    what.add_argument(
        "--longest", type=options.positive, metavar="N", help="leave out requests of a trace with more tokens"
    )
    what.add_argument(
        "--shared-prefix", type=options.positive, metavar="N", help="all prompts begin with the same N tokens"
    )
    what.add_argument(
        "--abandon", type=float, default=0.0, metavar="F", help="share of clients that leave early"
    )
    what.add_argument("--chat", action="store_true", help="/chat/completions instead of /completions")
    what.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    what.add_argument("--api-key", metavar="KEY")
    what.add_argument(
        "--body", type=_object, default={}, metavar="JSON", help="more fields for every request"
    )
    what.add_argument("--timeout", type=_positive, default=600.0, metavar="S", help="of one request")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts, lengths and times")
    parser.add_argument(
        "--slo",
        metavar="LIST",
        help="what users want, in seconds: ttft=1,tpot=0.1; reports how many requests got it (goodput)",
    )


def execute(args: argparse.Namespace) -> dict[str, Any]:
    from lowbit.measure import load
    from lowbit.measure.load_client import Endpoint

    requests, left_out = _requests(args)
    goal = _goal(args.slo)
    open_loop = args.rate is not None or args.trace is not None
    with served(args.target) as url, output.Progress("load") as bar:
        target, prompts = load.prepare(
            Endpoint.parse(url, args.api_key),
            model=args.model,
            chat=args.chat,
            body=args.body,
            seed=args.seed,
        )
        result = load.run(
            target,
            load.with_shared_prefix(prompts, args.shared_prefix or 0),
            requests,
            concurrency=None if open_loop else args.concurrency or 8,
            goal=goal,
            timeout=args.timeout,
            abandon=args.abandon,
            progress=bar.update,
        )
    return {"target": args.target, "model": target.model, "left_out": left_out, **result}


def _requests(args: argparse.Namespace) -> tuple[list[Any], int]:
    from lowbit.measure import load_plan
    from lowbit.plan import trace

    if sum(value is not None for value in (args.concurrency, args.rate, args.trace)) > 1:
        raise RequestError("bench serve: --concurrency, --rate and --trace exclude one another; give one")
    if args.trace is not None:
        return trace.replay(
            args.trace, scale=args.scale, lengths=args.length_scale, longest=args.longest, count=args.requests
        )
    lengths = [load_plan.Span.parse(text) for text in (args.prompt_tokens, args.answer_tokens)]
    return load_plan.uniform(args.requests or 64, lengths[0], lengths[1], args.seed, args.rate), 0


def _goal(text: str | None) -> Any:
    """`ttft=1,tpot=0.1` as a Goal."""
    from lowbit.measure.load import Goal

    if text is None:
        return None
    names = {"ttft": "first_token_seconds", "tpot": "token_seconds"}
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            found[names[name.strip()]] = float(value)
        except (KeyError, ValueError):
            raise RequestError(f"--slo {text!r}: {part!r} is neither ttft=SECONDS nor tpot=SECONDS") from None
    return Goal(**found)


@contextlib.contextmanager
def served(target: str) -> Iterator[str]:
    """The address of a running server: what was given, or that of one that serves the model meanwhile."""
    if target.startswith(("http://", "https://")):
        yield target
        return
    from lowbit.cli.pull import locate

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "lowbit.cli", "serve", str(locate(target)), "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            _wait_until_ready(server, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    from lowbit.measure.load_client import Endpoint, get

    until = time.monotonic() + READY_SECONDS
    while asyncio.run(get(Endpoint("127.0.0.1", port, base=""), "/ready")) is None:
        ended = server.poll() is not None
        if ended or time.monotonic() > until:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
            why = f"ended: {said[-1] if said else 'it said nothing'}" if ended else "is not ready in time"
            raise RequestError(f"bench serve: `lowbit serve` {why}")
        time.sleep(0.05)


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    r = result
    rows = [("requests", _counts(r)), ("seconds", f"{r['seconds']:.2f}")]
    rows += [
        (
            "throughput",
            f"{r['answer_tokens_per_second']:,.1f} tokens/s of answers, {r['total_tokens_per_second']:,.1f} "
            f"with prompts, {r['requests_per_second']:.2f} requests/s",
        ),
        ("tokens", f"{r['prompt_tokens']:,} in ({r['cached_tokens']:,} cached), {r['answer_tokens']:,} out"),
    ]
    if "goal" in r:
        share = f"{r['goodput_fraction']:.0%} of the requests were as fast as --slo {args.slo}"
        rows.append(("goodput", f"{r['goodput_requests_per_second']:.2f} requests/s; {share}"))
    rows.append(
        ("client", f"{r['client_cpu_fraction']:.1%} of a CPU, at most {_ms(r['late_seconds'])} ms late")
    )
    sys.stdout.write(output.pairs(rows))
    times = [
        ("to the first token", r["first_token_seconds"]),
        ("per token after it", r["token_seconds"]),
        ("between arrivals", r["inter_token_seconds"]),
        ("whole request", r["request_seconds"]),
    ]
    columns = ("mean", "p50", "p95", "p99", "max")
    table = [(name, *(_ms(found[c]) for c in columns)) for name, found in times if found]
    if table:
        sys.stdout.write("\n" + output.table(("milliseconds", *columns), table, right={1, 2, 3, 4, 5}))
    if r["tokens_counted_by"] == "pieces":
        sys.stdout.write("\nThe server tells no token counts: pieces of text were counted instead.\n")
    elif r["tokens_per_arrival"] and r["tokens_per_arrival"] > 1.05:
        sys.stdout.write(f"\n{r['tokens_per_arrival']:.2f} tokens came together on average.\n")


def _counts(r: dict[str, Any]) -> str:
    parts = [f"{r['completed']:,} of {r['requests']:,} answered"]
    parts += [f"{r['left']:,} left by us"] if r["left"] else []
    parts += [f"{count:,} failed: {name}" for name, count in r["failures"].items()]
    parts += [f"{r['left_out']:,} of the trace left out for their length"] if r["left_out"] else []
    return ", ".join(parts)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.1f}"


def _positive(text: str) -> float:
    """An argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _object(text: str) -> dict[str, Any]:
    """An argparse type: a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object")
    return value
