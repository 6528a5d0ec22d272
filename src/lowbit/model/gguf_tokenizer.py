"""Build a tokenizer from the metadata of a GGUF file.

`tokenizer.ggml.model` is "gpt2" for byte-level BPE, whose word splitting `tokenizer.ggml.pre` names, or
"llama" for SentencePiece, which GGUF stores as pieces with scores. SentencePiece's BPE joins, again and
again, the neighbours whose joint piece scores highest; that is BPE with every way to cut a piece in two as a
merge, ranked by the piece's score. (A unigram model would maximise a sum instead and cut differently.)

Sources: the regular expressions are those of the models' own tokenizer.json; names and flags those of
llama.cpp's vocabulary loader; the tests hold both kinds against llama.cpp's published test vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.model.gguf_file import int_or
from lowbit.model.tokenizer import Tokenizer, guarded

# Kinds of tokens in tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitting:
    """How text falls into the words that BPE works on.

    patterns: regular expressions, each cutting what the one before left.
    whole_words: a word that is a token is taken whole, whatever its merges.
    bos: a text begins with the opening token where the file does not say.
    nfc: text is normalized to NFC first.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False


_GPT2_WORDS = Splitting((_GPT2,))
_NEOX_WORDS = Splitting((_GPT2,), nfc=True)
_CL100K_WORDS = Splitting((_LLAMA3,))
_DIGITS_AND_WORDS = Splitting((r"\p{N}", _GPT2))
_LLAMA3_WORDS = Splitting((_LLAMA3,), whole_words=True, bos=True)
_QWEN2_WORDS = Splitting((_QWEN2,), nfc=True)

# tokenizer.ggml.pre -> splitting
SPLITTINGS: dict[str, Splitting] = {
    "default": Splitting((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2_WORDS,
    "phi-2": _GPT2_WORDS,
    "mpt": _NEOX_WORDS,
    "olmo": _NEOX_WORDS,
    "exaone4": _GPT2_WORDS,
    "smollm": _DIGITS_AND_WORDS,
    "starcoder": _DIGITS_AND_WORDS,
    "refact": _DIGITS_AND_WORDS,
    "command-r": _DIGITS_AND_WORDS,
    "codeshell": _DIGITS_AND_WORDS,
    "exaone": _DIGITS_AND_WORDS,
    "minerva-7b": _DIGITS_AND_WORDS,
    "llama-bpe": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "falcon3": _LLAMA3_WORDS,
    "pixtral": _LLAMA3_WORDS,
    "smaug-bpe": _CL100K_WORDS,
    "dbrx": _CL100K_WORDS,
    "gpt-4o": Splitting((_GPT4O,)),
    "llama4": Splitting((_GPT4O,)),
    "qwen2": _QWEN2_WORDS,
    "deepseek-r1-qwen": _QWEN2_WORDS,
    "tekken": Splitting((_TEKKEN,), whole_words=True, bos=True),
}


def gguf_tokenizer(metadata: Mapping[str, Any], path: str) -> Tokenizer:
    """The tokenizer that a GGUF file describes; `path` only names it in errors.

    Raises CheckpointError when the description is missing or contradicts itself, UnsupportedError for a
    kind of tokenizer or of word splitting that is unknown.
    """
    vocabulary = _Vocabulary(metadata, path)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, bos_default = _byte_level_bpe(vocabulary)
    elif kind == "llama":
        backend, bos_default = _sentencepiece_bpe(vocabulary)
    else:
        raise UnsupportedError(
            f"open {path}: tokenizer.ggml.model is {kind!r}; lowbit builds 'gpt2' and 'llama': use "
            "the model's transformers directory instead"
        )
    _add_special_tokens(backend, vocabulary)
    bos, eos = vocabulary.special_id("bos"), vocabulary.special_id("eos")
    begin = bos if _flag(metadata, "tokenizer.ggml.add_bos_token", bos_default) else None
    end = eos if _flag(metadata, "tokenizer.ggml.add_eos_token", False) else None
    _add_template(backend, vocabulary, begin, end)
    names = {
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": vocabulary.special_id("unknown"),
        "pad_token": vocabulary.special_id("padding"),
    }
    special = {name: vocabulary.tokens[i] for name, i in names.items() if i is not None}
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        eos_ids=gguf_eos_ids(metadata),
        bos_id=bos,
        chat_template=template if isinstance(template, str) else None,
        special_tokens=special,
    )


def gguf_eos_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer: end of text, of turn and of message."""
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and i != 0xFFFFFFFF))


class _Vocabulary:
    """The checked lists of tokens, kinds and scores."""

    def __init__(self, metadata: Mapping[str, Any], path: str):
        self.metadata, self.path = metadata, path
        self.tokens = self._strings("tokens")
        if not self.tokens:
            raise CheckpointError(
                f"open {path}: tokenizer.ggml.tokens is missing or empty; convert the model again"
            )
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            repeated = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise CheckpointError(
                f"open {path}: tokenizer.ggml.tokens holds {repeated!r} twice; ids would be ambiguous"
            )
        kinds = self._numbers("token_type")
        self.kinds = np.full(len(self.tokens), _NORMAL) if kinds is None else kinds

    def merges(self) -> list[str]:
        return self._strings("merges")

    def scores(self) -> np.ndarray:
        scores = self._numbers("scores")
        if scores is None or not np.isfinite(scores).all():
            raise CheckpointError(
                f"open {self.path}: tokenizer.ggml.scores is missing or not finite, which 'llama' needs"
            )
        return scores

    def special_id(self, name: str) -> int | None:
        """tokenizer.ggml.<name>_token_id, checked; None where the file has none."""
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is None or value in (-1, 0xFFFFFFFF):
            return None
        if int_or(value, -1) < 0 or value >= len(self.tokens):
            raise CheckpointError(
                f"open {self.path}: tokenizer.ggml.{name}_token_id is {value!r}, the vocabulary has "
                f"{len(self.tokens)} tokens; convert the model again"
            )
        return value

    def _strings(self, name: str) -> list[str]:
        value = self.metadata.get(f"tokenizer.ggml.{name}", [])
        if not isinstance(value, list) or (value and not isinstance(value[0], str)):
            if not (isinstance(value, np.ndarray) and value.size == 0):
                raise CheckpointError(f"open {self.path}: tokenizer.ggml.{name} is not a list of strings")
            return []
        return value

    def _numbers(self, name: str) -> np.ndarray | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            raise CheckpointError(
                f"open {self.path}: tokenizer.ggml.{name} does not hold one number for each of the "
                f"{len(self.tokens)} tokens; convert the model again"
            )
        return value


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(key)
    return value if isinstance(value, bool) else default


def _build(vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any) -> Backend:
    return guarded(
        lambda: Backend(models.BPE(vocab=vocabulary.ids, merges=merges, **options)),
        lambda problem: CheckpointError(f"open {vocabulary.path}: the tokenizer is damaged ({problem})"),
    )


def _byte_level_bpe(vocabulary: _Vocabulary) -> tuple[Backend, bool]:
    usual = "mpt" if vocabulary.metadata.get("general.architecture") == "gptneox" else "default"
    name = vocabulary.metadata.get("tokenizer.ggml.pre", usual)
    splitting = SPLITTINGS.get(name) if isinstance(name, str) else None
    if splitting is None:
        raise UnsupportedError(
            f"open {vocabulary.path}: tokenizer.ggml.pre is {name!r}; lowbit knows {', '.join(SPLITTINGS)}: "
            "use the model's transformers directory instead"
        )
    merges: list[tuple[str, str]] = []
    for merge in vocabulary.merges():
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    backend = _build(vocabulary, merges, ignore_merges=splitting.whole_words)
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(splitting.patterns)
    backend.decoder = decoders.ByteLevel()
    return backend, splitting.bos


def _pre_tokenizer(patterns: tuple[str, ...]) -> Any:
    """The splits in a row, then bytes as printable characters. GPT-2's own pattern and single digits have
    implementations in the library that are faster than a regular expression."""
    steps: list[Any] = []
    for pattern in patterns:
        if pattern == r"\p{N}":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif pattern == _GPT2 and pattern == patterns[-1]:
            continue
        else:
            steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=patterns[-1] == _GPT2))
    return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> tuple[Backend, bool]:
    unknown = vocabulary.special_id("unknown")
    backend = _build(
        vocabulary,
        _merges_from_scores(vocabulary),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = _flag(vocabulary.metadata, "tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend, True


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every way to cut a normal piece into two pieces; the highest-scoring piece first, and of one piece the
    cut with the longest left part first."""
    ids, tokens = vocabulary.ids, vocabulary.tokens
    normal = vocabulary.kinds == _NORMAL
    order = np.argsort(-vocabulary.scores().astype(np.float64), kind="stable")
    merges = []
    for i in order[normal[order]].tolist():
        piece = tokens[i]
        for cut in range(len(piece) - 1, 0, -1):
            left = piece[:cut]
            if left in ids:
                right = piece[cut:]
                if right in ids:
                    merges.append((left, right))
    return merges


def _add_special_tokens(backend: Backend, vocabulary: _Vocabulary) -> None:
    """Tokens that are found in a text before it is split: control tokens, which decoding leaves out, and
    those that the model's makers defined, which it keeps."""
    special = np.flatnonzero((vocabulary.kinds == _CONTROL) | (vocabulary.kinds == _UNKNOWN)).tolist()
    plain = np.flatnonzero(vocabulary.kinds == _USER_DEFINED).tolist()
    for ids, is_special in ((special, True), (plain, False)):
        tokens = [
            AddedToken(vocabulary.tokens[i], special=is_special, normalized=False)
            for i in ids
            if vocabulary.tokens[i]
        ]
        if tokens:
            (backend.add_special_tokens if is_special else backend.add_tokens)(tokens)


def _add_template(backend: Backend, vocabulary: _Vocabulary, begin: int | None, end: int | None) -> None:
    """Put the opening and closing token around a text when special tokens are asked for."""
    around = [i for i in (begin, end) if i is not None]
    if around:
        names = ["bos" if begin is not None else "", "$A", "eos" if end is not None else ""]
        tokens = [(name, i) for name, i in (("bos", begin), ("eos", end)) if i is not None]
        backend.post_processor = processors.TemplateProcessing(
            single=[name for name in names if name],
            special_tokens=[{"id": name, "ids": [i], "tokens": [vocabulary.tokens[i]]} for name, i in tokens],
        )
