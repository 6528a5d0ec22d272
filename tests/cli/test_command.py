"""The frame of every verb: help, errors, exit status, JSON purity."""

import json
import subprocess
import sys

import pytest


def test_no_arguments_shows_the_three_commands(lowbit):
    done = lowbit()
    assert done.code == 0 and done.err == ""
    for verb in ("lowbit run", "lowbit quantize", "lowbit chat"):
        assert verb in done.out


def test_help_lists_every_verb(lowbit):
    out = lowbit("help").out
    for verb in ("pull", "quantize", "run", "chat", "eval", "bench", "inspect", "doctor", "formats", "demo"):
        assert f"  {verb} " in out


@pytest.mark.parametrize(
    "verb",
    ["pull", "quantize", "run", "chat", "eval", "bench", "inspect", "doctor", "formats", "demo", "version"],
)
def test_every_verb_has_help_and_json(lowbit, verb):
    done = lowbit(verb, "--help")
    assert done.code == 0 and "--json" in done.out and f"usage: lowbit {verb}" in done.out


def test_version(lowbit):
    assert lowbit("version").out.startswith("lowbit 0.")
    assert lowbit("--version").out.startswith("lowbit 0.")
    assert lowbit("version", "--json").json()["version"].startswith("0.")


def test_unknown_verb(lowbit):
    done = lowbit("quantise")
    assert done.code == 2 and done.out == ""
    assert done.err == "lowbit: 'quantise' is not a verb; did you mean `lowbit quantize`?\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("run", "m", "--frobnicate"),
        ("run", "m", "--temp", "1"),
        ("run", "m", "--threads", "0"),
        ("run", "m", "--context", "many"),
        ("run", "m", "-p", "x", "--activations", "int4"),
        ("quantize", "m", "int4"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(lowbit, arguments):
    done = lowbit(*arguments)
    assert done.code == 2 and done.out == ""
    assert done.err.startswith(f"lowbit: {arguments[0]}: ") and done.err.count("\n") == 1
    done = lowbit(*arguments, "--json")
    assert done.code == 2 and done.json()["error"]["type"] == "UsageError"


def test_run_does_not_import_what_it_does_not_need(base_model, environment):
    code = (
        "import sys; from lowbit.cli import main; assert main(sys.argv[1:]) == 0\n"
        "print('\\n' + ' '.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(base_model), "-p", "x", "-n", "2"],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    loaded = {name.split(".")[0] for name in done.stderr.splitlines()[-1].split()}
    assert not loaded & {"rich", "huggingface_hub", "transformers", "torch", "jinja2", "requests"}


def test_a_closed_pipe_is_quiet(environment):
    child = subprocess.Popen(
        [sys.executable, "-m", "lowbit.cli", "formats"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    child.stdout.close()
    err = child.stderr.read().decode()
    child.stderr.close()
    assert child.wait(60) == 141 and err == ""


def test_ctrl_c_is_130(lowbit, monkeypatch):
    from lowbit.cli import version

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(version, "execute", interrupted)
    done = lowbit("version")
    assert done.code == 130 and "Traceback" not in done.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "out/x"), 2, "'out/x': No space left on device"),
        (MemoryError(), 2, "not enough memory"),
        (ZeroDivisionError("oops"), 1, "ZeroDivisionError: oops; this is a bug"),
    ],
)
def test_errors_of_the_system(lowbit, monkeypatch, error, code, words):
    from lowbit.cli import version

    def broken(args):
        print("noise")
        raise error

    monkeypatch.setattr(version, "execute", broken)
    done = lowbit("version", "--json")
    assert done.code == code and words in done.err
    assert words in done.json()["error"]["message"]


def test_json_is_strict():
    import io

    from lowbit.cli.output import write_json

    stream = io.StringIO()
    write_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": "\ud800x", "d": True}, stream)
    assert json.loads(stream.getvalue()) == {"a": None, "b": [None, 1.5], "c": "?x", "d": True}
