"""tokenizer.bin of llama2.c: pieces of SentencePiece with their scores, and nothing else.

    int32 longest piece in bytes; then for each token float32 score, int32 bytes, the bytes

Spaces are written as spaces, tokens 0 to 2 are <unk>, <s>, </s>, and 3 to 258 single bytes "<0x0A>". How many
tokens there are the model says; a file that ends elsewhere belongs to another model.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from lowbit.errors import CheckpointError
from lowbit.model.gguf_tokenizer import gguf_tokenizer
from lowbit.model.tokenizer import Tokenizer

_CONTROL = ("<unk>", "<s>", "</s>")
_MAX_BYTES = 1 << 26
_KINDS = {"normal": 1, "unknown": 2, "control": 3, "byte": 6}  # tokenizer.ggml.token_type


def find_tokenizer(model: Path, vocabulary: int) -> Tokenizer | None:
    """The tokenizer beside a model file: tokenizer.bin, tok512.bin for 512 tokens, or another *tok*.bin that
    has as many tokens; None where there is none."""
    folder = model.parent
    named = [folder / "tokenizer.bin", folder / f"tok{vocabulary}.bin"]
    for path in dict.fromkeys([*named, *sorted(folder.glob("*tok*.bin"))]):
        if path == model or not path.is_file() or path.stat().st_size > _MAX_BYTES:
            continue
        pieces = read_pieces(path.read_bytes(), vocabulary)
        if pieces is not None:
            return _tokenizer(*pieces, str(path))
    return None


def read_pieces(data: bytes, vocabulary: int) -> tuple[list[bytes], list[float]] | None:
    """(pieces, scores) of a tokenizer.bin of exactly so many tokens; None for any other file."""
    pieces, scores, at = [], [], 4
    for _ in range(vocabulary):
        if at + 8 > len(data):
            return None
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= len(data) - at:
            return None
        pieces.append(data[at : at + length])
        scores.append(score)
        at += length
    return (pieces, scores) if at == len(data) else None


def _tokenizer(pieces: list[bytes], scores: list[float], where: str) -> Tokenizer:
    try:
        tokens = [piece.decode() for piece in pieces]
    except UnicodeDecodeError as error:
        raise CheckpointError(f"open {where}: a piece is not UTF-8; the file is damaged") from error
    kinds = []
    for i, token in enumerate(tokens):
        if i < len(_CONTROL):
            tokens[i], kind = _CONTROL[i], "control" if i else "unknown"
        elif 3 <= i < 259 and token == f"<0x{i - 3:02X}>":
            kind = "byte"
        else:
            tokens[i], kind = token.replace(" ", "\u2581"), "normal"
        kinds.append(_KINDS[kind])
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return gguf_tokenizer(metadata, where)
