"""lowbit enters transformers' tables in either order of the imports, and imports neither it nor torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BARE = ("-S",)  # without what an installed package, or an editable one, imports when Python starts
CHECK = """
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["lowbit"].__name__ == "LowbitQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["lowbit"].__name__ == "LowbitConfig"
assert type(auto.__loader__).__name__ == type(auto.__spec__.loader).__name__ == "SourceFileLoader"
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "lowbit.import_hook"]
"""


def run(code, *folders, flags=()):
    path = os.pathsep.join(map(str, [*folders, ROOT / "src"]))
    done = subprocess.run(
        [sys.executable, *flags, "-W", "error", "-c", "import sys\n" + code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "imports",
    [
        "import lowbit\nimport transformers",
        "import transformers\nimport lowbit",
        "from transformers.quantizers import auto\nimport lowbit",
        "import lowbit\nimport importlib\nimportlib.reload(lowbit)",
    ],
)
def test_either_order(imports):
    pytest.importorskip("transformers", reason="pip install transformers")
    run(f"import warnings\nwarnings.simplefilter('ignore')\n{imports}\n{CHECK}")


def test_nothing_is_imported_for_it():
    out = run("import lowbit\nprint(*sys.modules)", flags=BARE).split()
    assert not {"torch", "transformers", "numpy", "importlib.util", "lowbit.interop"} & set(out)


def test_importing_lowbit_imports_next_to_nothing():
    """What makes it a matter of a millisecond: these and no others. A clock would fail on a busy machine."""
    before = set(run("print(*sys.modules)", flags=BARE).split())
    after = set(run("import lowbit\nprint(*sys.modules)", flags=BARE).split())
    extra = after - before
    assert {name for name in extra if name.split(".")[0] not in sys.stdlib_module_names} == {
        "lowbit",
        "lowbit.import_hook",
    }
    assert not {"dataclasses", "inspect", "pathlib", "importlib.util", "json"} & extra


def test_a_transformers_that_is_too_old_is_named_and_works(tmp_path):
    folder = tmp_path / "transformers" / "quantizers"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "auto.py").write_text("AUTO_QUANTIZER_MAPPING = {}\n")
    out = run(
        "import lowbit, warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    from transformers.quantizers import auto\n"
        "print(auto.AUTO_QUANTIZER_MAPPING, *[w.message for w in seen])",
        tmp_path,
    )
    assert out.startswith("{} lowbit: ") and "4.56" in out
