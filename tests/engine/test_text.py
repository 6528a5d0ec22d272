"""Stop strings across token boundaries, whatever the pieces are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.engine.text import StopFilter


def run(pieces, stop):
    f = StopFilter(stop)
    shown = []
    for piece in pieces:
        shown.append(f.push(piece))
        if f.matched is not None:
            return "".join(shown), f.matched
    shown.append(f.flush())
    return "".join(shown), None


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "matched"),
    [
        (["Hello", " world"], [], "Hello world", None),
        (["a", "S", "T", "O", "P", "b"], ["STOP"], "a", "STOP"),
        (["aSTOPb"], ["STOP"], "a", "STOP"),
        (["ST", "OR", "M"], ["STOP"], "STORM", None),
        (["SS", "TOP"], ["STOP"], "S", "STOP"),
        (["x\n", "\n", "y"], ["\n\n"], "x", "\n\n"),
        (["abab", "c"], ["abc"], "ab", "abc"),
        (["one two three"], ["three", "two"], "one ", "two"),
        (["ends with ST"], ["STOP"], "ends with ST", None),
        (["é", "è"], ["éè"], "", "éè"),
    ],
)
def test_examples(pieces, stop, text, matched):
    assert run(pieces, stop) == (text, matched)


def test_nothing_of_a_stop_string_is_shown_early():
    f = StopFilter(["</end>"])
    assert [f.push(p) for p in ["hi<", "/", "en", "d"]] == ["hi", "", "", ""]
    assert f.push(">") == "" and f.matched == "</end>"
    assert f.push("more") == ""


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_the_shown_text_ends_before_the_first_stop(pieces, stop):
    whole = "".join(pieces)
    text, matched = run(pieces, stop)
    assert whole.startswith(text)
    if matched is None:
        assert text == whole and not any(s in whole for s in stop)
    else:
        assert whole.startswith(text + matched)
        assert not any(s in text for s in stop)
