"""docs/interop.md: its table is what the tests show, and what it tells people to type works."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def interop_page():
    spec = importlib.util.spec_from_file_location("interop_page", ROOT / "bench" / "interop_page.py")
    module = sys.modules["interop_page"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_tests_show():
    script = [sys.executable, str(ROOT / "bench" / "interop_page.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"docs/interop.md is out of date:\n{done.stdout}{done.stderr}"


@pytest.fixture
def page():
    module = interop_page()
    claim = module.Claim
    claims = {
        claim("GGUF Q10", "read", "gguf", "tests/a.py"),
        claim("GGUF Q4_0", "read", "gguf", "tests/a.py"),
        claim("GGUF Q4_0", "write", "gguf", "tests/b.py"),
        claim("GGUF Q4_0", "write", "llama.cpp", "tests/c.py"),
        claim("GGUF Q4_0", "write", "gguf", "tests/c.py"),
    }
    return module, claims, f"# Head\n\n{module.BEGIN}\n{module.render(claims)}\n{module.END}\n\nTail\n"


def test_what_is_written_is_read_again(page):
    module, claims, text = page
    assert module.claims_on(text) == claims
    assert text.index("Q4_0") < text.index("Q10")
    found = module.Collector()
    found.claims = claims
    assert module.updated(text, found) == text


def test_a_new_and_a_lost_test_change_the_page(page):
    module, claims, text = page
    found = module.Collector()
    found.claims = {claim for claim in claims if claim.file != "tests/c.py"}
    fewer = module.updated(text, found)
    assert "tests/c.py" not in fewer and fewer.endswith("Tail\n")
    found.skipped = {"tests/c.py"}  # a package that is not installed here
    assert module.updated(text, found) == text
    found.claims |= {module.Claim("Q5", "read", "x", "tests/d.py")}
    assert "| Q5 | [x](../tests/d.py) | - |" in module.updated(text, found)


def test_markers_are_checked(tmp_path):
    module = interop_page()

    class Item:
        nodeid, path = "tests/test_x.py::test", ROOT / "tests" / "test_x.py"

        def __init__(self, *args, **kwargs):
            self.marks = [pytest.mark.interop(*args, **kwargs).mark]

        def iter_markers(self, name):
            return self.marks

    found = module.Collector()
    found.pytest_collection_modifyitems(
        [
            Item(type="Q4_0", direction="in", against="gguf"),
            Item("Q4_0"),
            Item(type="Q4_0", direction="read"),
        ]
    )
    assert len(found.errors) == 3 and not found.claims
