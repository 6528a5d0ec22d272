"""`make bench`: lowbit against its targets and against llama.cpp on this machine, in one run.

Correctness comes first (perplexity, bytes), then speed. Prints a table and writes
bench/results/<date>-<cpu>.json. `--render` puts the newest result into the README. docs/benchmarks.md
says how each figure is made.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # measure this tree, installed or not

import machine  # noqa: E402
import process  # noqa: E402
import report  # noqa: E402
import sections  # noqa: E402
from peers import llama_cpp  # noqa: E402

RESULTS = ROOT / "bench" / "results"
TEXTS = (
    ROOT.parent / "shared" / "data" / "text" / "wiki.test.raw",
    ROOT / "src" / "lowbit" / "measure" / "demo.txt",
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and tokens; writes no result file")
    parser.add_argument("--only", action="append", choices=list(sections.SECTIONS), help="repeatable")
    parser.add_argument("--no-peers", action="store_true", help="do not build or run llama.cpp")
    parser.add_argument("--threads", default="2,1", help="numbers of threads, best first (default 2,1)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds after the warm-up (default 5)")
    parser.add_argument("--text", type=Path, help="text for perplexity (default wiki.test.raw if present)")
    parser.add_argument("--render", nargs="?", const="", metavar="RESULT", help="only fill the README")
    return parser.parse_args(arguments)


def find_peer(wanted: bool) -> tuple[llama_cpp.LlamaCpp | None, str]:
    """The built peer, or None and the reason."""
    if not wanted:
        return None, "switched off by --no-peers"
    try:
        return llama_cpp.build(ROOT / ".cache", say=say), ""
    except llama_cpp.PeerError as error:
        say(f"going on without llama.cpp: {error}")
        return None, str(error)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen sections. A section that fails is reported in its place and the others go on."""
    peer, missing = find_peer(not options.no_peers)
    text = options.text or next(path for path in TEXTS if path.exists())
    bench = sections.Bench(
        cache=ROOT / ".cache",
        peer=peer,
        threads=tuple(int(n) for n in options.threads.split(",")),
        rounds=options.rounds or (2 if options.quick else 5),
        text=text,
        tokens=5_000 if options.quick else 50_000,
        say=say,
    )
    result: dict[str, Any] = {
        "date": machine.now(),
        **machine.commit(),
        "machine": machine.describe(),
        "peer": peer.describe() if peer else None,
        "peer_missing": missing,
        "busy_cpus": 0.0,
        "rounds": bench.rounds,
        "threads": list(bench.threads),
        "quick": options.quick,
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
            rows, data = [sections.row(name, None, "", "-", False, f"failed: {error}")], None
        result["rows"] += rows
        result["sections"][name] = data
        say(f"  {time.perf_counter() - started:.0f} s")
    return result


def render(chosen: str) -> int:
    """Rewrite the README between the markers from one result."""
    page = ROOT / "README.md"
    try:
        source = Path(chosen) if chosen else report.newest(RESULTS)
        page.write_text(report.render(page.read_text(encoding="utf-8"), json.loads(source.read_text())))
    except (report.ReportError, OSError) as error:
        say(f"{error}")
        return 1
    say(f"README.md: table of {source.name}")
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    options = parse()
    if options.render is not None:
        return render(options.render)
    result = measure(options)
    report.print_table(result)
    if options.quick or options.only:
        say("a partial run writes no result file")
    else:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / machine.result_name(result["date"], str(result["machine"]["cpu"]))
        path.write_text(json.dumps(result, indent=1) + "\n")
        say(f"wrote {path.relative_to(ROOT)}")
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
