"""The verdicts of `make bench-plan` and what it writes, on made-up results."""

import copy
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import plan_page

    yield plan_page
    sys.modules.pop("plan_page", None)


def _row(error, inside=True):
    return {
        "kind": "k",
        "name": "n",
        "measured": 1 + error,
        "predicted": 1.0,
        "error": error,
        "inside": inside,
    }


def _result(page):
    rows = [_row(0.02)] * 9 + [_row(0.2, False)]
    result = {
        "date": "2026-01-01T00:00:00Z",
        "commit": "0" * 40,
        "machine": {"cpu": "c", "cpus": 2},
        "profile_seconds": 40.0,
        "operators": rows,
        "token": rows,
        "first": rows,
        "memory": [_row(-0.01)],
        "regret": [
            {"name": "b", "chosen": "int4-g32", "measured": 1.02, "best_measured": 1.0, "regret": 0.02}
        ],
    }
    result["verdicts"] = page.verdicts(result)
    return result


def test_good_predictions_pass_and_are_shown(page):
    result = _result(page)
    assert page.passed(result) and all(v["met"] for v in result["verdicts"])
    text = page.insert(f"a\n{page.BEGIN}\nold\n{page.END}\nz", result)
    assert (
        "old" not in text and text.startswith("a\n") and text.endswith("\nz") and "| k | 10 | 2.0% |" in text
    )
    assert "90% intervals" in page.summary(result)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.update(token=[_row(0.12)] * 3),
        lambda r: r.update(operators=[_row(0.01, False)] * 10),
        lambda r: r.update(first=[_row(-0.3)] * 3),
        lambda r: r.update(memory=[_row(0.04)]),
        lambda r: r["regret"].append({"name": "b", "regret": 0.2}),
    ],
)
def test_each_gate_can_fail(page, spoil):
    result = copy.deepcopy(_result(page))
    spoil(result)
    result["verdicts"] = page.verdicts(result)
    assert not page.passed(result)


def test_the_page_has_its_place(page):
    text = (BENCH.parent / "docs" / "planning.md").read_text(encoding="utf-8")
    assert text.count(page.BEGIN) == text.count(page.END) == 1
