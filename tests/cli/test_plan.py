"""`lowbit plan` from the command line, with a made-up profile and with published devices."""

import json

import pytest

from lowbit.cli import main

from ..plan.made_up import profile
from ..plan.networks import SMOLLM2

pytest.importorskip("scipy")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    (tmp_path / "profile.json").write_text(json.dumps(profile().to_json()))
    return tmp_path


def run(capsys, *arguments):
    status = main(["plan", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_plan_for_this_machine(files, capsys):
    page = files / "plans.html"
    status, told = run(
        capsys, files / "config.json", "--profile", files / "profile.json", "--memory", "300MB",
        "--tpot", "30ms", "--users", "2", "--context", "1k", "--max-loss", "30%", "--html", page,
    )  # fmt: skip
    assert status == 0
    best = told["plans"][0]
    assert best["memory_bytes"] <= 300e6 and best["time_per_token_seconds"] <= 0.03 and best["batch"] == 2
    assert best["time_per_token_seconds_interval"] and best["commands"][0].startswith("lowbit quantize")
    assert "<svg" in page.read_text() and best["commands"][0].split()[2] in page.read_text()


def test_the_table_is_for_people(files, capsys):
    assert main(["plan", str(files / "config.json"), "--profile", str(files / "profile.json")]) == 0
    out = capsys.readouterr().out
    assert "first token" in out and "carry out the first:" in out and "lowbit serve" in out


def test_budgets_that_cannot_be_met(files, capsys):
    arguments = [files / "config.json", "--profile", files / "profile.json", "--memory", "100MB"]
    status, told = run(capsys, *arguments)
    assert status == 0 and told["plans"] == []
    assert (
        told["infeasible"]["binding"] == ["memory"] and told["infeasible"]["nearest"]["memory_bytes"] > 100e6
    )
    assert main(["plan", *map(str, arguments)]) == 2
    assert "least possible" in capsys.readouterr().err


def test_a_published_device(files, capsys):
    status, told = run(capsys, files / "config.json", "--device", "raspberry-pi-5", "--watts", "8")
    assert status == 0 and told["machine_source"] == "specification"
    assert told["plans"][0]["time_per_token_seconds_source"] == "specification, no interval"
    status, told = run(capsys, files / "config.json", "--device", "raspberry-pi-6")
    assert status == 2 and "did you mean raspberry-pi-5" in told["error"]["message"]


def test_without_a_profile_it_says_how_to_make_one(files, capsys, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(files / "nothing"))
    status, told = run(capsys, files / "config.json")
    assert status == 2 and "lowbit doctor --profile" in told["error"]["message"]


@pytest.mark.parametrize("view", ["kinetics", "context", "idealized"])
def test_views(files, capsys, view):
    status, told = run(capsys, files / "config.json", "--device", "h100", "--view", view, "--scheme", "bf16")
    assert status == 0 and told["rows"]
    assert main(["plan", str(files / "config.json"), "--device", "h100", "--view", view]) == 0
    assert capsys.readouterr().out.count("\n") > len(told["rows"])


def test_devices_are_listed(files, capsys):
    status, told = run(capsys, files / "config.json", "--list-devices")
    assert status == 0 and {d["flag"] for d in told["devices"]} == {"specification"}
    assert main(["plan", "--list-devices"]) == 0
    assert "H100" in capsys.readouterr().out
    assert main(["plan"]) == 2
    assert "MODEL is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_doctor_keeps_a_profile(files, capsys, monkeypatch):
    """What is measured is small here; the whole way of `lowbit doctor --profile` is walked."""
    pytest.importorskip("lowbit._native")
    import lowbit.measure.profile as measuring

    def few(cases):
        return lambda: [next(c for c in cases() if c.kind in ("shape", "held out"))]

    for name in ("cases", "held_out"):
        monkeypatch.setattr(measuring, name, few(getattr(measuring, name)))
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    monkeypatch.setattr(measuring, "memory_cases", list)
    target = files / "made.json"
    assert main(["doctor", "--profile", "--output", str(target)]) == 0
    assert "int4-g32" in capsys.readouterr().out
    status, told = run(
        capsys, files / "config.json", "--profile", target, "--choices", "int4-g32", "--kv-bits", "8"
    )
    assert status == 0 and told["plans"][0]["memory_bytes_interval"] is None
