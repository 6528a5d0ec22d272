"""Messages of the protocol to the one text that the model's chat template makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lowbit.errors import RequestError
from lowbit.server import protocol
from lowbit.server.errors import invalid
from lowbit.server.models import ServedModel
from lowbit.server.tool_calls import Tools, knows_tools, preamble


def render_messages(
    model: ServedModel,
    messages: list[protocol.Message],
    tools: Tools | None = None,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text of `messages` in the model's template. Raises ApiError 400 for what it refuses."""
    template = model.tokenizer.chat_template
    if template is None:
        raise invalid(
            f"messages: {model.name!r} has no chat template (it is a base model); use /v1/completions",
            "messages",
        )
    given = dict(variables or {})
    if taken := {"messages", "add_generation_prompt", "tools"} & set(given):
        raise invalid(f"chat_template_kwargs: {min(taken)} has a field of its own", "chat_template_kwargs")
    plain = [_plain(message, i, template) for i, message in enumerate(messages)]
    if knows_tools(template):
        given["tools"] = tools.plain() if tools is not None else None
    else:
        plain = [_without_tools(message) for message in plain]
        if tools is not None:
            plain = _prepended(plain, preamble(tools))
    try:
        return model.tokenizer.apply_chat(plain, add_generation_prompt, **given)
    except RequestError as error:
        raise invalid(str(error), "messages") from error
    except TypeError as error:
        raise invalid(f"chat_template_kwargs: {error}; rename it", "chat_template_kwargs") from error


def _plain(message: protocol.Message, index: int, template: str) -> dict[str, Any]:
    """A mapping as templates expect it: text contents, tool arguments as an object."""
    role = message.role
    if role == "developer" and "developer" not in template:
        role = "system"
    plain: dict[str, Any] = {"role": role, "content": _text(message, index)}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        plain["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        plain["tool_calls"] = [_call(call) for call in message.tool_calls]
    return plain


def _call(call: protocol.ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments  # the model's own mistake: shown to it as it was
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }


def _without_tools(message: dict[str, Any]) -> dict[str, Any]:
    """The message as text alone, for a template that knows neither calls nor their results."""
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = message.pop("tool_calls", [])
    texts = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
    tagged = [f"<tool_call>\n{text}\n</tool_call>" for text in texts]
    message["content"] = "\n".join([*([message["content"]] if message["content"] else []), *tagged])
    return message


def _prepended(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The messages with `text` at the head of the system message."""
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{text}\n\n{messages[0]['content']}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _text(message: protocol.Message, index: int) -> str:
    content = message.content
    if content is None:
        if message.role == "assistant":  # it called tools, or refused
            return message.refusal or ""
        raise invalid(f"messages[{index}].content: missing; give text", f"messages[{index}].content")
    if isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, protocol.TextPart):
            texts.append(part.text)
        elif isinstance(part, protocol.RefusalPart):
            texts.append(part.refusal)
        else:
            where = f"messages[{index}].content[{i}]"
            raise invalid(f"{where}: only text is understood by this model; leave it out", where)
    return "".join(texts)
