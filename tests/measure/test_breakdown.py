"""The time of a step by phase: it adds up, and its bytes and multiply-adds are those of the model."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

import lowbit
from lowbit.cli import main
from lowbit.measure.breakdown import PARTS, breakdown, parts_of
from lowbit.measure.flame import flame
from lowbit.measure.speed import prefill_multiply_adds, weight_bytes_per_token


@pytest.fixture(scope="module")
def model(tiny_model):
    return lowbit.load(tiny_model)


def test_phases_add_up_to_the_step(model):
    found = breakdown(model, prefill=48, decode=8, repeats=2)
    for kind in ("prefill", "decode"):
        rows = found[kind]["phases"]
        assert sum(row["seconds_per_token"] for row in rows) == pytest.approx(
            found[kind]["seconds_per_token"]
        )
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert sum(parts_of(rows).values()) == pytest.approx(1)
        assert {"qkv", "attention", "output", "gate_up", "down", "norms"} <= {row["phase"] for row in rows}
        assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
        assert {row["part"] for row in rows} <= PARTS.keys()
    assert not any(row["phase"] == "experts" for row in found["decode"]["phases"])


def test_bytes_and_work_are_those_of_the_model(model):
    found = breakdown(model, prefill=48, decode=8, repeats=1)
    read = sum(row["bytes"] or 0 for row in found["decode"]["phases"] if row["phase"] != "attention")
    assert read == weight_bytes_per_token(model)
    work = sum(row["multiply_adds"] or 0 for row in found["prefill"]["phases"])
    assert work in (prefill_multiply_adds(model, 48), prefill_multiply_adds(model, 48) - _head(model))


def _head(model):
    matrix = model.model.weights["model.embed_tokens.weight"]
    return matrix.out_features * matrix.in_features


def test_measuring_changes_no_token(model):
    plain = model.generate("Once", max_tokens=12).token_ids
    model.decoder.start_profile()
    assert model.generate("Once", max_tokens=12).token_ids == plain
    steps, seconds, phases = model.decoder.stop_profile()
    assert steps == 12
    assert 0 < sum(phases.values()) <= seconds
    assert model.decoder.stop_profile()[0] == 12  # off: nothing more is counted
    model.generate("Once", max_tokens=3)
    assert model.decoder.stop_profile()[0] == 12


def test_the_picture_is_whole(model):
    rows = breakdown(model, prefill=16, decode=4, repeats=1)["decode"]["phases"]
    drawing = ElementTree.fromstring(flame(rows, "a <step> & more"))
    boxes = drawing.findall(".//{*}rect")
    assert len(boxes) == 1 + len(parts_of(rows)) + len(rows)
    assert all(float(box.get("x")) + float(box.get("width")) <= 760.01 for box in boxes)


def test_bench_prints_and_draws_it(tiny_model, tmp_path, capsys):
    page = tmp_path / "step.html"
    common = ["bench", str(tiny_model), "--prefill", "8", "--decode", "4", "--repeats", "1"]
    assert main([*common, "--no-first-token", "--html", str(page), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["breakdown"]["decode"]["phases"]
    assert "output projection" in page.read_text()
    assert main([*common, "--no-first-token", "--breakdown"]) == 0
    assert "gate and up" in capsys.readouterr().out
    assert main([*common, "--no-first-token", "--html", str(tmp_path / "none" / "x.html")]) == 2
