"""What POST /v1/responses takes. Like protocol.py; nothing is stored, so a conversation is sent whole."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from lowbit.server.errors import invalid
from lowbit.server.protocol import (
    Called,
    Count,
    Function,
    JsonSchema,
    Message,
    ObjectFormat,
    Sampling,
    TextFormat,
    TextPart,
    Tool,
    ToolCall,
    refuse,
)


class Item(Struct, forbid_unknown_fields=True):
    """A turn, a call or its result; items of an earlier output may be sent back as they are."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[dict[str, Any]] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    output: str | list[dict[str, Any]] | None = None
    summary: list[Any] | None = None
    encrypted_content: str | None = None


class FunctionTool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class NamedFunction(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str


class FlatSchemaFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextOptions(Struct, forbid_unknown_fields=True):
    format: TextFormat | ObjectFormat | FlatSchemaFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(Sampling, kw_only=True):
    """POST /v1/responses."""

    input: str | Annotated[list[Item], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None

    # Of OpenAI's servers, without a meaning here.
    store: bool | None = None
    reasoning: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    stream_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    # Refused: they would change the answer.
    background: bool | None = None
    conversation: Any = None
    previous_response_id: str | None = None
    prompt: Any = None
    truncation: Literal["auto", "disabled"] | None = None


def check(request: ResponsesRequest) -> None:
    """Raise ApiError 400 for what this server does not have."""
    refuse("background", request.background or None, "wait for the answer, or stream it")
    remedy = "nothing is stored; send the whole conversation as input"
    refuse("conversation", request.conversation, remedy)
    refuse("previous_response_id", request.previous_response_id, remedy)
    refuse("prompt", request.prompt, "give instructions and input")
    if request.truncation == "auto":
        raise invalid(
            "truncation='auto': prompts are never cut; leave it out and shorten the input", "truncation"
        )


def messages(request: ResponsesRequest) -> list[Message]:
    """The conversation in the words of chat completions."""
    found = []
    if request.instructions is not None:
        found.append(Message("system", request.instructions))
    if isinstance(request.input, str):
        return [*found, Message("user", request.input)]
    for i, item in enumerate(request.input):
        where = f"input[{i}]"
        if item.type == "message":
            if item.role is None or item.content is None:
                raise invalid(f"{where}: a message needs role and content; give both", where)
            found.append(Message(item.role, _text(item.content, f"{where}.content")))
        elif item.type == "function_call":
            if item.call_id is None or item.name is None or item.arguments is None:
                raise invalid(f"{where}: a function_call needs call_id, name and arguments", where)
            call = ToolCall(item.call_id, Called(item.name, item.arguments))
            if found and found[-1].role == "assistant":  # its text and its calls are one turn
                found[-1].tool_calls = [*(found[-1].tool_calls or []), call]
            else:
                found.append(Message("assistant", tool_calls=[call]))
        elif item.type == "function_call_output":
            if item.call_id is None or item.output is None:
                raise invalid(f"{where}: a function_call_output needs call_id and output", where)
            text = _text(item.output, f"{where}.output")
            found.append(Message("tool", text, tool_call_id=item.call_id))
    if not found:
        raise invalid("input: no message in it; give one", "input")
    return found


def _text(content: str | list[dict[str, Any]], where: str) -> str | list[Any]:
    if isinstance(content, str):
        return content
    parts = []
    for i, part in enumerate(content):
        if part.get("type") not in ("input_text", "output_text", "text", "refusal"):
            kind = str(part.get("type"))[:40]
            raise invalid(
                f"{where}[{i}].type={kind!r}: only text is understood; leave it out", f"{where}[{i}]"
            )
        text = part.get("refusal" if part["type"] == "refusal" else "text")
        if not isinstance(text, str):
            raise invalid(f"{where}[{i}].text: missing; give a string", f"{where}[{i}].text")
        parts.append(TextPart(text))
    return list(parts)


def tools(request: ResponsesRequest) -> list[Tool]:
    """The tools in the words of chat completions."""
    return [
        Tool("function", Function(tool.name, tool.description, tool.parameters, tool.strict))
        for tool in request.tools or ()
    ]


def schema_format(found: TextFormat | ObjectFormat | FlatSchemaFormat | None) -> Any:
    """text.format in the words of chat completions."""
    if isinstance(found, FlatSchemaFormat):
        from lowbit.server.protocol import SchemaFormat

        return SchemaFormat(JsonSchema(found.name, found.description, found.schema, found.strict))
    return found


def echoed(request: ResponsesRequest) -> dict[str, Any]:
    """The fields of a request that its response repeats."""
    text = msgspec.to_builtins(request.text) if request.text is not None else {}
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {**text, "format": text.get("format") or {"type": "text"}},
        "tool_choice": msgspec.to_builtins(request.tool_choice or "auto"),
        "tools": msgspec.to_builtins(request.tools or []),
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "user": request.user,
    }
