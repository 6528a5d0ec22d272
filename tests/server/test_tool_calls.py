"""Calls recognised in text that arrives in pieces of any size."""

import json

import pytest

pytest.importorskip("msgspec", reason="msgspec of lowbit[serve] is not installed")

from lowbit.server.errors import ApiError
from lowbit.server.protocol import Function
from lowbit.server.tool_calls import LIST, OBJECT, TAGS, ToolParser, Tools, choose, syntax_of

NAMES = frozenset({"f", "g"})
F, G = {"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": "}"}}
LLAMA = {"name": "f", "parameters": {"a": 1}}


def tagged(*calls):
    return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


CASES = [
    (TAGS, "plain text", "plain text", []),
    (TAGS, tagged(F), "", ["f"]),
    (TAGS, "Let me see.\n" + tagged(F, G), "Let me see.", ["f", "g"]),
    (TAGS, tagged(F) + "\nDone.", "\nDone.", ["f"]),
    (TAGS, "a < b <tool", "a < b <tool", []),
    (TAGS, "<tool_call>{not json}</tool_call>!", "<tool_call>{not json}</tool_call>!", []),
    (TAGS, tagged({"name": "unknown", "arguments": {}}), tagged({"name": "unknown", "arguments": {}}), []),
    (TAGS, "<tool_call>\n{unfinished", "<tool_call>\n{unfinished", []),
    (LIST, f"[TOOL_CALLS]{json.dumps([F, G])}", "", ["f", "g"]),
    (LIST, "Hm. [TOOL_CALLS] " + json.dumps([F]), "Hm.", ["f"]),
    (LIST, "[TOOL_CALLS] nothing", "[TOOL_CALLS] nothing", []),
    (OBJECT, json.dumps(LLAMA), "", ["f"]),
    (OBJECT, "<|python_tag|>" + json.dumps(LLAMA) + "; " + json.dumps(G), "", ["f", "g"]),
    (OBJECT, "Use {braces} freely", "Use {braces} freely", []),
    (OBJECT, '{"name": "other"} is an object', '{"name": "other"} is an object', []),
    (OBJECT, '{"name": "f"', '{"name": "f"', []),
    (OBJECT, "  \n ", "  \n ", []),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("syntax", "text", "shown", "names"), CASES)
def test_text_and_calls(syntax, text, shown, names, size):
    parser = ToolParser(syntax, NAMES)
    out, calls = "", []
    for at in range(0, len(text), size):
        out += parser.push(text[at : at + size])
        calls += parser.take_calls()
    out += parser.finish()
    assert [call["function"]["name"] for call in calls] == names
    assert out == shown
    for call in calls:
        assert json.loads(call["function"]["arguments"]) in ({"a": 1}, {"b": "}"})
        assert call["type"] == "function" and call["id"].startswith("call_")
    assert len({call["id"] for call in calls}) == len(calls)


def test_one_call_at_a_time():
    parser = ToolParser(TAGS, NAMES, single=True)
    assert parser.push(tagged(F, G) + " and more") == ""
    assert parser.satisfied and len(parser.take_calls()) == 1
    assert parser.push("more") == "" and parser.finish() == ""


def test_the_syntax_is_the_template_s():
    assert syntax_of("{{ messages }}") == TAGS
    assert syntax_of("{% if tools %}<tool_call>{% endif %}") == TAGS
    assert syntax_of("{{ tools }} [TOOL_CALLS]") == LIST
    assert syntax_of("{{ tools }} ipython") == OBJECT


def test_choices():
    f, g = Function("f"), Function("g")
    assert choose([], None, None, None) is None
    assert choose([f], "none", None, None) is None
    assert choose([f, g], "auto", None, None).schema() is None
    forced = choose([f, g], "required", None, None)
    assert len(forced.schema()["anyOf"]) == 2
    named = choose([f, g], None, "g", False)
    assert named.schema()["properties"]["name"] == {"const": "g"}
    for offered, choice, name in (([], "required", None), ([f], None, "g"), ([f, f], None, None)):
        with pytest.raises(ApiError, match=r"tool"):
            choose(offered, choice, name, None)


def test_a_forced_call_is_an_object_whatever_the_template():
    parser = Tools([Function("f")], ["f"]).parser("<tool_call> tools")
    assert parser.syntax == OBJECT and parser.single
