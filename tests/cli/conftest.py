"""Runs the command as a user does: a fresh process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "tiny_checkpoint", Path(__file__).resolve().parents[1] / "tiny_checkpoint.py"
)
tiny_checkpoint = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_checkpoint)
tiny_model, base_model = tiny_checkpoint.tiny_model, tiny_checkpoint.base_model


@pytest.fixture
def lowbit(tmp_path):
    """Return run(*arguments, stdin=None) -> result with .code, .out, .err and .json()."""
    package = Path(sys.modules["lowbit"].__file__).parents[1] if "lowbit" in sys.modules else _source()

    def run(*arguments, stdin=None, environment=None):
        done = subprocess.run(
            [sys.executable, "-m", "lowbit.cli", *map(str, arguments)],
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            cwd=tmp_path,
            timeout=60,
            env={**os.environ, "PYTHONPATH": str(package), **(environment or {})},
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        return SimpleNamespace(code=done.returncode, out=out, err=err, json=lambda: _one_object(out))

    return run


def _one_object(text):
    """The only thing on stdout is one line with one JSON object."""
    assert text.endswith("\n") and text.count("\n") == 1, text
    value = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(value, dict)
    return value


def _source():
    return Path(__file__).resolve().parents[2] / "src"
