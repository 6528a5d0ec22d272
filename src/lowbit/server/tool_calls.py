"""Tool calls in the text of a model: how they are asked for, recognised as they arrive, and forced.

Models write calls in the syntax of their chat template. Three cover the open ones:

    tags     <tool_call>{"name": ..., "arguments": {...}}</tool_call>     Hermes, Qwen, SmolLM3
    list     [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]         Mistral
    object   {"name": ..., "parameters": {...}} as the whole answer       Llama 3

A template that knows no tools gets them in a system message, in the first syntax. A forced call (tool_choice
"required" or a name) is the object, and a constraint leaves the model no other way.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowbit.server import protocol
from lowbit.server.errors import invalid

TAGS, LIST, OBJECT = "tags", "list", "object"
OPENERS = {TAGS: "<tool_call>", LIST: "[TOOL_CALLS]", OBJECT: "{"}
BETWEEN = " ;\r\n\t"  # calls
PYTHON_TAG = "<|python_tag|>"  # Llama 3 may write it before the object

PREAMBLE = """\
You may call functions. Their signatures, as JSON:
<tools>
{tools}
</tools>
To call one, answer with its name and arguments as JSON within tags:
<tool_call>
{{"name": "function-name", "arguments": {{}}}}
</tool_call>"""


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    offered: in the protocol's words. forced: names of which one must be called; empty: the model decides.
    """

    offered: Sequence[protocol.Function] = ()
    forced: Sequence[str] = ()
    parallel: bool = True

    def plain(self) -> list[dict[str, Any]]:
        """As chat templates expect them."""
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": _parameters(tool),
                },
            }
            for tool in self.offered
        ]

    def schema(self) -> dict[str, Any] | None:
        """JSON Schema of a forced call, or None."""
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": _parameters(tool)},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in self.offered
            if tool.name in self.forced
        ]
        return None if not calls else calls[0] if len(calls) == 1 else {"anyOf": calls}

    def parser(self, template: str) -> ToolParser:
        """A parser for one answer."""
        syntax = OBJECT if self.forced else syntax_of(template)
        names = frozenset(tool.name for tool in self.offered)
        return ToolParser(syntax, names, single=bool(self.forced) or not self.parallel)


def _parameters(tool: protocol.Function) -> dict[str, Any]:
    return tool.parameters or {"type": "object", "properties": {}}


def choose(
    offered: Sequence[protocol.Function], choice: str | None, named: str | None, parallel: bool | None
) -> Tools | None:
    """The tools of a request, None if none may be called. named: the function that tool_choice names."""
    names = [tool.name for tool in offered]
    if len(set(names)) < len(names):
        raise invalid("tools: two have the same name; rename one", "tools")
    if named is not None and named not in names:
        raise invalid(f"tool_choice: {named[:64]!r} is not among tools; name one of them", "tool_choice")
    if not offered:
        if choice == "required":
            raise invalid("tool_choice: no tools are given; give some, or leave it out", "tool_choice")
        return None
    if choice == "none":
        return None
    forced = [named] if named is not None else names if choice == "required" else []
    return Tools(offered, forced, parallel is not False)


def knows_tools(template: str) -> bool:
    """Whether a chat template renders tools itself."""
    return "tools" in template


def syntax_of(template: str) -> str:
    """How a model with this template writes calls."""
    if knows_tools(template):
        if OPENERS[LIST] in template:
            return LIST
        if OPENERS[TAGS] not in template:
            return OBJECT
    return TAGS


def special_opener(tokenizer: Any, template: str) -> bool:
    """Whether calls begin with a token that text leaves out as a rule."""
    ids = [tokenizer.token_id(text) for text in (OPENERS[syntax_of(template)], PYTHON_TAG)]
    return any(token is not None and tokenizer.is_special(token) for token in ids)


def preamble(tools: Tools) -> str:
    """The system message for a template that knows no tools."""
    return PREAMBLE.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools.plain()))


@dataclass
class ToolParser:
    """Splits the text of an answer, piece by piece, into what is shown and calls.

    names: functions that exist; a call of another stays text. single: the answer ends with its first call.
    """

    syntax: str
    names: frozenset[str]
    single: bool = False
    _held: str = ""
    _inside: bool = False  # a call has begun and `_held` is what follows its opener
    _shown: bool = False  # text that is not a call has been passed on
    _found: bool = False
    _calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def satisfied(self) -> bool:
        """True once nothing more is wanted."""
        return self.single and self._found

    def take_calls(self) -> list[dict[str, Any]]:
        """Calls completed since the last time, as {"id", "type", "function": {"name", "arguments"}}."""
        calls, self._calls = self._calls, []
        return calls

    def push(self, piece: str) -> str:
        """The text to show after `piece`."""
        self._held += piece
        shown = ""
        while self._held and not self.satisfied:
            before = self._inside, len(self._held)
            shown += self._read_call() if self._inside else self._read_text()
            if (self._inside, len(self._held)) == before:
                break
        return shown

    def finish(self) -> str:
        """What is left at the end: an unfinished call is text."""
        held, self._held = self._held, ""
        if self.satisfied:
            return ""
        if self._inside:
            return held if self.syntax == OBJECT else OPENERS[self.syntax] + held
        return "" if self._found and not held.strip(BETWEEN) else held

    def _read_text(self) -> str:
        """Take out the text before the next call, or what cannot be the beginning of one."""
        held, opener = self._held, OPENERS[self.syntax]
        if self.syntax == OBJECT:
            return self._read_object_start()
        at = held.find(opener)
        if at >= 0:
            self._held, self._inside = held[at + len(opener) :], True
            return held[:at].rstrip()
        keep = next((n for n in range(len(opener) - 1, 0, -1) if held.endswith(opener[:n])), 0)
        # Space before a call belongs to neither.
        text = held[: len(held) - keep].rstrip()
        self._held = held[len(text) :]
        return text

    def _read_object_start(self) -> str:
        """An object is a call only where the answer begins, or behind another call."""
        start = self._held.lstrip(BETWEEN if self._found else None)
        if start.startswith(PYTHON_TAG):
            start = start[len(PYTHON_TAG) :].lstrip()
        if not self._shown and start.startswith("{"):
            self._held, self._inside = start, True
            return ""
        if not self._shown and PYTHON_TAG.startswith(start):  # nothing yet, or the beginning of the tag
            return ""
        text, self._held, self._shown = self._held, "", True
        return text

    def _read_call(self) -> str:
        """Take out a complete call. Returns the text of what turns out to be none."""
        if self.syntax == TAGS:
            body, end, rest = self._held.partition("</tool_call>")
            if not end:
                return ""
            whole = OPENERS[TAGS] + body + end
        else:
            held = self._held.lstrip()
            if "}" not in held:
                return ""
            try:
                _, at = json.JSONDecoder().raw_decode(held)
            except (ValueError, RecursionError):
                return ""
            body, rest = held[:at], held[at:]
            whole = body if self.syntax == OBJECT else OPENERS[LIST] + body
        self._inside, self._held = False, rest
        calls = self._read(body)
        if not calls:
            self._shown = True
            return whole
        self._found = True
        self._calls += calls[:1] if self.single else calls
        return ""

    def _read(self, body: str) -> list[dict[str, Any]]:
        """The calls in JSON text; none unless all of it is calls of functions that exist."""
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return []
        calls = []
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict) or item.get("name") not in self.names:
                return []
            arguments = item.get("arguments", item.get("parameters", {}))
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls.append(
                {
                    "id": f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": {"name": item["name"], "arguments": arguments},
                }
            )
        return calls
