"""Guesses and grammars in the engine: guesses change no token, and grammars only those that they forbid."""

import json

import pytest

import lowbit
from lowbit import _native
from lowbit.engine.budget import StepTimes
from lowbit.engine.draft_model import DraftModelSpeculator
from lowbit.errors import RequestError

Say = lowbit.SamplingParameters
CAT = "the cat sat on the mat and the cat sat on the "
PROMPTS = [CAT, "abc", "abcabcabc"]
KINDS = [
    Say(max_tokens=60, ignore_eos=True),
    Say(max_tokens=60, temperature=0.7, seed=9, repetition_penalty=1.2),
    Say(max_tokens=40, temperature=1.3, seed=2, top_p=0.9, logprobs=2, min_tokens=30),
]
SPECULATION = ["none", "ngram", "draft"]


@pytest.fixture(scope="module")
def model(tiny_model):
    before = _native.threads()
    yield lowbit.load(tiny_model, threads=1)
    _native.set_threads(before)


@pytest.fixture
def free(monkeypatch):
    """Guesses cost nothing, so there are as many as possible."""
    monkeypatch.setattr(StepTimes, "seconds", lambda self, tokens: 1.0)


def engine(model, speculation):
    if speculation == "draft":
        return lowbit.Engine(model, lowbit.EngineConfig(speculation=DraftModelSpeculator(model, model)))
    return lowbit.Engine(
        model, lowbit.EngineConfig(speculation=None if speculation == "none" else speculation)
    )


@pytest.mark.parametrize("speculation", SPECULATION)
def test_guesses_change_no_token(model, free, speculation):
    with engine(model, speculation) as e:
        for parameters in KINDS:
            got = e.generate(PROMPTS, parameters)
            want = [model.stream_ids(model.encode(p), parameters).generation for p in PROMPTS]
            assert [g.token_ids for g in got] == [w.token_ids for w in want]
            assert [g.logprobs for g in got] == [w.logprobs for w in want]
            assert all(g.accepted_tokens <= g.drafted_tokens for g in got)
        stats = e.stats()
        assert (stats["accepted_tokens"] > 20) == (speculation != "none")
        assert (stats["drafted_tokens"] > stats["accepted_tokens"]) == (speculation != "none")


def test_a_draft_by_its_name(model, tiny_model):
    with lowbit.Engine(model, draft=str(tiny_model)) as e:
        assert e.generate("abc", KINDS[0]).token_ids == model.generate_ids(b"abc", KINDS[0])
    with pytest.raises(RequestError, match="give one"):
        lowbit.Engine(model, lowbit.EngineConfig(speculation="ngram"), draft=model)


@pytest.fixture(scope="module")
def plain(model):
    """Answers under grammars without guesses, made once."""
    pytest.importorskip("llguidance", reason="answers of a given form need llguidance")
    with engine(model, "none") as e:
        return {g: [e.generate(PROMPTS, kind, grammar=g) for kind in KINDS] for g in GRAMMARS}


GRAMMARS = [
    lowbit.Grammar.regex('[{]"name": "(Ada|Alan)", "age": [1-9][0-9]?[}]'),
    lowbit.Grammar.choice(["yes", "yes please", "no"]),
    lowbit.Grammar.lark('start: ("la " | "li ")~20 /x+/'),
]


def test_answers_have_the_form(plain):
    for each in plain[GRAMMARS[0]]:
        for generation in each:
            person = json.loads(generation.text)
            assert person["name"] in ("Ada", "Alan") and 0 < person["age"] <= 99
            assert generation.finish_reason in ("stop", "eos")
    assert {g.text for each in plain[GRAMMARS[1]] for g in each} <= {"yes", "yes please", "no"}


@pytest.mark.parametrize("speculation", SPECULATION[1:])
def test_guesses_change_no_token_under_a_grammar(model, free, plain, speculation):
    with engine(model, speculation) as e:
        for grammar in GRAMMARS:
            for kind, want in zip(KINDS, plain[grammar]):
                got = e.generate(PROMPTS, kind, grammar=grammar)
                assert [(g.text, g.token_ids, g.finish_reason) for g in got] == [
                    (w.text, w.token_ids, w.finish_reason) for w in want
                ]
                assert [g.logprobs for g in got] == [w.logprobs for w in want]
        assert e.stats()["accepted_tokens"] > 100  # what the grammar forces is guessed


def test_a_grammar_that_forbids_nothing_changes_nothing(model):
    pytest.importorskip("llguidance", reason="answers of a given form need llguidance")
    with engine(model, "none") as e:
        for kind in (Say(max_tokens=6), Say(max_tokens=6, temperature=0.7, seed=9)):
            free = e.generate("abc", kind, grammar=lowbit.Grammar.lark("start: /(.|\\n)*/"))
            assert free.token_ids == model.stream_ids(model.encode("abc"), kind).generation.token_ids
        with pytest.raises(RequestError, match="at /properties/a"):
            e.generate("x", grammar=lowbit.Grammar.json_schema({"properties": {"a": {"type": "strin"}}}))
