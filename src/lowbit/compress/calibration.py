"""Text becomes token windows on which a method watches the activations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lowbit.errors import RequestError

if TYPE_CHECKING:
    from lowbit.model.tokenizer import Tokenizer

SAMPLES, LENGTH = 128, 512
_SLICE = 1 << 16  # characters that are encoded at a time


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file. Raises RequestError for one that is missing, empty or not text."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RequestError(f"calibrate: {path}: {error.strerror}; give a text file") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"calibrate: {path} is not UTF-8 text (byte {error.start} is {data[error.start]:#04x}); "
            "convert it or give another file"
        ) from error
    if "\0" in text:
        raise RequestError(f"calibrate: {path} holds NUL bytes: it is no text; give another file")
    if not text.strip():
        raise RequestError(f"calibrate: {path} is empty; give a text of some thousand words")
    return text


def windows(
    text: str | Sequence[str],
    tokenizer: Tokenizer,
    samples: int = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
) -> np.ndarray:
    """int64 [samples, length]: windows of the text that do not overlap, drawn at random without repetition.

    text: one text, or several, which are encoded one by one and joined
    Raises RequestError if the text has fewer than samples * length tokens.
    """
    if samples < 1 or length < 2:
        raise RequestError(
            f"calibrate: samples={samples}, length={length}; give at least 1 and 2 "
            f"(usual: {SAMPLES}, {LENGTH})"
        )
    parts = [text] if isinstance(text, str) else list(text)
    ids: list[int] = []
    for part in parts:
        for piece in _pieces(part):
            ids += tokenizer.encode(piece, add_special=False)
    available = len(ids) // length
    if available < samples:
        raise RequestError(
            f"calibrate: the text has {len(ids)} tokens, which are {available} windows of {length}, and "
            f"{samples} were asked for; give more text, or --samples {max(available, 1)}"
            + ("" if available else f" --length {max(len(ids), 2)}")
        )
    chosen = np.random.default_rng(seed).permutation(available)[:samples]
    return np.asarray(ids, np.int64)[: available * length].reshape(available, length)[np.sort(chosen)]


def _pieces(text: str) -> list[str]:
    """The text cut at line ends into pieces of about _SLICE characters: encoding one is never quadratic."""
    pieces: list[str] = []
    start = 0
    while start < len(text):
        end = text.find("\n", start + _SLICE)
        end = len(text) if end < 0 else end + 1
        pieces.append(text[start:end])
        start = end
    return pieces
