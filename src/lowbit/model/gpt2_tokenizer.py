"""vocab.json and merges.txt, as GPT-2 and OPT were published: byte-level BPE without a tokenizer.json.

Source: the files of GPT-2 and the behaviour of transformers' GPT2Tokenizer, to which tests compare it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from lowbit.errors import CheckpointError
from lowbit.model.json_file import read_json

VOCABULARY, MERGES = "vocab.json", "merges.txt"
MAX_MERGES_BYTES = 1 << 26
MAX_ID = 1 << 24


def gpt2_backend(folder: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> Backend:
    """The tokenizer of a directory with vocab.json and merges.txt.

    config: tokenizer_config.json; special: the named tokens ("bos_token", ..), which are cut out of a text
    first. Raises CheckpointError for damaged files.
    """
    vocabulary = _vocabulary(folder / VOCABULARY)
    merges = _merges(folder / MERGES, vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space") is True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in dict.fromkeys(special.values())
            if token
        ]
    )
    begin = special.get("bos_token")
    if config.get("add_bos_token") is True and begin is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=["bos", "$A"],
            special_tokens=[{"id": "bos", "ids": [backend.token_to_id(begin)], "tokens": [begin]}],
        )
    return backend


def _vocabulary(path: Path) -> dict[str, int]:
    vocabulary = read_json(path)
    ids = vocabulary.values()
    if (
        not vocabulary
        or any(type(i) is not int or not 0 <= i < MAX_ID for i in ids)
        or len(set(ids)) < len(ids)
    ):
        raise CheckpointError(f"open {path}: it must give every token an id of its own; fetch it again")
    return vocabulary


def _merges(path: Path, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    try:
        if path.stat().st_size > MAX_MERGES_BYTES:
            raise CheckpointError(f"open {path}: {path.stat().st_size} bytes; it is damaged")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"open {path}: {error}; fetch it again") from error
    merges = []
    for number, line in enumerate(lines):
        if not line or (number == 0 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise CheckpointError(
                f"open {path}: line {number + 1} joins {line[:60]!r}, which {VOCABULARY} does not have; the "
                "two belong to different models"
            )
        merges.append((left, right))
    return merges
