"""Messages of the protocol to the one text that the model's chat template makes of them."""

from __future__ import annotations

from typing import Any

from lowbit.errors import RequestError
from lowbit.server import protocol
from lowbit.server.errors import invalid
from lowbit.server.models import ServedModel


def render_messages(
    model: ServedModel,
    messages: list[protocol.Message],
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The text of `messages` in the model's template. Raises ApiError 400 for what it refuses."""
    template = model.tokenizer.chat_template
    if template is None:
        raise invalid(
            f"messages: {model.name!r} has no chat template (it is a base model); use /v1/completions",
            "messages",
        )
    plain = [plain_message(message, i, template) for i, message in enumerate(messages)]
    try:
        return model.tokenizer.apply_chat(plain, add_generation_prompt, **variables)
    except RequestError as error:
        raise invalid(str(error), "messages") from error
    except TypeError as error:
        raise invalid(f"chat_template_kwargs: {error}; rename it", "chat_template_kwargs") from error


def plain_message(message: protocol.Message, index: int, template: str) -> dict[str, Any]:
    """A mapping as templates expect it: text contents, tool arguments as an object."""
    role = message.role
    if role == "developer" and "developer" not in template:
        role = "system"
    plain: dict[str, Any] = {"role": role, "content": _text(message, index)}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _text(message: protocol.Message, index: int) -> str:
    content = message.content
    if content is None:
        if message.role == "assistant":
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
