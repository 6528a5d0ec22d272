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
FAULT_TESTS: tuple[tuple[str, str, str], ...] = ()


def keep(result: Mapping[str, Any], parts: tuple[str, ...], folder: Path) -> bool:
    """Put the parts of a run among those that were measured before; False if it had none of them."""
    measured = [name for name in parts if name in result["sections"] and name not in result["errors"]]
    if not measured:
        return False
    path = folder / RESULT
    kept = json.loads(path.read_text()) if path.exists() else {"parts": {}}
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


def render(page: str, kept: Mapping[str, Any], tests: Path) -> str:
    """The page with both tables anew."""
    return between(between(page, NUMBERS, numbers(kept)), FAULTS, faults(tests))


def between(page: str, markers: tuple[str, str], text: str) -> str:
    begin, end = markers
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ReportError(f"{PAGE}: the page must hold {begin} and, after it, {end}, each once")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)


def numbers(kept: Mapping[str, Any]) -> str:
    """Measures, targets and verdicts, and where they come from."""
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
