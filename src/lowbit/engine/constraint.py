"""Answers of a given form: JSON of a schema, a regular expression, a grammar, one of several texts.

A `Grammar` describes the form and is plain data. A model's `Grammars` compiles it, on llguidance, into a
`GrammarConstraint`, which says at each step which tokens may come next. The sampler never sees the others, so
the answer has the form by construction; where nothing more may follow, it ends.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import RequestError, UnsupportedError

MAX_CHARACTERS = 1 << 20  # of a grammar's text
MAX_CHOICES = 10_000
KEPT = 64  # compiled grammars
MAX_FORCED = 32  # tokens guessed at once: a cache of few bits can take back no more than 64
# Between the parts of JSON: what people and models write, but no endless run of spaces, in which small models
# get lost until max_tokens.
_SPACE = r"( |\r?\n[ \t]{0,64})"
# Keywords of JSON Schema whose values are schemas, by the shape of the value.
_SEARCHED = 1 << 20  # characters compiled to find where a schema is faulty
_SCHEMA_MAPS = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
_SCHEMAS = ("additionalProperties", "additionalItems", "items", "contains", "not", "if", "then", "else")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")


@dataclass(frozen=True)
class Grammar:
    """A form that an answer must have. Make it with one of the class methods.

    kind: "json_schema", "regex", "lark" or "choice"; text: the schema or the choices as JSON, the expression,
    or the grammar.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        if len(self.text) > MAX_CHARACTERS:
            raise RequestError(
                f"{self.kind}: {len(self.text)} characters; at most {MAX_CHARACTERS} are allowed, simplify it"
            )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """JSON that a schema (draft 2020-12, as a mapping or as JSON text) describes."""
        try:
            if isinstance(schema, str):
                schema = json.loads(schema)
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError(f"json_schema: not JSON: {error}; correct it") from error
        if not isinstance(schema, Mapping | bool):
            raise RequestError(
                f"json_schema: a schema is an object or a boolean and this is a {type(schema).__name__}; "
                'give one such as {"type": "object"}'
            )
        if schema is False:
            raise RequestError("json_schema: nothing fits the schema false; give one that allows something")
        return cls("json_schema", "{}" if schema is True else text)

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that matches `pattern` as a whole (Rust syntax: no look-around, no back-references)."""
        return cls("regex", _text("regex", pattern))

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """A text of a context-free grammar in Lark notation, whose rule `start` is the whole."""
        return cls("lark", _text("lark", grammar))

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """One of several texts."""
        if isinstance(choices, str) or not choices or len(choices) > MAX_CHOICES:
            raise RequestError(
                f"choice: {choices!r:.80} must be a list of 1 to {MAX_CHOICES} strings; give one"
            )
        for i, text in enumerate(choices):
            if not isinstance(text, str) or not text:
                raise RequestError(f"choice: entry {i} is {text!r:.80}; give a non-empty string")
        return cls("choice", json.dumps(list(choices), ensure_ascii=False))

    def check(self) -> None:
        """Raise RequestError, with the place, if this cannot be compiled. Needs no model, and so refuses
        special tokens (<|name|>) in a Lark grammar, which `Grammars.constraint` knows."""
        self._check(None)

    def _check(self, tokenizer: Any) -> None:
        problem = _problem(self._compiled(), tokenizer)
        if problem:
            raise RequestError(f"{self.kind}: {self._explain(problem)}")

    def _compiled(self) -> str:
        """In llguidance's own notation."""
        matcher = llguidance().LLMatcher
        if self.kind == "json_schema":
            return _schema_grammar(self.text)
        if self.kind == "regex":
            return matcher.grammar_from_regex(self.text)
        if self.kind == "choice":
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(self.text))
            return matcher.grammar_from_lark(f"start: {texts}")
        return matcher.grammar_from_lark(self.text)

    def _explain(self, problem: str) -> str:
        """llguidance's message, short, and where in the text it applies."""
        regex = re.search(r"regex parse error:\n    (.*)\n    ( *)\^+\nerror: (.*)", problem)
        found = f"{regex[3]} at character {len(regex[2]) + 1} of {regex[1]!r:.200}" if regex else ""
        if self.kind == "json_schema":
            place = _place(json.loads(self.text), problem)
            return f"at {place or 'the top'}: {found or problem.splitlines()[0][:500]}; correct or remove it"
        if self.kind == "lark":
            at = re.match(r"at (\d+)\((\d+)\): |(\d+)\((\d+)\): ", problem)
            where = f"line {at[1] or at[3]}, column {at[2] or at[4]}: " if at else ""
            rest = problem[at.end() :] if at else problem
            return f"{where}{found or rest.splitlines()[0][:500]}; correct it"
        return f"{found or problem.splitlines()[0][:500]}; correct it"


class GrammarConstraint:
    """Where one answer stands in its grammar.

    Only `accept` moves on; the other methods leave the state as it is.
    """

    def __init__(self, matcher: Any, vocabulary: int, columns: int) -> None:
        """vocabulary: tokens of the model; columns: tokens that `matcher` knows."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._words = (columns + 31) // 32

    @property
    def finished(self) -> bool:
        """True once nothing may follow."""
        return self._matcher.is_stopped()

    def mask(self) -> np.ndarray:
        """uint32 [ceil(vocabulary / 32)]: bit t % 32 of word t // 32 allows token t to come next.

        End-of-text tokens are among them where the answer may end.
        """
        return self.masks(())[0][0]

    def masks(self, drafts: Sequence[int]) -> tuple[np.ndarray, int]:
        """The masks before each guess and after the last, and how many of the guesses the grammar allows.

        Returns (uint32 [k + 1, ceil(vocabulary / 32)], k). A guess that would finish the answer is left out:
        it may still be sampled, and then nothing follows.
        """
        rows = np.zeros((len(drafts) + 1, self._words), np.uint32)
        taken = 0
        for row in rows:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            token = drafts[taken] if taken < len(drafts) else -1
            if (
                token < 0
                or not row[token // 32] >> (token % 32) & 1
                or not self._matcher.consume_token(token)
            ):
                break
            if self._matcher.is_stopped():
                self._matcher.rollback(1)
                break
            taken += 1
        if taken:
            self._matcher.rollback(taken)
        self._refuse_errors()
        return rows[: taken + 1, : (self._vocabulary + 31) // 32], taken

    def forced(self, limit: int) -> list[int]:
        """Tokens that spell what must come next in any case, at most `limit`: good guesses."""
        return list(self._matcher.compute_ff_tokens()[: min(limit, MAX_FORCED)]) if limit > 0 else []

    def accept(self, token_id: int) -> None:
        """The token was chosen."""
        self._matcher.consume_token(token_id)
        self._refuse_errors()

    def _refuse_errors(self) -> None:
        if self._matcher.is_error():
            reason = (self._matcher.get_error().splitlines() or [""])[0]
            raise RequestError(f"grammar: {reason[:300]}; simplify the grammar")


class Grammars:
    """Grammars compiled for the tokens of one model. Safe to use from several threads."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos_ids: Sequence[int]) -> None:
        """tokenizer: of `lowbit.model`; vocabulary: rows of the model's head; eos_ids: end-of-text."""
        if tokenizer is None:
            raise UnsupportedError("grammar: this model has no tokenizer; put its tokenizer.json beside it")
        self._vocabulary = vocabulary
        tokens = [tokenizer.token_bytes(i) for i in range(vocabulary)]
        ends = [i for i in eos_ids if i < vocabulary]
        if not ends:  # llguidance needs one: a column that the model does not have
            ends = [len(tokens)]
            tokens.append(b"")
        self._columns = len(tokens)
        self._tokenizer = llguidance().LLTokenizer(_TokenTable(tokenizer, tokens, ends), eos_token=ends)
        self._compiled: dict[Grammar, Any] = {}
        self._lock = threading.Lock()

    def constraint(self, grammar: Grammar) -> GrammarConstraint:
        """A new answer in this form. Raises RequestError if the grammar is faulty or no text fits it."""
        matcher = self._compiled.get(grammar)
        if matcher is None:
            grammar._check(self._tokenizer)
            matcher = llguidance().LLMatcher(self._tokenizer, grammar._compiled(), log_level=0)
            probe = matcher.deep_copy()
            probe.compute_bitmask()
            if probe.is_error():
                reason = probe.get_error().splitlines()[0][:300]
                reason = "no text fits it" if reason.startswith("NoExtension") else reason
                raise RequestError(f"{grammar.kind}: {reason}; correct or simplify it")
            with self._lock:
                if len(self._compiled) >= KEPT:
                    del self._compiled[next(iter(self._compiled))]
                self._compiled[grammar] = matcher
        return GrammarConstraint(matcher.deep_copy(), self._vocabulary, self._columns)


class _TokenTable:
    """What llguidance asks of a tokenizer. The bytes of a token are those that our own text has."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Any, tokens: list[bytes], ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokens
        self.eos_token_id = ends[0]
        self.special_token_ids = [i for i in range(len(tokens)) if i in ends or tokenizer.is_special(i)]

    def __call__(self, text: str) -> list[int]:
        """Tokens whose bytes are exactly `text`, as the model would write it within a text.

        A SentencePiece tokenizer puts a space before a text; behind a line feed it does not.
        """
        for lead in ("", "\n"):
            ids = self._tokenizer.encode(lead + text, add_special=False)
            said = b""
            while ids and said.lstrip(b" ") != lead.encode():
                said += self.tokens[ids.pop(0)]
            if b"".join(self.tokens[i] for i in ids) == text.encode():
                return ids
        return self._longest_first(text.encode())

    def _longest_first(self, text: bytes) -> list[int]:
        known = {piece: i for i, piece in enumerate(self.tokens) if piece and i not in self.special_token_ids}
        ids: list[int] = []
        at, longest = 0, max(map(len, known))
        while at < len(text):
            size = next((n for n in range(longest, 0, -1) if text[at : at + n] in known), 0)
            if not size:
                return ids  # no token has this byte
            ids.append(known[text[at : at + size]])
            at += size
        return ids


def llguidance() -> Any:
    """The library, imported on first use."""
    try:
        import llguidance
    except ImportError as error:
        raise UnsupportedError(
            "grammar: answers of a given form need the package llguidance; pip install 'lowbit[serve]'"
        ) from error
    return llguidance


def _text(kind: str, value: object) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{kind}: received {type(value).__name__}, it must be a string; give one")
    return value


def _schema_grammar(text: str) -> str:
    return llguidance().LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": _SPACE})


def _problem(compiled: str, tokenizer: Any = None) -> str:
    """llguidance's complaint about a grammar; empty if it has none."""
    faulty, messages = llguidance().LLMatcher.validate_grammar_with_warnings(compiled, tokenizer)
    return messages[0] if faulty else ""


def _place(schema: Any, problem: str) -> str:
    """JSON pointer to the innermost part of `schema` that alone, with the definitions, has this problem."""
    shared = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
    place, part, left = "", schema, _SEARCHED
    while True:
        for step, child in _parts(part):
            alone = json.dumps({**shared, **child})
            left -= len(alone)
            if left < 0:
                return place
            if _problem(_schema_grammar(alone)) == problem:
                place, part = f"{place}/{step}", child
                break
        else:
            return place


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(pointer, schema) of the schemas directly within `schema`."""
    found: list[tuple[str, Any]] = []
    for word in _SCHEMA_MAPS:
        if isinstance(schema.get(word), Mapping):
            escaped = ((k.replace("~", "~0").replace("/", "~1"), part) for k, part in schema[word].items())
            found += [(f"{word}/{name}", part) for name, part in escaped]
    found += [(word, schema[word]) for word in _SCHEMAS if word in schema]
    for word in _SCHEMA_LISTS:
        if isinstance(schema.get(word), list):
            found += [(f"{word}/{i}", part) for i, part in enumerate(schema[word])]
    yield from ((pointer, part) for pointer, part in found if isinstance(part, Mapping))
