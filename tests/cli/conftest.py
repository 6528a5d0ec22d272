"""Two ways to run the command: in this process (`lowbit`), and in a fresh one (`fresh_lowbit`)."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.cli import main

_SPEC = importlib.util.spec_from_file_location(
    "tiny_checkpoint", Path(__file__).resolve().parents[1] / "tiny_checkpoint.py"
)
tiny_checkpoint = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_checkpoint)
tiny_model, base_model = tiny_checkpoint.tiny_model, tiny_checkpoint.base_model


class Result:
    """code, out and err of one command."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def json(self):
        """The object on stdout, after a check that it is the only thing there, in one line."""
        assert self.out.endswith("\n") and self.out.count("\n") == 1, self.out + self.err
        value = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert isinstance(value, dict)
        return value


@pytest.fixture
def lowbit(tmp_path, monkeypatch, capfdbinary):
    """Return run(*arguments, stdin=b"") -> Result, within this process and with stdout of the descriptor."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin=b""):
        stdin = stdin.encode() if isinstance(stdin, str) else stdin
        capfdbinary.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as end:  # --help
                code = end.code or 0
        out, err = capfdbinary.readouterr()
        return Result(code, out.decode(), err.decode())

    return run


@pytest.fixture
def fresh_lowbit(tmp_path):
    """The same in a process of its own."""

    def run(*arguments, environment=None):
        done = subprocess.run(
            [sys.executable, "-m", "lowbit.cli", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=tmp_path,
            timeout=120,
            env=child_environment(**(environment or {})),
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


def child_environment(**more):
    """An environment in which a child finds the package that is tested here."""
    root = Path(sys.modules["lowbit"].__file__).parents[1]
    return {**os.environ, "PYTHONPATH": str(root), **more}


@pytest.fixture
def environment():
    return child_environment
