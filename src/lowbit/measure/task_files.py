"""Tasks from files on this machine, where there is no hub: what a folder holds, as documents.

    arc_easy, arc_challenge, openbookqa, piqa   NAME*.requests.jsonl[.gz]: context and continuation of every
    winogrande                                  choice, as the OLMo evaluation package ships them
    hellaswag                                   hellaswag*.txt[.bz2|.gz]: six lines a task, as llama.cpp has
    gsm8k                                       gsm8k*test*.jsonl, and for examples before the question
                                                gsm8k*train*.jsonl

Every document has `context`, `choices` and `gold`; those of winogrande have `contexts`, `continuation` and
`gold`; those of gsm8k `question` and `answer`.
"""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import RequestError

UNCONDITIONAL = 1_000_000  # request files repeat every document without context under ids from here on
MAX_LINE_CHARACTERS = 1 << 20
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}

Document = dict[str, Any]


@dataclass(frozen=True)
class TaskFile:
    """kind: "choices", "contexts" (one continuation behind several contexts) or "problems"."""

    pattern: str
    kind: str
    read: Callable[[Path], Iterator[Document]]
    protocol: str


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file, plain or compressed."""
    opener = _OPEN.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(line) > MAX_LINE_CHARACTERS:
                    raise RequestError(
                        f"read {path}: line {number} has {len(line)} characters; it is no task"
                    )
                yield number, line.rstrip("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RequestError(f"read {path}: {error}; the file is damaged or cut off, fetch it again") from error


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RequestError(f"read {path}: line {number} is no JSON ({error})") from error
        if not isinstance(record, dict):
            raise RequestError(f"read {path}: line {number} is a {type(record).__name__}, not an object")
        yield number, record


def _requests(path: Path) -> Iterator[tuple[list[str], list[str], int]]:
    """(contexts, continuations, gold) of every document, choices in order."""
    rows: dict[int, list[tuple[int, str, str, int]]] = {}
    for number, record in _records(path):
        try:
            document, index, gold = record["doc_id"], record["idx"], record["label"]
            request = record["request"]
            row = (int(index), str(request["context"]), str(request["continuation"]), int(gold))
            document = int(document)
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(
                f"read {path}: line {number} lacks {error}; expected doc_id, idx, label and request with "
                "context and continuation"
            ) from error
        if document < UNCONDITIONAL:
            rows.setdefault(document, []).append(row)
    for document, choices in sorted(rows.items()):
        choices.sort()
        gold = choices[0][3]
        if [choice[0] for choice in choices] != list(range(len(choices))) or not 0 <= gold < len(choices):
            raise RequestError(f"read {path}: document {document} lacks choices; fetch the file again")
        yield [choice[1] for choice in choices], [choice[2] for choice in choices], gold


def _choices(path: Path) -> Iterator[Document]:
    for contexts, continuations, gold in _requests(path):
        yield {"context": contexts[0], "choices": [text.strip() for text in continuations], "gold": gold}


def _contexts(path: Path) -> Iterator[Document]:
    for contexts, continuations, gold in _requests(path):
        yield {"contexts": contexts, "continuation": continuations[0].strip(), "gold": gold}


def _hellaswag(path: Path) -> Iterator[Document]:
    lines = [line for _, line in _lines(path)]
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) % 6:
        raise RequestError(
            f"read {path}: {len(lines)} lines, not a multiple of 6 (context, answer, 4 endings)"
        )
    for at in range(0, len(lines), 6):
        context, gold, *endings = lines[at : at + 6]
        if gold not in ("0", "1", "2", "3"):
            raise RequestError(
                f"read {path}: line {at + 2} is {gold[:40]!r}, the number of an ending is 0 to 3"
            )
        yield {"context": context, "choices": endings, "gold": int(gold)}


def _problems(path: Path) -> Iterator[Document]:
    for number, record in _records(path):
        if not isinstance(record.get("question"), str) or not isinstance(record.get("answer"), str):
            raise RequestError(f"read {path}: line {number} lacks question and answer")
        yield {"question": record["question"], "answer": record["answer"]}


def _shots(name: str, shots: str) -> TaskFile:
    return TaskFile(f"{name}*.requests.jsonl*", "choices", _choices, f"{shots}, the answer's text scored")


TASK_FILES: dict[str, TaskFile] = {
    "arc_easy": _shots("arc_easy", "5 examples"),
    "arc_challenge": _shots("arc_challenge", "5 examples"),
    "openbookqa": _shots("openbookqa", "5 examples"),
    "piqa": _shots("piqa", "no examples"),
    "winogrande": TaskFile(
        "winogrande*.requests.jsonl*", "contexts", _contexts, "5 examples, the text behind the name scored"
    ),
    "hellaswag": TaskFile("hellaswag*.txt*", "choices", _hellaswag, "no examples, the ending scored"),
    "gsm8k": TaskFile("gsm8k*test*.jsonl*", "problems", _problems, "answers generated"),
}


def find_file(folder: Path, name: str, pattern: str | None = None) -> Path:
    """The file of task `name` in `folder`; RequestError when there is none or more than one."""
    if name not in TASK_FILES:
        raise RequestError(f"eval: no task {name!r} is read from files; there are {', '.join(TASK_FILES)}")
    pattern = pattern or TASK_FILES[name].pattern
    if not folder.is_dir():
        raise RequestError(f"eval: {folder} is no folder; --task-data names one that holds {pattern}")
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "none"
        raise RequestError(f"eval: task {name} wants one file {pattern} in {folder}; there is {listed}")
    return found[0]
