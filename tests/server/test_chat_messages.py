"""What chat templates are given: tools and calls in their own words, or as text where they know none."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("msgspec", reason="msgspec of lowbit[serve] is not installed")

from lowbit.model.chat import render_chat
from lowbit.server.chat import render_messages
from lowbit.server.errors import ApiError
from lowbit.server.protocol import Called, Function, Message, TextPart, ToolCall
from lowbit.server.tool_calls import Tools

# After the template of Qwen 2.5, shortened.
KNOWS = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}:{{ c.function.arguments | tojson }}"
    "</tool_call>{% endfor %}{% endfor %}"
)
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TOOLS = Tools([Function("f", "Does f.", {"type": "object", "properties": {}})])
TALK = [
    Message("user", "go"),
    Message("assistant", tool_calls=[ToolCall("c1", Called("f", '{"a": 1}'))]),
    Message("tool", "done", tool_call_id="c1"),
]


def model(template):
    def apply_chat(messages, add_generation_prompt, **variables):
        return render_chat(template, messages, add_generation_prompt, **variables)

    return SimpleNamespace(name="m", tokenizer=SimpleNamespace(chat_template=template, apply_chat=apply_chat))


def test_a_template_that_knows_tools():
    text = render_messages(model(KNOWS), TALK, TOOLS)
    tools, _, rest = text.partition("</tools>")
    assert json.loads(tools.removeprefix("<tools>"))["function"]["name"] == "f"
    assert rest == '[user]go[assistant]<tool_call>f:{"a": 1}</tool_call>[tool]done'
    assert render_messages(model(KNOWS), TALK[:1]) == "[user]go"


def test_a_template_that_knows_none():
    text = render_messages(model(PLAIN), [Message("system", "Be brief."), *TALK], TOOLS)
    assert text.startswith("[system]You may call functions.") and '"name": "f"' in text
    assert "\n\nBe brief.[user]go[assistant]<tool_call>\n" in text
    assert text.endswith("</tool_call>[user]<tool_response>\ndone\n</tool_response>")
    assert render_messages(model(PLAIN), TALK[:1], TOOLS).startswith("[system]You may call functions.")


def test_arguments_that_are_no_json_stay_as_they_are():
    broken = Message("assistant", tool_calls=[ToolCall("c1", Called("f", "{oops"))])
    assert '<tool_call>f:"{oops"</tool_call>' in render_messages(model(KNOWS), [broken])


def test_roles_and_parts():
    messages = [Message("developer", "a"), Message("user", [TextPart("b"), TextPart("c")])]
    assert render_messages(model(PLAIN), messages) == "[system]a[user]bc"
    assert render_messages(model(PLAIN + "{# developer #}"), messages) == "[developer]a[user]bc"


def test_variables():
    template = PLAIN + "{{ enable_thinking }}"
    assert render_messages(model(template), TALK[:1], variables={"enable_thinking": 5}) == "[user]go5"
    for name in ("messages", "tools", "add_generation_prompt"):
        with pytest.raises(ApiError, match=name):
            render_messages(model(template), TALK[:1], variables={name: 1})
    with pytest.raises(ApiError, match="no chat template"):
        render_messages(model(None), TALK)
