"""Traces of real services: when requests came, how long their prompts and answers were, what they shared."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lowbit.errors import RequestError

BLOCK_TOKENS = 512  # of a Mooncake trace: each of its hash ids names a block of so many tokens


@dataclass(frozen=True)
class Request:
    """One request of a load. at_seconds: when, after the start; 0 in a load of fixed concurrency.

    blocks: names of the parts that the prompt begins with, `BLOCK_TOKENS` long each; requests that name the
    same ones share that beginning.
    """

    prompt_tokens: int
    answer_tokens: int
    at_seconds: float = 0.0
    blocks: tuple[int, ...] = ()


def replay(
    path: Path,
    *,
    scale: float = 1.0,
    lengths: float = 1.0,
    longest: int | None = None,
    count: int | None = None,
) -> tuple[list[Request], int]:
    """The requests of a trace, `scale` times as fast, with prompts and answers `lengths` times as long.

    Reads Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) and Mooncake's lines of JSON (timestamp in
    milliseconds, input_length, output_length, hash_ids). Requests of more than `longest` tokens, prompt and
    answer together, are left out, and their number is returned beside the first `count` others.
    """
    requests: list[Request] = []
    left_out = 0
    start: float | None = None
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.read(1)
        file.seek(0)
        entries: Iterable[Any] = csv.DictReader(file)
        read: Callable[[Any], tuple[float, int, int, tuple[int, ...]]] = _azure
        if first == "{":
            entries, read = filter(str.strip, file), _mooncake
        for number, entry in enumerate(entries, 1):
            try:
                moment, prompt, answer, blocks = read(entry)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise RequestError(f"{path.name}: entry {number} is not of a trace ({error!r})") from error
            prompt, answer = (max(1, round(tokens * lengths)) for tokens in (prompt, answer))
            if longest is not None and prompt + answer > longest:
                left_out += 1
                continue
            start = moment if start is None else start
            requests.append(Request(prompt, answer, max(0.0, moment - start) / scale, blocks))
            if len(requests) == count:
                break
    if not requests:
        raise RequestError(f"{path.name}: no requests" + (f" of at most {longest} tokens" if longest else ""))
    return requests, left_out


def _mooncake(line: str) -> tuple[float, int, int, tuple[int, ...]]:
    entry = json.loads(line)
    blocks = tuple(int(block) for block in entry.get("hash_ids", ()))
    return float(entry["timestamp"]) / 1000, int(entry["input_length"]), int(entry["output_length"]), blocks


def _azure(row: dict[str, str]) -> tuple[float, int, int, tuple[int, ...]]:
    # The time zone, if any, is the same in all rows; Python reads six digits of a second, not seven.
    day, _, fraction = row["TIMESTAMP"].split("+")[0].rstrip("Z").partition(".")
    whole = datetime.strptime(day, "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc).timestamp()
    return whole + float(f"0.{fraction or 0}"), int(row["ContextTokens"]), int(row["GeneratedTokens"]), ()
