"""`make bench`: lowbit against its targets and against other programs on this machine, in one run.

Correctness comes first (perplexity, bytes), then speed. Prints a table, writes
bench/results/<date>-<cpu>.json and draws the pictures in docs/. `--render` puts the newest result into the
README. docs/benchmarks.md says how each figure is made.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # measure this tree, installed or not

import context  # noqa: E402
import machine  # noqa: E402
import pictures  # noqa: E402
import process  # noqa: E402
import report  # noqa: E402
import sections  # noqa: E402
import serving_page  # noqa: E402
import targets  # noqa: E402
from peers import llama_cpp, openvino_peer  # noqa: E402

RESULTS = ROOT / "bench" / "results"
TEXTS = (
    ROOT.parent / "shared" / "data" / "text" / "wiki.test.raw",
    ROOT / "src" / "lowbit" / "measure" / "demo.txt",
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens; writes no result file")
    parser.add_argument("--only", action="append", choices=list(sections.SECTIONS), help="repeatable")
    parser.add_argument("--no-peers", action="store_true", help="do not install or run other programs")
    parser.add_argument("--threads", default="2,1", help="numbers of threads, best first (default 2,1)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds after the warm-up (default 5)")
    parser.add_argument("--text", type=Path, help="text for perplexity (default wiki.test.raw if present)")
    parser.add_argument("--render", nargs="?", const="", metavar="RESULT", help="only README and pictures")
    return parser.parse_args(arguments)


def peer_or_reason(name: str, make: Callable[[], Any], missing: dict[str, str]) -> Any:
    """What `make` makes, or None, with the reason in `missing`."""
    try:
        return make()
    except llama_cpp.PeerError as error:
        say(f"going on without {name}: {error}")
        missing[name] = str(error).replace(str(ROOT), "")
        return None


def prepare(options: argparse.Namespace) -> context.Bench:
    """Everything that the chosen parts need; other programs are built or installed on first use."""
    cache, missing = ROOT / ".cache", dict[str, str]()
    makers: dict[str, Callable[[], Any]] = {
        sections.LLAMA: lambda: llama_cpp.build(cache, say=say),
        sections.LLAMA_AVX2: lambda: llama_cpp.build(cache, say=say, variant="avx2"),
        sections.OPENVINO: lambda: openvino_peer.build(cache, say=say),
        sections.LLAMA_SERVER: lambda: llama_cpp.build(cache, say=say, variant="server"),
    }
    chosen = options.only or list(sections.SECTIONS)
    wanted = {name for part in chosen for name in sections.NEEDS.get(part, ())}
    peers: dict[str, Any] = dict.fromkeys(makers)
    for name, make in makers.items():
        if options.no_peers:
            missing[name] = "switched off by --no-peers"
        elif name in wanted:
            peers[name] = peer_or_reason(name, make, missing)
    return context.Bench(
        cache=cache,
        peer=peers[sections.LLAMA],
        avx2=peers[sections.LLAMA_AVX2],
        openvino=peers[sections.OPENVINO],
        server=peers[sections.LLAMA_SERVER],
        missing=missing,
        threads=tuple(int(n) for n in options.threads.split(",")),
        rounds=options.rounds or (2 if options.quick else 5),
        text=options.text or next(path for path in TEXTS if path.exists()),
        tokens=5_000 if options.quick else 50_000,
        say=say,
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen sections. A section that fails is reported in its place and the others go on."""
    bench = prepare(options)
    peers = [peer for peer in (bench.peer, bench.avx2, bench.openvino, bench.server) if peer is not None]
    result: dict[str, Any] = {
        "date": machine.now(),
        **machine.commit(),
        "machine": machine.describe(),
        "peers": [peer.describe() for peer in peers],
        "missing": bench.missing,
        "busy_cpus": 0.0,
        "rounds": bench.rounds,
        "threads": list(bench.threads),
        "quick": options.quick,
        "seconds": {},
        "rows": [],
        "sections": {},
        "errors": {},
    }
    for name in options.only or sections.SECTIONS:
        busy = machine.busy_cpus()
        result["busy_cpus"] = max(busy, result["busy_cpus"])
        if busy > report.BUSY:
            say(f"other programs are using {busy:.1f} CPUs: speeds will be low and unsteady")
        say(f"{name}:")
        started = time.perf_counter()
        try:
            rows, data = sections.SECTIONS[name](bench)
        except (process.CommandError, llama_cpp.PeerError) as error:
            say(f"  failed: {error}")
            result["errors"][name] = str(error)
            rows, data = [targets.row(name, None, "", "-", False, f"failed: {error}")], None
        result["rows"] += [{"heading": sections.HEADINGS[name], "part": name, **row} for row in rows]
        result["sections"][name] = data
        result["seconds"][name] = round(time.perf_counter() - started, 1)
        say(f"  {result['seconds'][name]:.0f} s")
    return result


def render(chosen: str) -> int:
    """Rewrite the README between the markers, and the pictures, from one result."""
    page = ROOT / "README.md"
    try:
        source = Path(chosen) if chosen else report.newest(RESULTS)
        result = json.loads(source.read_text())
        page.write_text(report.render(page.read_text(encoding="utf-8"), result), encoding="utf-8")
    except (report.ReportError, OSError) as error:
        say(f"{error}")
        return 1
    say(f"README.md: table of {source.name}")
    for path in pictures.draw(result, ROOT / "docs", say):
        say(f"{path.relative_to(ROOT)}")
    render_serving()
    return 0


def render_serving() -> None:
    """Rewrite the tables of docs/serving.md from the serving parts as they were last measured."""
    page, kept = ROOT / "docs" / serving_page.PAGE, serving_page.read(RESULTS)
    page.write_text(
        serving_page.render(page.read_text(encoding="utf-8"), kept, ROOT / "tests"), encoding="utf-8"
    )
    say(f"docs/{page.name}: tables of {serving_page.RESULT}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    options = parse()
    if options.render is not None:
        return render(options.render)
    result = measure(options)
    report.print_table(result)
    if not options.quick and serving_page.keep(result, sections.SERVING, RESULTS):
        render_serving()
    if options.quick or options.only:
        say("a partial run writes no result file but that of the serving parts")
    else:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / machine.result_name(result["date"], str(result["machine"]["cpu"]))
        path.write_text(json.dumps(result, indent=1) + "\n")
        say(f"wrote {path.relative_to(ROOT)}")
        pictures.draw(result, ROOT / "docs", say)
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
