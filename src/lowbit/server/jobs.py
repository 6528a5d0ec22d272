"""A request of the protocol becomes a Job: defaults, limits and prompts as token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from lowbit.engine.constraint import Grammar
from lowbit.engine.parameters import SamplingParameters, random_seed
from lowbit.errors import LowbitError, RequestError
from lowbit.server import protocol
from lowbit.server.chat import render_messages
from lowbit.server.errors import invalid
from lowbit.server.generation import Job
from lowbit.server.models import ServedModel

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
MAX_SEED = 2**64


async def completion_job(request: protocol.CompletionRequest, model: ServedModel) -> Job:
    """The job of POST /v1/completions."""
    protocol.refuse("suffix", request.suffix, "put all of the text into prompt")
    if request.best_of not in (None, 1, request.n):
        raise invalid(
            f"best_of={request.best_of}: not supported here; leave it out and ask for n={request.best_of}",
            "best_of",
        )
    ids = await prompts(request.prompt, model)
    max_tokens = COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    job = _job(request, model, ids, max_tokens or 1, request.logprobs)
    job.echo = bool(request.echo)
    job.silent = max_tokens == 0
    job.continuing = True
    job.constraint = await constraint(request, None)
    return job


async def chat_job(request: protocol.ChatRequest, model: ServedModel) -> Job:
    """The job of POST /v1/chat/completions."""
    protocol.refuse("audio", request.audio, "lowbit answers with text")
    protocol.refuse("web_search_options", request.web_search_options, "lowbit does not search")
    protocol.refuse("functions", request.functions, "give tools")
    protocol.refuse("function_call", request.function_call, "give tool_choice")
    if request.modalities not in (None, ["text"]):
        raise invalid(
            f'modalities={request.modalities}: only ["text"] is supported; leave it out', "modalities"
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs: needs logprobs=true; set it", "top_logprobs")
    text = render_messages(model, request.messages, **(request.chat_template_kwargs or {}))
    ids = await model.encode(text, False, "messages")
    model.check_prompt(ids, "messages")
    limits = [n for n in (request.max_completion_tokens, request.max_tokens) if n is not None]
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    job = _job(request, model, [ids], min(limits) if limits else None, logprobs)
    job.constraint = await constraint(request, request.response_format)
    return job


async def prompts(prompt: Any, model: ServedModel) -> list[list[int]]:
    """Token ids of `prompt`: a string, a list of strings, token ids, or a list of these."""
    if isinstance(prompt, str):
        several: list[Any] = [prompt]
    elif prompt and all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):
        several = [prompt]
    else:
        several = prompt
    if not several:
        raise invalid("prompt=[]: give at least one prompt", "prompt")
    if len(several) > protocol.MAX_CONTINUATIONS:
        raise invalid(
            f"prompt: {len(several)} prompts; at most {protocol.MAX_CONTINUATIONS} in one request, send more "
            "requests",
            "prompt",
        )
    found = []
    for i, item in enumerate(several):
        name = "prompt" if len(several) == 1 else f"prompt[{i}]"
        if isinstance(item, str):
            ids = await model.encode(item, True, name)
        else:
            try:
                ids = msgspec.convert(item, protocol.Ids)
            except msgspec.ValidationError:
                raise invalid(f"{name}: neither text nor a list of token ids; send either", name) from None
        model.check_prompt(ids, name)
        found.append(ids)
    return found


def _job(
    request: protocol.Penalties,
    model: ServedModel,
    ids: list[list[int]],
    max_tokens: int | None,
    logprobs: int | None,
) -> Job:
    """What completions and chat have in common."""
    n = request.n or 1
    if n * len(ids) > protocol.MAX_CONTINUATIONS:
        raise invalid(
            f"n={n} times {len(ids)} prompts: at most {protocol.MAX_CONTINUATIONS} in one request; "
            "ask for fewer",
            "n",
        )
    seed = random_seed() if request.seed is None else request.seed % MAX_SEED
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    parameters: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_k": request.top_k or 0,
        "min_p": request.min_p or 0.0,
        "repetition_penalty": request.repetition_penalty or 1.0,
        "presence_penalty": request.presence_penalty or 0.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
        "logprobs": logprobs,
        "ignore_eos": bool(request.ignore_eos),
    }
    if request.logit_bias:
        parameters["logit_bias"] = _bias(request.logit_bias, model)
    if request.min_tokens:
        parameters["min_tokens"] = request.min_tokens
    check_parameters({**parameters, "stop": stop})
    options = request.stream_options
    if options is not None and not request.stream:
        raise invalid("stream_options: needs stream=true; set it, or leave them out", "stream_options")
    return Job(
        prompts=ids,
        parameters=parameters,
        seed=seed,
        n=n,
        stop=stop,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        logprobs=logprobs,
        priority=request.priority or 0,
        progress=bool(request.return_progress),
    )


def check_parameters(parameters: dict[str, Any]) -> None:
    try:
        SamplingParameters(**parameters)
    except RequestError as error:
        raise invalid(str(error)) from error


def _bias(given: dict[str, float], model: ServedModel) -> dict[int, float]:
    bias = {int(token): value for token, value in given.items()}
    outside = [token for token in bias if token >= model.config.vocab_size]
    if outside:
        raise invalid(
            f"logit_bias: token id {outside[0]} is outside the vocabulary of {model.config.vocab_size}; "
            "take it from /tokenize",
            "logit_bias",
        )
    return bias


async def constraint(request: protocol.Sampling, wanted: Any) -> tuple[str, str] | None:
    """The form of the answer, of regex, grammar, choices or the response_format `wanted`."""
    makers: dict[str, Callable[[], Grammar] | None] = {
        "regex": partial(Grammar.regex, request.regex) if request.regex else None,
        "grammar": partial(Grammar.lark, request.grammar) if request.grammar else None,
        "choices": partial(Grammar.choice, request.choices) if request.choices else None,
        "response_format": _format(wanted),
    }
    named = [(field, make) for field, make in makers.items() if make is not None]
    if not named:
        return None
    field, make = named[0]
    if len(named) > 1:
        raise invalid(f"{field} and {named[1][0]}: one constraint at a time; leave one out", named[1][0])
    return await compiled(make, field)


async def compiled(make: Callable[[], Grammar], field: str) -> tuple[str, str]:
    """The constraint that `make` gives. Raises ApiError 400 if the library does not take it."""

    def check() -> Grammar:
        grammar = make()
        if grammar.kind != "lark":  # which may name special tokens: the engine knows them
            grammar.check()
        return grammar

    try:
        grammar = await asyncio.to_thread(check)
    except LowbitError as error:
        raise invalid(f"{field}: {error}", field) from error
    return grammar.kind, grammar.text


def _format(wanted: Any) -> Callable[[], Grammar] | None:
    if isinstance(wanted, protocol.ObjectFormat):
        return Grammar.json_object
    if isinstance(wanted, protocol.SchemaFormat):
        return partial(Grammar.json_schema, wanted.json_schema.schema or {})
    return None
