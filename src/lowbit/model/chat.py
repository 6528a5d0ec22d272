"""Chat templates: a list of messages to the one text that the model was trained on.

A template is a Jinja program from a stranger. It runs in the immutable sandbox, with the extensions and
functions that transformers offers (`tojson` without HTML escapes, `raise_exception`, `strftime_now`, loop
controls, `{% generation %}` blocks), and sees nothing but plain data.
Source: the behaviour of transformers' apply_chat_template, which the tests hold it against.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from lowbit.errors import CheckpointError, RequestError

MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_NESTING = 32  # of a message's data
_SCALARS: tuple[tuple[type, Any], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    **variables: Any,
) -> str:
    """Render `messages` (each a mapping with at least "role", as a rule "content") with `template`.

    special_tokens: bos_token, eos_token, ... as the template may name them. Further `variables` (tools,
    documents, enable_thinking, ...) reach the template as they are.
    Raises CheckpointError for a template that is not valid, RequestError for messages it refuses.
    """
    import jinja2

    if isinstance(messages, (str, bytes)) or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError(
            'chat: messages must be a list of mappings such as {"role": "user", "content": "..."}'
        )
    compiled = _compile(template)
    given: dict[str, Any] = {"tools": None, "documents": None, **(special_tokens or {}), **variables}
    try:
        return compiled.render(
            messages=_plain(messages), add_generation_prompt=add_generation_prompt, **_plain(given)
        )
    except jinja2.TemplateError as error:
        raise RequestError(
            f"chat: the model's template refuses these messages: {error.message or error}"
        ) from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise RequestError(f"chat: the model's template fails on these messages: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise RequestError("chat: the model's template needs too much memory for these messages") from error


def _plain(value: Any, depth: int = 0) -> Any:
    """Rebuild `value` from plain JSON types: an object's methods are no business of a template."""
    if depth > MAX_NESTING:
        raise RequestError(f"chat: the messages nest deeper than {MAX_NESTING} levels; flatten them")
    if value is None or isinstance(value, bool):
        return value
    for kind, strip_methods in _SCALARS:
        if isinstance(value, kind):
            return strip_methods(value)
    if isinstance(value, Mapping):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise RequestError(
        f"chat: a message holds a {type(value).__name__}; text, numbers, lists and mappings are allowed"
    )


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    import jinja2

    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise CheckpointError(
            f"chat template: {len(template)} characters; {MAX_TEMPLATE_CHARACTERS} are allowed; it is damaged"
        )
    try:
        return _environment().from_string(template)
    except jinja2.TemplateError as error:
        raise CheckpointError(
            f"chat template: not a valid template ({error}); use --raw, or repair it"
        ) from error
    except (RecursionError, MemoryError, ValueError, TypeError) as error:
        raise CheckpointError("chat template: it cannot be compiled; use --raw, or repair it") from error


@lru_cache(maxsize=1)
def _environment() -> Any:
    """The sandbox, made on first use because jinja2 takes a while to import."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks the assistant's words for training: nothing here."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 defines it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
