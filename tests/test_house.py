"""The walls of the house: who may import whom, how long a file may be, which names are public."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "lowbit"
MAX_LINES = 400

# Room -> the rooms it may import. `errors`, `quiet` and `_native` are open to every room but formats, which
# is NumPy only, and `lowbit` itself (the public names) may use all of them.
ROOMS = {
    "formats": set(),
    "packed": {"formats"},
    "quantize": {"packed", "formats"},
    "kernels": {"packed", "formats"},
    "model": {"kernels", "packed", "formats"},
    "compress": {"quantize", "model", "kernels", "packed", "formats"},
    "engine": {"model", "kernels", "packed", "formats"},
    "server": {"engine", "model", "kernels", "packed", "formats"},
    "interop": {"compress", "quantize", "model", "kernels", "packed", "formats"},
    "plan": {"engine", "model", "packed", "formats"},
    "measure": {"plan", "quantize", "engine", "model", "kernels", "packed", "formats"},
}
ROOMS["cli"] = {*ROOMS}
# What a room may import from outside the standard library.
OUTSIDE = {"numpy"}
EXTRA = {
    "packed": {"safetensors"},
    "kernels/triton": {"torch", "triton"},  # a folder of its own: no other kernel knows them
    "model": {"tokenizers", "safetensors", "huggingface_hub", "jinja2", "torch"},
    "compress": {"torch", "scipy", "safetensors"},
    "engine": {"llguidance"},
    "quantize": {"torch", "scipy"},
    "server": {"uvicorn", "msgspec", "prometheus_client"},
    "interop": {"safetensors", "torch", "transformers", "huggingface_hub"},
    "plan": {"scipy"},
    "measure": {"matplotlib", "lm_eval", "datasets", "pynvml", "codecarbon"},
    "cli": {"rich"},
}


def tracked(*patterns: str) -> list[Path]:
    try:
        out = subprocess.run(
            ["git", "ls-files", *patterns],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / line for line in out.splitlines() if (ROOT / line).is_file()]


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import of a file, those within functions included."""
    found = []
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "lowbit":
                found += [(node.lineno, f"lowbit.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return found


def extra(path: Path) -> set[str]:
    """What a file may import besides the standard library and NumPy."""
    room, *below = path.relative_to(PACKAGE).parts
    return EXTRA.get(f"{room}/{below[0]}", EXTRA.get(room, set()))


def import_complaints(path: Path) -> list[str]:
    room = path.relative_to(PACKAGE).parts[0]
    complaints = []
    for line, module in imports(path):
        top, *rest = module.split(".")
        if top == "lowbit":
            target = rest[0] if rest else ""
            allowed = {room, "errors", "quiet", "_native", *ROOMS[room]}
            if room == "formats":
                allowed.discard("_native")
            # The CLI may use the public names: it is the top of the house.
            if room != "cli" and target not in allowed:
                complaints.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
        elif top not in sys.stdlib_module_names and top not in OUTSIDE | extra(path):
            complaints.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    return complaints


def test_imports_point_downwards():
    complaints = []
    for path in sorted(PACKAGE.glob("*/**/*.py")):
        assert path.relative_to(PACKAGE).parts[0] in ROOMS, f"{path} is in a room this test does not know"
        complaints += import_complaints(path)
    assert not complaints, "\n".join(complaints)


def test_the_import_test_sees_an_upward_import(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "lowbit")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    bad = tmp_path / "lowbit" / "packed" / "bad.py"
    bad.parent.mkdir(parents=True)
    bad.write_text("def f():\n    from ..engine import load\n    import torch\n    from lowbit import cli\n")
    assert len(import_complaints(bad)) == 3


def test_files_are_short():
    long = []
    for path in tracked("*.py", "*.cc", "*.h", "*.c", "*.cpp"):
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {MAX_LINES}")
    assert not long, "\n".join(long)


def test_python_files_open_with_their_purpose():
    silent = [
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent, silent


def test_nothing_is_left_open():
    words = re.compile(r"\b(TODO|FIXME|XXX|raise NotImplementedError)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked("src", "native")
        if path.suffix in (".py", ".cc", ".h")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert not found, found


def test_no_machine_paths():
    paths = re.compile(r"(?<![\w.$}/])/(home|root|work|Users|mnt|workspace)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        if path.suffix in (".py", ".cc", ".h", ".md", ".toml", ".cmake", ".txt", ".json", "")
        and path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if paths.search(line)
    ]
    assert not found, found


PUBLIC = {
    "lowbit": [
        "FORMATS",
        "Auto",
        "CheckpointError",
        "Engine",
        "EngineConfig",
        "Format",
        "FormatError",
        "Generation",
        "Grammar",
        "LanguageModel",
        "LowbitError",
        "PackedMatrix",
        "RequestError",
        "SamplingParameters",
        "Scheme",
        "UnsupportedError",
        "__version__",
        "emulate",
        "load",
        "matmul",
        "parse_format",
        "quantize",
    ],
    "lowbit.engine": [
        "Conversation",
        "Generation",
        "LanguageModel",
        "SamplingParameters",
        "TextStream",
        "TokenLogprob",
        "load",
    ],
    "lowbit.measure": [
        "Comparison",
        "ComparisonResult",
        "PerplexityResult",
        "bench",
        "bench_kernels",
        "compare",
        "describe_machine",
        "find_problems",
        "first_token_seconds",
        "measure_decode",
        "peak_rss_bytes",
        "perplexity",
    ],
    "lowbit.formats": ["DESCRIPTIONS", "FORMATS", "Format", "Scheme", "emulate", "parse_format"],
}


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_public_names_are_these(module):
    room = importlib.import_module(module)
    assert list(room.__all__) == PUBLIC[module]
    for name in room.__all__:
        assert getattr(room, name) is not None
    assert set(room.__all__) <= set(dir(room))


def test_versions_agree():
    import lowbit

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{lowbit.__version__}"' in text


def test_quantize_is_a_function_however_it_is_imported():
    code = (
        "import lowbit\n"
        "assert callable(lowbit.quantize)\n"
        "from lowbit.quantize import quantize_array\n"
        "assert callable(lowbit.quantize)\n"
        "import lowbit.quantize as room\n"
        "assert room.quantize_array is quantize_array and callable(room)\n"
        "from lowbit import quantize\n"
        "import numpy as np\n"
        "m = quantize(np.ones((2, 64), np.float32), 'int4-g64')\n"
        "assert m.shape == (2, 64)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=child_environment())


def test_import_is_light():
    """`import lowbit` loads nothing; names are resolved on first use."""
    code = "import sys, lowbit; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=child_environment()
    ).stdout.split()
    assert not {"numpy", "tokenizers", "rich", "huggingface_hub"} & set(out)


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}
