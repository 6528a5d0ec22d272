"""Make the table of docs/interop.md from the tests: which types are read and written, and who confirms it.

A test that holds a type of file against an outside reference is marked

    @pytest.mark.interop(type="Q4_0", direction="read", against="gguf")

and the table has a line for every type that a test carries, with a link to the test: nothing is claimed there
that no test shows. `python bench/interop_page.py` rewrites the table; tests/test_interop_page.py fails while
it is out of date. Tests of a package that is not installed here keep their lines.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "interop.md"
BEGIN, END = "<!-- interop:begin -->", "<!-- interop:end -->"
DIRECTIONS = ("read", "write")


@dataclass(frozen=True)
class Claim:
    """What one marker says, and the file of the test."""

    type: str
    direction: str
    against: str
    file: str  # relative to the repository


class Collector:
    """A pytest plugin that keeps the claims of collected tests, and the files that skipped themselves."""

    def __init__(self) -> None:
        self.claims: set[Claim] = set()
        self.skipped: set[str] = set()
        self.errors: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("interop"):
                if mark.args or set(mark.kwargs) != {"type", "direction", "against"}:
                    self.errors.append(f"{item.nodeid}: give type, direction and against by name")
                elif mark.kwargs["direction"] not in DIRECTIONS:
                    self.errors.append(
                        f"{item.nodeid}: direction={mark.kwargs['direction']!r}; read or write"
                    )
                else:
                    file = item.path.relative_to(ROOT).as_posix()
                    kind = shown(mark.kwargs["type"], file)
                    self.claims.add(Claim(kind, mark.kwargs["direction"], mark.kwargs["against"], file))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.add(report.nodeid)
        elif report.failed:
            self.errors.append(f"{report.nodeid}: {report.longreprtext}")


def shown(kind: str, file: str) -> str:
    """Types of GGUF go by short names in their tests."""
    gguf = any(word in Path(file).name for word in ("gguf", "llama_cpp")) and "GGUF" not in kind
    return (f"GGUF {kind}" if gguf else kind).replace("|", "/")


def collect() -> Collector:
    """The claims of all tests of the repository."""
    found = Collector()
    # Only files that have the marker: the others cost their imports and say nothing.
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [str(path) for path in tests if "mark.interop(" in path.read_text(encoding="utf-8")]
    options = ["--collect-only", "-qq", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*options, *files], plugins=[found])
    return found


def render(claims: Iterable[Claim]) -> str:
    """The table: a line for each type, then who each direction is held against, as links to the tests."""
    cells: dict[str, dict[str, dict[str, set[str]]]] = {}
    for claim in claims:
        cell = cells.setdefault(claim.type, {}).setdefault(claim.direction, {})
        cell.setdefault(claim.against, set()).add(claim.file)
    lines = ["| type | read, checked against | written, checked against |", "| --- | --- | --- |"]
    for kind in sorted(cells, key=_natural):
        texts = [
            ", ".join(
                " ".join(f"[{against}](../{file})" for file in sorted(files))
                for against, files in sorted(cells[kind].get(direction, {}).items())
            )
            for direction in DIRECTIONS
        ]
        lines.append(f"| {kind} | " + " | ".join(text or "-" for text in texts) + " |")
    return "\n".join(lines)


def claims_on(page: str) -> set[Claim]:
    """What `render` wrote: its inverse."""
    found = set()
    for line in _split(page)[1].splitlines()[2:]:
        kind, *cells = (cell.strip() for cell in line.strip().strip("|").split(" | "))
        for direction, cell in zip(DIRECTIONS, cells):
            for against, file in re.findall(r"\[([^]]*)\]\(\.\./([^)]*)\)", cell):
                found.add(Claim(kind, direction, against, file))
    return found


def updated(page: str, found: Collector) -> str:
    """The page with the claims of the tests; lines of files that skipped themselves stay."""
    kept = {claim for claim in claims_on(page) if claim.file in found.skipped}
    before, _, after = _split(page)
    return f"{before}\n{render(found.claims | kept)}\n{after}"


def _split(page: str) -> tuple[str, str, str]:
    """Up to the opening mark, the table, and from the closing mark on."""
    head, _, rest = page.partition(BEGIN)
    table, found, tail = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE.name}: {BEGIN} and {END} are not both there")
    return head + BEGIN, table.strip(), END + tail


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Sort 2 before 10, and letters without case."""
    parts = re.split(r"(\d+)", text.lower())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if the page is out of date")
    options = parser.parse_args()
    found = collect()
    if found.errors:
        print("\n".join(found.errors), file=sys.stderr)
        return 2
    page = PAGE.read_text(encoding="utf-8")
    new = updated(page, found)
    if new == page:
        print(f"{PAGE.name}: {len(claims_on(page))} claims, up to date")
        return 0
    changes = difflib.unified_diff(
        page.splitlines(), new.splitlines(), "the page", "the tests", lineterm="", n=0
    )
    print("\n".join(changes))
    if options.check:
        print("run python bench/interop_page.py")
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
