"""What was written is loaded again and measured."""

import json
import shutil

import pytest

import lowbit
from lowbit.errors import CheckpointError
from lowbit.measure.verify import verify


def test_the_report_and_the_directory_hold_the_divergence(tiny_model, tmp_path):
    report = lowbit.quantize(tiny_model, "int8-g32", tmp_path / "eight")
    coarse = lowbit.quantize(tiny_model, "int2-g32", tmp_path / "two", embedding="int2-g32")
    assert 0 <= report["measured"]["kl_nats_per_token"] < coarse["measured"]["kl_nats_per_token"]
    assert report["measured"]["tokens"] == 1024
    details = json.loads((tmp_path / "two" / "lowbit.json").read_text())
    assert details["measured"] == coarse["measured"]
    plain = lowbit.quantize(tiny_model, "int8-g32", tmp_path / "plain", verify=False)
    assert "measured" not in plain
    assert "measured" not in json.loads((tmp_path / "plain" / "lowbit.json").read_text())


def test_a_damaged_result_is_noticed(tiny_model, tmp_path):
    lowbit.quantize(tiny_model, "int8-g32", tmp_path / "out", verify=False)
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        verify(tiny_model, tmp_path / "out")


def test_what_cannot_be_measured_says_why(tiny_model, tmp_path):
    silent = tmp_path / "silent"
    shutil.copytree(tiny_model, silent, ignore=shutil.ignore_patterns("tokenizer*"))
    report = lowbit.quantize(silent, "int8-g32", tmp_path / "out")
    assert report["measured"] == {"skipped": "the model has no tokenizer"}


def test_no_room_for_the_original(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("lowbit.measure.verify.memory_bytes", lambda field: 1000)
    report = lowbit.quantize(tiny_model, "int8-g32", tmp_path / "out")
    assert "are free" in report["measured"]["skipped"]
