"""Task files become documents, and damaged ones an error that names the line."""

import bz2
import gzip
import json

import pytest

from lowbit.errors import RequestError
from lowbit.measure.task_files import TASK_FILES, find_file


def _request(document: int, index: int, context: str, continuation: str, gold: int) -> str:
    request = {"context": context, "continuation": continuation}
    return json.dumps({"doc_id": document, "idx": index, "label": gold, "request": request})


def _read(name, path):
    return list(TASK_FILES[name].read(path))


def test_choices_come_in_order_and_without_the_unconditional_twins(tmp_path):
    lines = [
        _request(1, 0, "Q2 A:", " x", 0),
        _request(0, 1, "Q1 A:", " dog", 1),
        _request(0, 0, "Q1 A:", " cat", 1),
        _request(1, 1, "Q2 A:", " y", 0),
        _request(1_000_000, 0, "A:", " cat", 1),
    ]
    path = tmp_path / "piqa.rc.requests.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    assert find_file(tmp_path, "piqa") == path
    assert _read("piqa", path) == [
        {"context": "Q1 A:", "choices": ["cat", "dog"], "gold": 1},
        {"context": "Q2 A:", "choices": ["x", "y"], "gold": 0},
    ]


def test_winogrande_has_several_contexts(tmp_path):
    path = tmp_path / "winogrande.requests.jsonl"
    path.write_text(_request(0, 0, "so Ann", " left.", 1) + "\n" + _request(0, 1, "so Bea", " left.", 1))
    assert _read("winogrande", path) == [
        {"contexts": ["so Ann", "so Bea"], "continuation": "left.", "gold": 1}
    ]


def test_hellaswag_has_six_lines_a_task(tmp_path):
    path = tmp_path / "hellaswag_val.txt.bz2"
    path.write_bytes(bz2.compress(b"He runs. he\n2\na\nb\nc\nd\n"))
    assert _read("hellaswag", path) == [{"context": "He runs. he", "choices": list("abcd"), "gold": 2}]


@pytest.mark.parametrize(
    ("name", "file", "content", "says"),
    [
        ("piqa", "piqa.requests.jsonl", b"{", "line 1 is no JSON"),
        ("piqa", "piqa.requests.jsonl", b"[1]", "line 1 is a list"),
        ("piqa", "piqa.requests.jsonl", b'{"doc_id": 1}', "line 1 lacks 'idx'"),
        ("piqa", "piqa.requests.jsonl", _request(0, 1, "q", "a", 0).encode(), "document 0 lacks choices"),
        ("piqa", "piqa.requests.jsonl", _request(0, 0, "q", "a", 3).encode(), "document 0 lacks choices"),
        ("piqa", "piqa.requests.jsonl.gz", gzip.compress(b"x" * 9999)[:-20], "damaged"),
        ("piqa", "piqa.requests.jsonl", b"\xff\xfe", "damaged"),
        ("hellaswag", "hellaswag.txt", b"a\n1\nb\n", "not a multiple of 6"),
        ("hellaswag", "hellaswag.txt", b"a\n7\nb\nc\nd\ne\n", "line 2 is '7'"),
        ("gsm8k", "gsm8k_test.jsonl", b'{"question": "?"}', "line 1 lacks question and answer"),
    ],
)
def test_damage_is_named(tmp_path, name, file, content, says):
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(RequestError, match=says):
        _read(name, find_file(tmp_path, name))


def test_a_missing_file_and_an_unknown_task_are_named(tmp_path):
    with pytest.raises(RequestError, match=r"wants one file piqa\*"):
        find_file(tmp_path, "piqa")
    with pytest.raises(RequestError, match="no task 'nonsense'"):
        find_file(tmp_path, "nonsense")
    with pytest.raises(RequestError, match="is no folder"):
        find_file(tmp_path / "none", "piqa")
