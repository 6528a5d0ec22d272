"""`make bench-methods`: every method at every width, beside other toolkits, in one run.

Prints a table, writes bench/results/methods.json and puts it, with a plot, into docs/methods.md, where
stands how each figure is made. `--render` does only that last step.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # measure this tree, installed or not

import machine  # noqa: E402
import method_cases  # noqa: E402
import method_page  # noqa: E402
import method_rounded  # noqa: E402
import method_run  # noqa: E402
import method_texts  # noqa: E402
import process  # noqa: E402
from method_run import Subject  # noqa: E402
from peers import kquants, toolkits  # noqa: E402

RESULT = ROOT / "bench" / "results" / "methods.json"
DATA = Path(os.environ.get("LOWBIT_BENCH_DATA", ROOT.parent / "shared" / "data"))
STORIES, SMOLLM = "stories15M", "smollm2-135m"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/methods.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", action="append", metavar="GLOB", help="cases METHOD@FORMAT; repeatable")
    parser.add_argument("--model", action="append", choices=[STORIES, SMOLLM], help="repeatable")
    parser.add_argument("--data", type=Path, default=DATA, help="weights and texts (default %(default)s)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="default %(default)s")
    parser.add_argument("--no-peers", action="store_true", help="do not install or run other toolkits")
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens")
    parser.add_argument("--merge", action="store_true", help="put what a partial run finds into the result")
    parser.add_argument(
        "--rounded", action="store_true", help="only activations and caches, put into the result"
    )
    parser.add_argument("--untimed", action="store_true", help="others use the machine: leave times empty")
    parser.add_argument("--list", action="store_true", help="only print the cases")
    parser.add_argument("--render", action="store_true", help="only docs/methods.md and its plot")
    options = parser.parse_args(arguments)
    options.cache = options.cache.resolve()
    return options


def stories(options: argparse.Namespace, missing: dict[str, str]) -> Subject | None:
    """Full-precision weights, and texts that the model itself has written."""
    source = options.data / "weights" / STORIES
    if not (source / "model.safetensors").exists():
        missing[STORIES] = "its weights are not in the data folder (--data)"
        return None
    scored = 2048 if options.quick else 8192
    sampled = method_texts.sampled(source, 34, 1, options.cache, say)
    texts = {"sampled": (sampled, scored, 256)}
    excerpt = options.data / "text" / "tinystories_sample.txt"
    if excerpt.exists():
        texts["excerpt"] = (excerpt, 768, 256)
    else:
        missing["tinystories_sample.txt"] = "not in the data folder"
    calibration = method_texts.sampled(source, 66, 2, options.cache, say)
    return Subject(STORIES, source, texts, (calibration, 64, 256), "fp16")


def smollm(options: argparse.Namespace, missing: dict[str, str]) -> Subject | None:
    """A larger model, which itself has been rounded to 4 bits before: its GGUF is Q4_1."""
    from lowbit.errors import LowbitError
    from lowbit.model.download import resolve

    text = options.data / "text"
    scored, calibrating = text / "wiki.test.raw", text / "wiki.train.slice.raw.txt"
    for file in (scored, calibrating):
        if not file.exists():
            missing[file.name] = "not in the data folder"
            return None
    try:
        source = resolve(SMOLLM, progress=say)
    except LowbitError as error:
        missing[SMOLLM] = str(error)
        return None
    tokens = 2048 if options.quick else 4096
    texts = {"WikiText-2": (method_texts.cut(scored, 0, 6 * tokens, options.cache), tokens, 512)}
    calibration = method_texts.cut(calibrating, 0, 400_000, options.cache)
    return Subject(SMOLLM, source, texts, (calibration, 16, 512), "int8-g32")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    missing: dict[str, str] = {}
    result: dict[str, Any] = {
        "date": machine.now(),
        **machine.commit(),
        "machine": machine.describe(),
        "missing": missing,
        "quick": options.quick,
        "models": {},
    }
    makers: dict[str, tuple[Callable[..., Subject | None], Callable[[], list[method_cases.Case]]]] = {
        STORIES: (stories, method_cases.stories_cases),
        SMOLLM: (smollm, method_cases.smollm_cases),
    }
    for name in options.model or makers:
        started = time.perf_counter()
        make, cases = makers[name]
        subject = make(options, missing)
        if subject is None:
            say(f"going on without {name}: {missing}")
            continue
        say(f"{name}:")
        with tempfile.TemporaryDirectory(prefix="lowbit-methods-") as work:
            wanted = method_cases.chosen(cases(), options.only)
            rows: list[method_run.Row] = []
            stopped = collect(method_run.run_cases(subject, wanted, Path(work), say), rows)
            if not stopped and not options.no_peers:
                stopped = collect(peer_rows(subject, options, missing), rows)
        result["models"][name] = {
            "rows": rows,
            "texts": {key: [file.name, *rest] for key, (file, *rest) in subject.texts.items()},
            "calibration": [subject.calibration[0].name, *subject.calibration[1:]],
            "embedding": subject.embedding,
            "seconds": round(time.perf_counter() - started, 1),
        }
        if stopped:
            say(f"stopped; {len(rows)} rows of {name} are kept")
            break
        if name == STORIES and not options.only:
            result["models"][name]["rounded"] = method_rounded.rows(subject, say)
        say(f"{name}: {result['models'][name]['seconds']:.0f} s")
    return result


def collect(source: Iterator[method_run.Row], rows: list[method_run.Row]) -> bool:
    """Append what comes to `rows`; True if a signal ended it: what has been measured by then is kept."""
    try:
        for row in source:
            rows.append(row)
    except KeyboardInterrupt:
        return True
    return False


def peer_rows(
    subject: Subject, options: argparse.Namespace, missing: dict[str, str]
) -> Iterator[method_run.Row]:
    """The same measurements of what other programs make of the model."""
    if subject.name == STORIES:
        windows = method_texts.windows_file(subject, options.cache)
        rows, made = toolkits.rows(subject.source, windows, options.cache, missing, options.only, say)
    else:
        rows, made = kquants.rows(subject, options.cache, missing, options.only, say)
    found: dict[str, method_run.Row] = {}
    keys = list(made)
    for begin in range(0, len(keys), method_run.TOGETHER):
        part = {key: made[key] for key in keys[begin : begin + method_run.TOGETHER]}
        found.update(method_run.measured(subject, part))
    for row in rows:
        yield {**row, **found.get(row["key"], {})}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old result with the rows of the new one in their places; each keeps its own commit and date."""
    models = dict(old["models"])
    for name, found in new["models"].items():
        rows = {row["key"]: row for row in models.get(name, {"rows": []})["rows"]}
        rows.update({row["key"]: row for row in found["rows"]})
        models[name] = {**found, **models.get(name, {}), "rows": list(rows.values())}
        if "rounded" in found:
            models[name]["rounded"] = found["rounded"]
    return {**old, "models": models, "missing": {**old["missing"], **new["missing"]}}


def rounded_only(options: argparse.Namespace) -> int:
    """Measure activations and caches of stories15M anew and put them into the result."""
    missing: dict[str, str] = {}
    subject = stories(options, missing)
    if subject is None or not RESULT.exists():
        why = missing.get(STORIES, "there is no result to put it into; run without --rounded first")
        say(f"without {STORIES}: {why}")
        return 1
    result = json.loads(RESULT.read_text())
    result["models"][STORIES]["rounded"] = method_rounded.rows(subject, say)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return method_page.render(result, ROOT / "docs", say)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    options = parse()
    if options.list:
        for case in method_cases.chosen(method_cases.stories_cases(), options.only):
            print(f"{STORIES} {case.width:>4} {case.key}")
        return 0
    if options.render:
        return method_page.render(json.loads(RESULT.read_text()), ROOT / "docs", say)
    if options.rounded:
        return rounded_only(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = measure(options)
    except process.CommandError as error:
        say(str(error))
        return 1
    for found in result["models"].values():
        for row in found["rows"]:
            row.update(commit=result["commit"][:12], date=result["date"][:10])
            if options.untimed:
                row["seconds"] = None
    method_page.print_tables(result)
    partial = bool(options.only or options.model or options.no_peers or options.quick)
    if partial and not options.merge:
        say("a partial run writes no result file (--merge puts it into the one that is there)")
        return 0
    if partial and RESULT.exists():
        result = merged(json.loads(RESULT.read_text()), result)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    say(f"wrote {RESULT.relative_to(ROOT)}")
    return method_page.render(result, ROOT / "docs", say)


if __name__ == "__main__":
    sys.exit(main())
