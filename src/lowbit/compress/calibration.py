"""Text becomes token windows on which a method watches the activations."""

from __future__ import annotations

import gzip
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lowbit.errors import RequestError

if TYPE_CHECKING:
    from lowbit.model.checkpoint import Checkpoint
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


def calibration_windows(
    source: str | os.PathLike[str] | Sequence[str] | np.ndarray | None,
    checkpoint: Checkpoint,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """int64 [windows, positions] for one model.

    source: path of a text file, a sequence of texts, token ids, or None: the shipped text
    samples: windows; None: 128, or as many as the text has
    length: positions of a window; None: 512, or what the model holds
    Raises RequestError for a model without tokenizer, or for text that is not there, empty or too short.
    """
    config = checkpoint.config
    if isinstance(source, np.ndarray):
        if source.ndim != 2 or source.dtype.kind not in "iu" or not source.size:
            raise RequestError(
                f"calibrate: token ids are {source.dtype} {list(source.shape)}; give integers "
                "[windows, positions]"
            )
        if source.min() < 0 or source.max() >= config.vocab_size:
            raise RequestError(
                f"calibrate: token ids are {source.min()} to {source.max()}; the model has "
                f"{config.vocab_size}"
            )
        return source.astype(np.int64)
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise RequestError(
            f"calibrate: {checkpoint.path} has no tokenizer; give calibration as token ids "
            "[windows, positions]"
        )
    text: str | Sequence[str]
    if source is None:
        text = gzip.decompress((Path(__file__).parent / "calibration.txt.gz").read_bytes()).decode()
    elif isinstance(source, (str, os.PathLike)):
        text = read_text(source)
    else:
        text = list(source)
    if length is None:
        length = min(LENGTH, config.max_position)
    elif length > config.max_position:
        raise RequestError(f"calibrate: length={length}; the model holds {config.max_position} tokens")
    return windows(text, tokenizer, samples, length, seed)


def windows(
    text: str | Sequence[str],
    tokenizer: Tokenizer,
    samples: int | None = SAMPLES,
    length: int = LENGTH,
    seed: int = 0,
) -> np.ndarray:
    """int64 [samples, length]: windows of the text that do not overlap, drawn at random without repetition.

    text: one text, or several, which are encoded one by one and joined
    samples: None: 128, or as many as there are
    Raises RequestError if the text has fewer than samples * length tokens.
    """
    if (samples is not None and samples < 1) or length < 2:
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
    wanted = min(SAMPLES, max(available, 1)) if samples is None else samples
    if available < wanted:
        raise RequestError(
            f"calibrate: the text has {len(ids)} tokens, which are {available} windows of {length}, and "
            f"{wanted} were asked for; give more text, or --samples {max(available, 1)}"
            + ("" if available else f" --length {max(len(ids), 2)}")
        )
    chosen = np.random.default_rng(seed).permutation(available)[:wanted]
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
