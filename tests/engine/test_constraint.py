"""Answers of a given form: what is sampled within the masks has it, and faults are named with their place."""

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from lowbit.engine import constraint
from lowbit.engine.constraint import Grammar, Grammars
from lowbit.errors import RequestError, UnsupportedError
from lowbit.model.tokenizer import load_tokenizer

EOS = 256
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("llguidance", reason="answers of a given form need llguidance")


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model, [EOS])


@pytest.fixture(scope="module")
def grammars(tokenizer, library):
    return Grammars(tokenizer, 260, [EOS])


def allowed(mask):
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def say(grammars, grammar, rng, at_most=600):
    """A random text within the masks."""
    state, ids = grammars.constraint(grammar), []
    while not state.finished and len(ids) < at_most:
        choices = allowed(state.mask())
        assert choices and max(choices) <= EOS, "special tokens are no text"
        # Ends are preferred, or a random string would hardly ever close.
        closing = [t for t in choices if t in {*b'"}]', EOS}]
        token = rng.choice(closing if closing and rng.random() < 0.4 else choices)
        state.accept(token)
        if token == EOS:
            assert state.finished
            break
        ids.append(token)
    assert state.finished, bytes(ids)
    return bytes(ids).decode()


@pytest.mark.parametrize("seed", range(12))
def test_random_answers_have_the_form(grammars, seed):
    rng = random.Random(seed)
    person = json.loads(say(grammars, Grammar.json_schema(PERSON), rng))
    assert set(person) == {"name", "age"} and isinstance(person["name"], str) and len(person["name"]) <= 8
    assert isinstance(person["age"], int) and person["age"] <= 120
    assert isinstance(json.loads(say(grammars, Grammar.json_object(), rng)), dict)
    assert re.fullmatch(r"[a-c]{2,4}-[0-9]{3}", say(grammars, Grammar.regex(r"[a-c]{2,4}-[0-9]{3}"), rng))
    choices = ["yes", "no", 'a "quoted"\nline \\', "æøå/漢"]
    assert say(grammars, Grammar.choice(choices), rng) in choices
    sums = say(grammars, Grammar.lark('start: number ("+" number)~1..5\nnumber: /[0-9]{1,3}/'), rng)
    assert re.fullmatch(r"\d{1,3}(\+\d{1,3}){1,5}", sums)


def test_the_layout_of_a_mask(grammars):
    state = grammars.constraint(Grammar.choice(["!A", "hB"]))
    mask = state.mask()
    assert mask.dtype == np.uint32 and mask.shape == (9,)  # 260 tokens
    expected = np.zeros(9, np.uint32)
    expected[ord("!") // 32] = 1 << ord("!") % 32
    expected[ord("h") // 32] |= 1 << ord("h") % 32
    assert mask.tolist() == expected.tolist()
    state.accept(ord("h"))
    assert allowed(state.mask()) == [ord("B")]
    assert not state.finished
    state.accept(ord("B"))
    assert state.finished and allowed(state.mask()) == [EOS]


def test_where_it_may_end_or_go_on(grammars):
    state = grammars.constraint(Grammar.choice(["yes", "yes please"]))
    for c in b"yes":
        state.accept(c)
    assert not state.finished and allowed(state.mask()) == [ord(" "), EOS]
    state.accept(EOS)
    assert state.finished


def test_spaces_between_parts_are_bounded(grammars):
    pretty = json.dumps({"name": "x", "age": 3}, indent=4).encode()
    for text, fits in [
        (pretty, True),
        (b'{"name":"x","age":3}', True),
        (b'{  "name"', False),
        (b"{\n\n", False),
    ]:
        state = grammars.constraint(Grammar.json_schema(PERSON))
        got = True
        for c in text:
            got = got and c in allowed(state.mask())
            if got:
                state.accept(c)
        assert got == fits, text


def test_masks_before_guesses(grammars):
    text = list(b'{"name":"Al","age":7}')
    state, ahead = (grammars.constraint(Grammar.json_schema(PERSON)) for _ in range(2))
    rows, k = state.masks(text[:10])
    assert k == 10 and rows.shape == (11, 9)
    for row, token in zip(rows, text):
        assert row.tolist() == ahead.mask().tolist()
        ahead.accept(token)
    # Nothing has moved; a guess outside the grammar ends the row.
    wrong = [*text[:4], ord("!"), *text[5:8]]
    again, k = state.masks(wrong)
    assert k == 4 and np.array_equal(again, rows[:5])
    assert np.array_equal(state.mask(), rows[0])
    # The guess that would finish the answer is left out: after it nothing may be sampled.
    rows, k = state.masks(text)
    assert k == len(text) - 1 and allowed(rows[-1]) == sorted(b"}\r\n 0123456789")
    for token in text:
        state.accept(token)
    assert state.finished
    assert state.masks([ord("x")])[1] == 0


def test_what_must_come_is_guessed(grammars):
    state = grammars.constraint(Grammar.regex("(Once upon a time|Once more), x+"))
    assert bytes(state.forced(100)) == b"Once "
    assert bytes(state.forced(3)) == b"Onc" and state.forced(0) == []
    for c in b"Once u":
        state.accept(c)
    assert bytes(state.forced(100)) == b"pon a time, x"


def test_answers_do_not_share_a_state(grammars):
    a, b = (grammars.constraint(Grammar.choice(["ab"])) for _ in range(2))
    a.accept(ord("a"))
    assert allowed(a.mask()) == [ord("b")] and allowed(b.mask()) == [ord("a")]


def test_compiled_grammars_are_bounded(grammars, monkeypatch):
    monkeypatch.setattr(constraint, "KEPT", 2)
    monkeypatch.setattr(grammars, "_compiled", {})
    for text in ("a", "b", "c", "a", "d"):
        assert allowed(grammars.constraint(Grammar.choice([text])).mask()) == [ord(text)]
    assert [grammar.text for grammar in grammars._compiled] == ['["a"]', '["d"]']


def test_several_threads_compile(grammars, monkeypatch):
    monkeypatch.setattr(constraint, "KEPT", 3)
    monkeypatch.setattr(grammars, "_compiled", {})

    def masks(worker):
        texts = [chr(97 + (worker + i) % 12) for i in range(60)]
        return all(allowed(grammars.constraint(Grammar.choice([t])).mask()) == [ord(t)] for t in texts)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(masks, range(6)))
    assert len(grammars._compiled) <= 3


def test_a_model_without_an_end_token(tokenizer, library):
    state = Grammars(tokenizer, 256, []).constraint(Grammar.regex("a+"))
    assert state.mask().shape == (8,)
    state.accept(ord("a"))
    assert allowed(state.mask()) == [ord("a")]  # it may end, but has no token for it
    finished = Grammars(tokenizer, 256, []).constraint(Grammar.regex("a"))
    finished.accept(ord("a"))
    assert finished.finished


def test_rows_of_the_head_beyond_the_tokenizer(tokenizer, library):
    mask = Grammars(tokenizer, 300, [EOS]).constraint(Grammar.lark("start: /(.|\\n)*/")).mask()
    assert mask.shape == (10,) and max(allowed(mask)) == EOS
    assert set(range(128)) <= set(allowed(mask))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"properties": {"a": {"type": "integer"}, "b": {"type": "strin"}}}, r"at /properties/b: .*strin"),
        (
            {
                "properties": {
                    "x/y": {"items": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "a(b"}]}}
                }
            },
            r"at /properties/x~1y/items/anyOf/1: unclosed group at character 2 of 'a\(b'",
        ),
        (
            {"$defs": {"d": {"contains": {}}}, "properties": {"k": {"$ref": "#/$defs/d"}}},
            r"at /\$defs/d: .*contains",
        ),
        ({"type": "integer", "minimum": 5, "maximum": 3}, r"at the top: .*minimum \(5\)"),
        ({"$ref": "#/nope"}, r"/nope"),
        ({"$ref": "http://example.org/s.json"}, r"does not fetch"),
        ("{bad", r"line 1 column 2"),
        ("[1]", r"is a list"),
        (False, r"nothing fits"),
        ({"maximum": float("nan")}, r"not JSON"),
        ({1: {2}}, r"not JSON"),
    ],
)
def test_faulty_schemas(library, schema, words):
    with pytest.raises(RequestError, match=words):
        Grammar.json_schema(schema).check()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Grammar.regex("(a"), r"unclosed group at character 1"),
        (lambda: Grammar.regex(r"(?=a)b"), r"look-around"),
        (lambda: Grammar.regex(3), r"int"),
        (lambda: Grammar.lark("start: A\nA: /b+/\n  x y"), r"line 3, column 5: Expected"),
        (lambda: Grammar.lark("begin: A"), r"no start rule"),
        (lambda: Grammar.lark("x" * (constraint.MAX_CHARACTERS + 1)), r"at most"),
        (lambda: Grammar.choice([]), r"1 to"),
        (lambda: Grammar.choice("abc"), r"list"),
        (lambda: Grammar.choice(["a", ""]), r"entry 1"),
        (
            lambda: Grammar.json_schema(
                {"properties": {f"k{i}": {"enum": list(range(60))} for i in range(3000)}}
            ),
            "big",
        ),
    ],
)
def test_faulty_grammars(grammars, make, words):
    with pytest.raises(RequestError, match=words):
        grammars.constraint(make())


def test_a_form_that_no_text_has(grammars):
    with pytest.raises(RequestError, match="no text fits"):
        grammars.constraint(Grammar.regex(r"[^\x00-\U0010ffff]x"))


def test_the_place_is_not_searched_for_ever(library, monkeypatch):
    schema = {"properties": {f"k{i}": {"type": "integer"} for i in range(50)} | {"z": {"type": "strin"}}}
    calls = []
    real = constraint._problem
    monkeypatch.setattr(constraint, "_problem", lambda *a: calls.append(1) or real(*a))
    monkeypatch.setattr(constraint, "_SEARCHED", 200)
    with pytest.raises(RequestError, match="at the top"):
        Grammar.json_schema(schema).check()
    assert len(calls) < 20


def test_a_token_outside_the_grammar_is_an_error(grammars):
    state = grammars.constraint(Grammar.choice(["ab"]))
    with pytest.raises(RequestError, match="grammar"):
        state.accept(ord("z"))


def test_the_same_masks_as_from_tokenizer_json(tokenizer, grammars, library):
    """Our table of bytes against llguidance's own reading of the file."""
    theirs = library.LLTokenizer(tokenizer._backend.to_str(), n_vocab=260, eos_token=[EOS])
    for grammar in (Grammar.json_schema(PERSON), Grammar.lark("start: /(.|\\n)*/"), Grammar.regex("[^a]+é")):
        matcher = library.LLMatcher(theirs, grammar._compiled())
        other = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        ours = grammars.constraint(grammar).mask()
        bits = [np.unpackbits(m.view(np.uint8), bitorder="little")[:260] for m in (other, ours)]
        assert np.array_equal(*bits) and bits[0].any()


def test_what_is_forced_is_spelt_as_the_grammar_wants_it(library):
    """A SentencePiece tokenizer puts a space before a text, and the grammar does not have it."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    from lowbit.model.tokenizer import Tokenizer as Ours

    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        *"The",
        "\u2581The",
        "Th",
        "he",
    ]
    backend = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "</s>"])
    state = Grammars(Ours(backend, [1]), len(pieces), [1]).constraint(Grammar.regex("The The"))
    said = b""
    while not state.finished:
        token = allowed(state.mask())[-1]
        said += Ours(backend).token_bytes(token)
        state.accept(token)
    assert said == b"The The"


def test_a_real_vocabulary(shared_data, library):
    """SentencePiece: byte tokens and word boundaries."""
    folder = shared_data("weights/stories15M")
    tokenizer = load_tokenizer(folder, [2])
    grammars = Grammars(tokenizer, 32000, [2])
    state = grammars.constraint(Grammar.choice(["The cat sat.", "The dog sat."]))
    text = ""
    while not state.finished:
        choices = allowed(state.mask())
        token = max(choices, key=lambda t: len(tokenizer.token_bytes(t)))
        text += tokenizer.token_bytes(token).decode()
        state.accept(token)
    assert text in ("The cat sat.", "The dog sat.")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UnsupportedError, match=r"lowbit\[serve\]"):
        Grammar.json_object().check()
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        Grammars(None, 10, [])
    assert SimpleNamespace(g=Grammar.json_object()).g.kind == "json_schema"
