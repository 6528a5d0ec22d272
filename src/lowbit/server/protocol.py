"""What clients may send: OpenAI's requests and our extensions, as types that decode and check at once.

A field that OpenAI defines and that does not change the tokens here is accepted and ignored (IGNORED); one
that would change them and that we do not have is refused with a remedy (see `refuse`); any other field is an
error that names it. openapi.py makes the published schema from these types.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from lowbit.server.errors import ApiError, invalid

MAX_CONTINUATIONS = 128  # prompts times n of one HTTP request
MAX_SHOWN = 60  # characters of a wrong value in an error

Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Several = Annotated[int, Meta(ge=1, le=MAX_CONTINUATIONS)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Ids = Annotated[list[TokenId], Meta(min_length=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Stop = Annotated[str, Meta(min_length=1, max_length=1024)]
Stops = Annotated[list[Stop], Meta(max_length=16)]
Strings = Annotated[list[Text], Meta(min_length=1)]


_ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
_ITEMS: tuple[dict[str, Any], ...] = ({"type": "string"}, _ID, {"type": "array", "items": _ID, "minItems": 1})
_PROMPT = {
    "anyOf": [
        {"type": "string"},
        *({"type": "array", "items": items, "minItems": 1, "maxItems": 1 << 20} for items in _ITEMS),
    ]
}


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # of OpenAI's servers; nothing is padded here


class Sampling(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of every way to generate. The second group is ours."""

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    stream: bool | None = None
    user: str | None = None
    seed: Seed | None = None

    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None
    return_progress: bool | None = None
    regex: Text | None = None
    grammar: Text | None = None
    choices: Strings | None = None


class Penalties(Sampling, kw_only=True):
    """Fields of completions and chat, which the newer responses do not have."""

    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[Annotated[str, Meta(pattern="^[0-9]{1,10}$")], Bias] | None = None
    n: Several | None = None
    stop: Stop | Stops | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(Penalties, kw_only=True):
    """POST /v1/completions."""

    prompt: Annotated[str | list[Any], Meta(extra_json_schema=_PROMPT)]  # see jobs.prompts
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Several | None = None
    suffix: str | None = None


class Function(Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class Named(Struct, forbid_unknown_fields=True):
    name: str


class NamedTool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Named


class Called(Struct, forbid_unknown_fields=True):
    name: str
    arguments: str
    parsed_arguments: Any = None  # as the openai package sends its parsed answers back


class ToolCall(Struct, forbid_unknown_fields=True):
    id: str
    function: Called
    type: Literal["function"] = "function"
    index: int | None = None


class TextPart(Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str


class RefusalPart(Struct, forbid_unknown_fields=True, tag_field="type", tag="refusal"):
    refusal: str


class ImagePart(Struct, tag_field="type", tag="image_url"):
    """Accepted by the type so that the refusal can say why."""


class AudioPart(Struct, tag_field="type", tag="input_audio"):
    """As ImagePart."""


class FilePart(Struct, tag_field="type", tag="file"):
    """As ImagePart."""


Part = TextPart | RefusalPart | ImagePart | AudioPart | FilePart


class Message(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A turn. Answers of this server may be sent back as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None
    parsed: Any = None
    audio: None = None
    function_call: None = None


class JsonSchema(Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    pass


class ObjectFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    pass


class SchemaFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


class ChatRequest(Penalties, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: TextFormat | ObjectFormat | SchemaFormat | None = None
    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # ours: variables of the model's template

    # Of OpenAI's servers, without a meaning here.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    # Refused: they would change the answer.
    audio: dict[str, Any] | None = None
    modalities: list[str] | None = None
    web_search_options: dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: Any = None


class TokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /tokenize: a text, or messages in the model's chat template."""

    model: str | None = None
    prompt: str | UnsetType = UNSET
    messages: Annotated[list[Message], Meta(min_length=1)] | UnsetType = UNSET
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
    skip_special_tokens: bool = False


R = TypeVar("R")

_PATH = re.compile(r"^(?P<what>.*?)(?: - at (?:`key` in )?`\$(?P<path>[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")


def decode(kind: type[R], body: bytes) -> R:
    """The request in `body`. Raises ApiError 400 that names the field, what it holds and what it may."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _wrong_field(str(error), body) from None
    except msgspec.DecodeError as error:
        raise invalid(f"the body is not JSON: {error}; send one object", code="invalid_json") from None
    except UnicodeDecodeError as error:
        raise invalid(
            f"the body is not UTF-8 at byte {error.start}; encode it as UTF-8", code="invalid_json"
        ) from None
    except RecursionError:
        raise invalid("the body nests too deep; flatten it", code="invalid_json") from None


def _wrong_field(text: str, body: bytes) -> ApiError:
    found = _PATH.match(text)
    what, path = (found["what"], found["path"] or "") if found else (text, "")
    if unknown := re.match(r"Object contains unknown field `(.*)`$", what, re.DOTALL):
        field = f"{path.lstrip('.')}.{unknown[1]}".lstrip(".")
        return invalid(
            f"{field}: unknown field; remove it, or see /openapi.json for the fields that exist",
            field,
            "unknown_field",
        )
    if missing := re.match(r"Object missing required field `(.*)`$", what):
        field = f"{path.lstrip('.')}.{missing[1]}".lstrip(".")
        return invalid(f"{field}: missing; it is required", field, "missing_field")
    field = path.lstrip(".")
    if not field:
        return invalid(f"the body: {what[:1].lower()}{what[1:]}; send one JSON object")
    remedy = "send such a value" if what.startswith("Expected") else "/openapi.json shows what is allowed"
    return invalid(f"{field}={_shown(body, path)}: {what[:1].lower()}{what[1:]}; {remedy}", field)


def _shown(body: bytes, path: str) -> str:
    """The value at `path` as JSON, shortened."""
    try:
        value = msgspec.json.decode(body)
        for name, index in _STEP.findall(path):
            value = value[name] if name else value[int(index)]
        text = msgspec.json.encode(value).decode()
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        RecursionError,
    ):  # "[...]" stands for a key of a mapping
        return "?"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def refuse(name: str, value: Any, remedy: str) -> None:
    """Raise unless the OpenAI field `name`, which lowbit does not have, was left out."""
    if value is not None:
        raise invalid(f"{name}: not supported here; {remedy}", name, "unsupported_field")
