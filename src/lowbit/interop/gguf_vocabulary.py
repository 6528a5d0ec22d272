"""A tokenizer as GGUF metadata: the inverse of model/gguf_tokenizer.py.

Byte-level BPE becomes "gpt2" with the name of its word splitting; BPE over characters with byte fallback
(SentencePiece) becomes "llama", whose scores say in which order pieces join. What was written is read back
and held against the tokenizer on a text that has everything: one that cuts it otherwise is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lowbit.errors import LowbitError, UnsupportedError
from lowbit.interop.gguf_writer import Pair
from lowbit.model.gguf_tokenizer import SPLITTINGS, gguf_tokenizer
from lowbit.model.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BASE = -1e6  # score of a piece that no merge makes: joined last

# Contractions, digits, cases, punctuation, spaces, line ends, scripts, symbols, code.
PROBE = """\
The quick brown fox, who'd jumped over 3 lazy dogs, couldn't've known it's 12,345.678 o'clock IN THE MORNING!
  Two spaces, three   spaces,\ttabs\t\tand a line that ends in spaces   \n\n\nHELLO World helloWorld X2y3z
naïve café Ærøskøbing straße Ελληνικά Русский язык עברית العربية हिन्दी ไทย 日本語の文章 中文字符 한국어
😀👩‍👩‍👧 ½ ² Ⅷ ١٢٣
for (int i = 0; i <= 10; ++i) { a[i] += f(x) / 2.5e-3; }  // == != && || <tag attr="v"> http://a.b/c?d=e_f-g#h
\r\n~`@#$%^&*()_+-={}[]|\\:;"'<>,.?/ ... --- *** don't DON'T I'LL we're 007 1000000
3.14159 e\u0301 \u00a0 \u3000x
"""


def vocabulary(tokenizer: Tokenizer, vocab_size: int) -> list[Pair]:
    """Metadata from which llama.cpp makes the same tokenizer, chat template included.

    vocab_size: rows of the embedding; ids without a token become unused ones.
    Raises UnsupportedError for a tokenizer that GGUF's kinds do not give again.
    """
    state = json.loads(tokenizer.state())
    model = state["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(
            f"export to GGUF: the tokenizer is {model.get('type')!r}; byte-level BPE and SentencePiece BPE "
            "can be written: take a safetensors target"
        )
    tokens, kinds = _tokens(state, vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    common = _special(tokenizer, state, vocab_size)
    if model.get("byte_fallback"):
        return _checked(_sentencepiece(state, tokens, kinds, common), tokenizer)
    pairs: list[Pair] = [
        ("tokenizer.ggml.model", "str", "gpt2"),
        ("tokenizer.ggml.tokens", "[str]", tokens),
        ("tokenizer.ggml.token_type", "[i32]", kinds),
        ("tokenizer.ggml.merges", "[str]", merges),
        *common,
    ]
    return _with_splitting(pairs, tokenizer, bool(model.get("ignore_merges")))


def _tokens(state: Mapping[str, Any], vocab_size: int) -> tuple[list[str], np.ndarray]:
    """(the token of each id, its kind)."""
    by_id: dict[int, str] = {i: token for token, i in state["model"]["vocab"].items()}
    kinds = np.full(vocab_size, _UNUSED, np.int32)
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    by_id.update({i: entry["content"] for i, entry in added.items()})
    if max(by_id, default=0) >= vocab_size:
        raise UnsupportedError(
            f"export to GGUF: the tokenizer has id {max(by_id)}, the embedding {vocab_size} rows"
        )
    taken = set(by_id.values())
    tokens = []
    for i in range(vocab_size):
        token = by_id.get(i)
        if token is None:
            token = f"[PAD{i}]"
            while token in taken:
                token += "_"
        elif i in added:
            kinds[i] = _CONTROL if added[i]["special"] else _USER_DEFINED
        elif state["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            kinds[i] = _BYTE
        else:
            kinds[i] = _NORMAL
        tokens.append(token)
    unknown = state["model"].get("unk_token")
    if unknown is not None and unknown in taken:
        kinds[tokens.index(unknown)] = _UNKNOWN
    return tokens, kinds


def _special(tokenizer: Tokenizer, state: Mapping[str, Any], vocab_size: int) -> list[Pair]:
    """Ids with a meaning, what is put around a text, and the chat template."""
    ids: dict[str, int | None] = {"bos": tokenizer.bos_id}
    ids.update(dict(zip(("eos", "eot", "eom"), tokenizer.eos_ids)))
    for name, token in (("unknown", "unk_token"), ("padding", "pad_token")):
        text = tokenizer.special_tokens.get(token)
        ids[name] = None if text is None else tokenizer.token_id(text)
    if ids["unknown"] is None and isinstance(state["model"].get("unk_token"), str):
        ids["unknown"] = tokenizer.token_id(state["model"]["unk_token"])
    pairs: list[Pair] = [
        (f"tokenizer.ggml.{name}_token_id", "u32", i)
        for name, i in ids.items()
        if i is not None and i < vocab_size
    ]
    plain, around = tokenizer.encode("a", add_special=False), tokenizer.encode("a")
    pairs.append(
        ("tokenizer.ggml.add_bos_token", "bool", around[: len(around) - len(plain)] == [tokenizer.bos_id])
    )
    end = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    pairs.append(("tokenizer.ggml.add_eos_token", "bool", len(around) > len(plain) and around[-1] == end))
    if tokenizer.chat_template is not None:
        pairs.append(("tokenizer.chat_template", "str", tokenizer.chat_template))
    return pairs


def _with_splitting(pairs: list[Pair], tokenizer: Tokenizer, whole_words: bool) -> list[Pair]:
    """Add the name under which the text falls into the same words."""
    tried = []
    for name, splitting in SPLITTINGS.items():
        if splitting.whole_words == whole_words and splitting not in tried:
            tried.append(splitting)
            named = [pairs[0], ("tokenizer.ggml.pre", "str", name), *pairs[1:]]
            if _same(named, tokenizer):
                return named
    raise UnsupportedError(
        "export to GGUF: the tokenizer splits text into words as none of the known ways "
        f"({', '.join(SPLITTINGS)}); llama.cpp could not tokenize for this model: take a safetensors target"
    )


def _sentencepiece(
    state: Mapping[str, Any], tokens: list[str], kinds: np.ndarray, common: list[Pair]
) -> list[Pair]:
    """Scores: pieces that earlier merges make are joined first."""
    rank: dict[str, int] = {}
    for merge in state["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, len(rank))
    scores = np.array([-float(rank[t]) if t in rank else _BASE for t in tokens], np.float32)
    scores[kinds != _NORMAL] = 0.0
    return [
        ("tokenizer.ggml.model", "str", "llama"),
        ("tokenizer.ggml.pre", "str", "default"),
        ("tokenizer.ggml.tokens", "[str]", tokens),
        ("tokenizer.ggml.scores", "[f32]", scores),
        ("tokenizer.ggml.token_type", "[i32]", kinds),
        ("tokenizer.ggml.add_space_prefix", "bool", _has_prefix(state)),
        *common,
    ]


def _has_prefix(state: Mapping[str, Any]) -> bool:
    """Is a space put before a text? A Prepend normalizer or a Metaspace says so."""
    text = json.dumps([state.get("normalizer"), state.get("pre_tokenizer")])
    if '"Prepend"' in text:
        return True
    return '"Metaspace"' in text and '"prepend_scheme": "never"' not in text


def _checked(pairs: list[Pair], tokenizer: Tokenizer) -> list[Pair]:
    if not _same(pairs, tokenizer):
        raise UnsupportedError(
            "export to GGUF: the tokenizer cuts text otherwise than SentencePiece would with its pieces; "
            "take a safetensors target"
        )
    return pairs


def _same(pairs: list[Pair], tokenizer: Tokenizer) -> bool:
    """Does what would be read from the metadata cut the probe alike?"""
    metadata = {key: value for key, _, value in pairs}
    try:
        again = gguf_tokenizer(metadata, "the exported metadata")
        # Whether a text that begins with a space gets another one is decided otherwise by some tokenizers.
        texts = [PROBE, *(line.lstrip(" ") for line in PROBE.splitlines())]
        return all(again.encode(text) == tokenizer.encode(text) for text in texts)
    except LowbitError:
        return False
