"""The two tables of docs/serving.md: numbers to reach, from measured parts, and faults with their tests.

Serving parts are kept one by one in bench/results/serving.json, each with its date and commit, so that one
of them can be measured again.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report import ReportError, figure, table, verdict

PAGE, RESULT = "serving.md", "serving.json"
NUMBERS = ("<!-- numbers:begin -->", "<!-- numbers:end -->")
FAULTS = ("<!-- faults:begin -->", "<!-- faults:end -->")
# What goes wrong, what is required then, and the test that does it: file and function under tests/.
FAULT_TESTS: tuple[tuple[str, str, str], ...] = (
    (
        "disconnect while queued, in prefill, in decode",
        "blocks are back within one step",
        "server/test_faults.py::test_disconnect",
    ),
    (
        "`kill -9` of the engine",
        "clients get an error event, others 503; it starts again by itself",
        "server/test_faults.py::test_the_engine_is_killed",
    ),
    (
        "SIGTERM",
        "new requests get 503, running ones finish",
        "server/test_faults.py::test_sigterm",
    ),
    (
        "SIGTERM while an answer has no end",
        "the exit is bounded",
        "server/test_faults.py::test_sigterm_does_not_wait_for_ever",
    ),
    (
        "malformed JSON, bad UTF-8, wrong types",
        "400, never 500",
        "server/test_bad_requests.py::test_bodies_that_are_no_request",
    ),
    (
        "absurd `n`, `max_tokens` and other fields",
        "400 that names the field",
        "server/test_bad_requests.py::test_completions",
    ),
    (
        "NUL and control characters",
        "they are text",
        "server/test_bad_requests.py::test_nul_and_control_characters_are_text",
    ),
    (
        "oversize prompt",
        "400 `context_length_exceeded`, never cut",
        "server/test_bad_requests.py::test_a_long_prompt_is_refused_and_never_cut",
    ),
    ("oversize body", "413", "server/test_bad_requests.py::test_a_large_body"),
    ("a body that does not come", "408", "server/test_faults.py::test_a_body_that_does_not_come"),
    (
        "keys and values do not fit",
        "preemption, the same text",
        "server/test_faults.py::test_kv_exhaustion",
    ),
    (
        "slow reader",
        "memory is bounded, others do not wait",
        "server/test_faults.py::test_slow_reader",
    ),
    (
        "one tenant floods",
        "another is served between its requests",
        "server/test_faults.py::test_a_flooding_tenant_does_not_starve_another",
    ),
    (
        "one tenant opens all connections",
        "it may hold half of them",
        "server/test_faults.py::test_one_tenant_may_not_take_every_slot",
    ),
    ("wrong keys", "401", "server/test_faults.py::test_wrong_keys"),
    (
        "an answer that takes too long",
        "504, or an error event",
        "server/test_faults.py::test_an_answer_that_takes_too_long",
    ),
    (
        "chunks, companions, prefix hits, guesses, preemption, threads, KV bits",
        "the same tokens",
        "engine/test_invariance.py::test_tokens_are_a_function_of_prompt_parameters_and_model",
    ),
    (
        "a thousand requests, random disconnects",
        "no block leaks",
        "engine/test_soak.py::test_a_thousand_requests_leave_nothing_behind",
    ),
    ("idle", "no CPU time", "server/test_faults.py::test_idle_costs_nothing"),
)


def keep(result: Mapping[str, Any], parts: tuple[str, ...], folder: Path) -> bool:
    """Put the parts of a run among those that were measured before; False if it had none of them."""
    measured = [name for name in parts if name in result["sections"] and name not in result["errors"]]
    if not measured:
        return False
    path = folder / RESULT
    kept = read(folder)
    for name in measured:
        kept["parts"][name] = {
            **{
                key: result[key]
                for key in ("date", "commit", "modified", "machine", "peers", "busy_cpus", "missing")
            },
            "rows": [row for row in result["rows"] if row["part"] == name],
            "data": result["sections"][name],
        }
    kept["parts"] = {name: kept["parts"][name] for name in parts if name in kept["parts"]}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return True


def read(folder: Path) -> dict[str, Any]:
    """The parts as they were last measured."""
    path = folder / RESULT
    return dict(json.loads(path.read_text())) if path.exists() else {"parts": {}}


def render(page: str, kept: Mapping[str, Any], tests: Path) -> str:
    """The page with both tables anew."""
    return between(between(page, NUMBERS, numbers(kept)), FAULTS, faults(tests))


def between(page: str, markers: tuple[str, str], text: str) -> str:
    begin, end = markers
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ReportError(f"{PAGE}: the page must hold {begin} and, after it, {end}, each once")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)


def numbers(kept: Mapping[str, Any]) -> str:
    """Measures, targets and verdicts, and where they come from; nothing if nothing was measured."""
    if not kept["parts"]:
        return ""
    lines = [["measure", "target", "measured", "reached", "note"]]
    for part in kept["parts"].values():
        for row in part["rows"]:
            value = figure(row["value"], row["unit"])
            lines.append([row["measure"], row["target"], value, verdict(row["passed"]), row["note"]])
    stamps = sorted(
        {(part["date"][:10], part["commit"][:12], part["modified"]) for part in kept["parts"].values()}
    )
    told = [f"{date} at commit {commit}{' with changes' * changed}" for date, commit, changed in stamps]
    machine = next(iter(kept["parts"].values()))["machine"]
    caption = f"SmolLM2-135M on {machine['cpu']} ({machine['cpu_model']}; {machine['cpus']} CPUs), "
    return f"{caption}measured {', '.join(told)}.\n\n{table(lines)}"


def faults(tests: Path) -> str:
    """Every fault with what is required and its test. Raises ReportError for a test that is not there."""
    lines = [["fault", "required", "test"]]
    for fault, required, test in FAULT_TESTS:
        file, _, name = test.partition("::")
        if name not in functions(tests / file):
            raise ReportError(f"{PAGE}: tests/{test} of the fault {fault!r} does not exist")
        lines.append([fault, required, f"`{test}`"])
    return table(lines)


def functions(path: Path) -> set[str]:
    """Names of the functions of a file; none if it does not exist."""
    if not path.exists():
        return set()
    return {
        n.name
        for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    }
