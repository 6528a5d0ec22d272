"""The parts that hold whole models' speeds against other programs and against the machine's bounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models
import speed
import spread
import targets
from context import Bench
from targets import LARGE, OPENVINO, OURS, PEER_TYPE, SAME_FILE, SMALL, THEIRS, TITLES, Row, at_least

Series = dict[str, dict[str, list[float]]]


def summarize(
    name: str, threads: int, series: Series, files: Mapping[str, Path], **more: Any
) -> dict[str, Any]:
    """One entry of a section's data: every figure's median, extremes and single values."""
    return {
        "model": name,
        "threads": threads,
        "weight_bytes": {label: models.weight_bytes(path) for label, path in files.items()},
        "contestants": {
            label: {key: spread.summary(values) for key, values in figures.items()}
            for label, figures in series.items()
        },
        **more,
    }


def against(
    measure: str, series: Series, ours: str, theirs: str, phase: str, least: float, why_not: str
) -> Row:
    """A row for the ratio of two contestants' speeds; not measured if the other one was not there."""
    if theirs not in series:
        return at_least(measure, None, "x", least, why_not=why_not)
    found = spread.ratio(series[ours][phase], series[theirs][phase])
    return at_least(measure, found["median"], "x", least, f"rounds {found['low']:.2f} to {found['high']:.2f}")


def of_bound(series: Series, ours: str, phase: str) -> float | None:
    """Median fraction of the bound that a lowbit contestant reached."""
    values = series[ours].get(f"{phase}_bound_fraction")
    return float(spread.summary(values)["median"]) if values else None


def threads_word(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def contestants_of(
    bench: Bench, name: str, repetitions: int
) -> tuple[dict[str, speed.Contestant], dict[str, Path]]:
    """lowbit and llama.cpp at four bits, and lowbit on llama.cpp's own file."""
    ours = bench.ours(name)
    contestants, files = {OURS: speed.lowbit_contestant(ours, repetitions)}, {OURS: ours}
    theirs = bench.theirs(name)
    if theirs is not None and bench.peer is not None:
        contestants[THEIRS] = speed.llama_contestant(bench.peer, theirs, repetitions)
        contestants[SAME_FILE] = speed.lowbit_contestant(theirs, repetitions)
        files |= {THEIRS: theirs, SAME_FILE: theirs}
    return contestants, files


def add_openvino(
    bench: Bench,
    name: str,
    kinds: tuple[str, ...],
    contestants: dict[str, speed.Contestant],
    files: dict[str, Path],
) -> None:
    for kind in kinds:
        path = bench.openvino_model(name, kind)
        if path is not None and bench.openvino is not None:
            label = f"{OPENVINO} {kind}"
            contestants[label], files[label] = speed.openvino_contestant(bench.openvino, path), path


def small_section(bench: Bench) -> tuple[list[Row], Any]:
    """SmolLM2: decode of 128 and prefill of 512 tokens against the bounds and the other programs."""
    rows: list[Row] = []
    data = []
    for threads in bench.threads:
        contestants, files = contestants_of(bench, SMALL, repetitions=2)
        if threads == bench.threads[0]:
            add_openvino(bench, SMALL, ("int8", "int4"), contestants, files)
        series = speed.take_turns(contestants, threads, bench.rounds, bench.say)
        if threads == bench.threads[0]:
            for phase, least in targets.BOUND_FRACTIONS[SMALL].items():
                value = of_bound(series, OURS, phase)
                measure = f"SmolLM2 {phase}, {threads_word(threads)}, of the bound"
                rows.append(at_least(measure, None if value is None else 100 * value, "%", 100 * least))
        rows += ratios(bench, SMALL, threads, series)
        if threads == bench.threads[0]:
            rows.append(openvino_row(bench, SMALL, threads, series, OURS))
        data.append(summarize(SMALL, threads, series, files))
    return rows, data


def ratios(bench: Bench, name: str, threads: int, series: Series) -> list[Row]:
    """The rows against llama.cpp's type of as many bits."""
    why = bench.missing.get("llama.cpp", "")
    return [
        against(
            f"{TITLES[name]} {phase}, {threads_word(threads)}, against {THEIRS}",
            series, OURS, THEIRS, phase, least, why,
        )
        for phase, least in targets.SPEED_RATIOS[name].get(threads, {}).items()
    ]  # fmt: skip


def openvino_row(bench: Bench, name: str, threads: int, series: Series, ours: str) -> Row:
    measure = f"{TITLES[name]} prefill, {threads_word(threads)}, against {OPENVINO} int8"
    why = bench.missing.get(OPENVINO, "")
    least = targets.OPENVINO_PREFILL[name]
    return against(measure, series, ours, f"{OPENVINO} int8", "prefill", least, why)


def large_section(bench: Bench) -> tuple[list[Row], Any]:
    """The 1.1B shape at every width against llama.cpp's types, then at four bits with one thread."""
    all_threads = bench.threads[0]
    contestants: dict[str, speed.Contestant] = {}
    files: dict[str, Path] = {}
    labels = {width: f"lowbit {scheme}" for width, scheme in targets.WIDTHS.items()}
    for width, scheme in targets.WIDTHS.items():
        files[labels[width]] = bench.ours(LARGE, scheme)
        contestants[labels[width]] = speed.lowbit_contestant(files[labels[width]])
    for kind in targets.PEER_TYPES:
        path = bench.theirs(LARGE, kind)
        if path is not None and bench.peer is not None:
            label = f"llama.cpp {kind}"
            contestants[label], files[label] = speed.llama_contestant(bench.peer, path), path
    add_openvino(bench, LARGE, ("int8", "int4"), contestants, files)
    rounds = max(1, min(bench.rounds, 3))
    series = speed.take_turns(contestants, all_threads, rounds, bench.say, warm_up=False)
    rows = width_rows(bench, labels, series, files, all_threads)
    data = [summarize(LARGE, all_threads, series, files, by_width=labels)]
    for threads in bench.threads[1:]:
        contestants, files = contestants_of(bench, LARGE, repetitions=1)
        series = speed.take_turns(contestants, threads, rounds, bench.say, warm_up=False)
        rows += ratios(bench, LARGE, threads, series)
        data.append(summarize(LARGE, threads, series, files))
    return rows, data


def width_rows(
    bench: Bench, labels: Mapping[str, str], series: Series, files: Mapping[str, Path], threads: int
) -> list[Row]:
    """Rows over all widths: fractions of the bounds, then the ratios to llama.cpp and OpenVINO."""
    word, why = threads_word(threads), bench.missing.get("llama.cpp", "")
    decode = {width: of_bound(series, label, "decode") or 0.0 for width, label in labels.items()}
    prefill = {width: of_bound(series, label, "prefill") or 0.0 for width, label in labels.items()}
    rows = []
    for least in sorted(set(targets.DECODE_FRACTIONS.values()), reverse=True):
        found = {w: decode[w] for w in labels if targets.DECODE_FRACTIONS[w] == least}
        title = f"1.1B decode, {word}, at {listed(found)} bits, of the bound"
        rows.append(targets.fraction(title, found, least))
    rows.append(
        targets.fraction(
            f"1.1B prefill 512, {word}, at {listed(labels)} bits, of the int8 peak",
            prefill,
            targets.PREFILL_FRACTION,
        )
    )
    for (width, kind), least in targets.DECODE_RATIOS.items():
        theirs = f"llama.cpp {kind}"
        made = against(
            f"1.1B decode at {width} bits ({targets.WIDTHS[width]}), {word}, against llama.cpp {kind}",
            series, labels[width], theirs, "decode", least, why,
        )  # fmt: skip
        if theirs in files:
            sizes = [models.weight_bytes(files[label]) / 1e6 for label in (labels[width], theirs)]
            made["note"] += f"; {sizes[0]:.0f} MB against {sizes[1]:.0f}"
        rows.append(made)
    ours, four = labels["4"], f"1.1B prefill 512 at 4 bits, {word}, against"
    rows.append(against(f"{four} {THEIRS}", series, ours, THEIRS, "prefill", targets.PREFILL_OVER_PEER, why))
    medians = {
        label: spread.summary(found["prefill"])["median"]
        for label, found in series.items()
        if label.startswith("llama.cpp")
    }
    best = max(medians, key=lambda label: float(medians[label]), default="")
    least = targets.PREFILL_OVER_BEST_TYPE
    title = f"{four} llama.cpp's best type" + (f" ({best.removeprefix('llama.cpp ')})" if best else "")
    rows.append(against(title, series, ours, best, "prefill", least, why))
    rows.append(openvino_row(bench, LARGE, threads, series, ours))
    return rows


def listed(widths: Mapping[str, object]) -> str:
    *first, last = widths
    return f"{', '.join(first)} and {last}" if first else last


def avx2_section(bench: Bench) -> tuple[list[Row], Any]:
    """Both models with AVX2 alone, against a llama.cpp that was built without AVX-512 and VNNI."""
    threads = bench.threads[0]
    theirs, why = f"llama.cpp {PEER_TYPE}, AVX2", bench.missing.get("llama.cpp", "")
    ours = f"{OURS}, AVX2"
    rows: list[Row] = []
    data = []
    for name in (SMALL, LARGE):
        files = {ours: bench.ours(name)}
        contestants = {ours: speed.lowbit_contestant(files[ours], isa="avx2")}
        path = bench.theirs(name)
        if path is not None and bench.avx2 is not None:
            contestants[theirs], files[theirs] = speed.llama_contestant(bench.avx2, path), path
        rounds = bench.rounds if name == SMALL else max(1, min(bench.rounds, 3))
        series = speed.take_turns(contestants, threads, rounds, bench.say, warm_up=name == SMALL)
        for phase in ("decode", "prefill"):
            measure = (
                f"{TITLES[name]} {phase}, {threads_word(threads)}, AVX2 only, against llama.cpp {PEER_TYPE}"
            )
            rows.append(against(measure, series, ours, theirs, phase, targets.AVX2_RATIO, why))
        data.append(summarize(name, threads, series, files))
    return rows, data


def long_section(bench: Bench) -> tuple[list[Row], Any]:
    """Prefill of a long prompt beside that of 512 tokens. The 1.1B shape ends at 2,048 positions."""
    threads, length = bench.threads[0], targets.LONG_PROMPT
    path = bench.ours(SMALL)
    contestants = {
        str(prompt): speed.lowbit_contestant(path, 1, prompt=prompt, generate=16, context=length + 64)
        for prompt in (speed.PROMPT, length)
    }
    series = speed.take_turns(contestants, threads, bench.rounds, bench.say)
    short, long = (series[label]["prefill"] for label in contestants)
    found, rates = spread.ratio(long, short), [spread.summary(rate)["median"] for rate in (short, long)]
    measure = f"{TITLES[SMALL]} prefill of {length:,} tokens, of the rate at {speed.PROMPT}"
    note = f"{rates[1]:.0f} against {rates[0]:.0f} tokens/s"
    data = {label: spread.summary(values["prefill"]) for label, values in series.items()}
    return [at_least(measure, 100 * found["median"], "%", 100 * targets.LONG_FRACTION, note)], data
