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
from lowbit.server import protocol, responses_protocol
from lowbit.server.chat import render_messages
from lowbit.server.errors import invalid
from lowbit.server.generation import Job
from lowbit.server.models import ServedModel
from lowbit.server.responses_protocol import NamedFunction
from lowbit.server.tool_calls import Tools, choose, special_opener

COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
MAX_SEED = 2**64

Maker = Callable[[], Grammar]


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
    named = request.tool_choice.function.name if isinstance(request.tool_choice, protocol.NamedTool) else None
    choice = request.tool_choice if isinstance(request.tool_choice, str) else None
    offered = [tool.function for tool in request.tools or ()]
    tools = choose(offered, choice, named, request.parallel_tool_calls)
    ids = await _chat_ids(model, request.messages, tools, request.chat_template_kwargs)
    limits = [n for n in (request.max_completion_tokens, request.max_tokens) if n is not None]
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    job = _job(request, model, [ids], min(limits) if limits else None, logprobs)
    job.constraint = await constraint(request, _format(request.response_format))
    await _use(tools, job, model)
    return job


async def responses_job(request: responses_protocol.ResponsesRequest, model: ServedModel) -> Job:
    """The job of POST /v1/responses."""
    responses_protocol.check(request)
    named = request.tool_choice.name if isinstance(request.tool_choice, NamedFunction) else None
    choice = request.tool_choice if isinstance(request.tool_choice, str) else None
    offered = [tool.function for tool in responses_protocol.tools(request)]
    tools = choose(offered, choice, named, request.parallel_tool_calls)
    ids = await _chat_ids(model, responses_protocol.messages(request), tools)
    logprobs = request.top_logprobs
    if logprobs is None and "message.output_text.logprobs" in (request.include or ()):
        logprobs = 0
    job = _job(request, model, [ids], request.max_output_tokens, logprobs)
    wanted = responses_protocol.schema_format(request.text.format if request.text else None)
    job.constraint = await constraint(request, _format(wanted))
    await _use(tools, job, model)
    job.echoed = responses_protocol.echoed(request)
    return job


async def _chat_ids(
    model: ServedModel,
    messages: list[protocol.Message],
    tools: Tools | None,
    variables: dict[str, Any] | None = None,
) -> list[int]:
    text = render_messages(model, messages, tools, variables=variables)
    ids = await model.encode(text, False, "messages")
    model.check_prompt(ids, "messages")
    return ids


async def _use(tools: Tools | None, job: Job, model: ServedModel) -> None:
    """Let the answers of `job` call `tools`."""
    if tools is None:
        return
    template = model.tokenizer.chat_template or ""
    schema = tools.schema()
    if schema is not None:
        if job.constraint is not None:
            raise invalid(
                "tool_choice: forces a call, and the answer has another form; leave one out", "tool_choice"
            )
        job.constraint = await compiled(partial(Grammar.json_schema, schema), "tools")
    elif job.constraint is not None and job.constraint[0] == "json_schema":
        return  # the answer is an object of the client's own
    job.skip_special = schema is not None or not special_opener(model.tokenizer, template)
    job.parser = partial(tools.parser, template)


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
    request: protocol.Sampling,
    model: ServedModel,
    ids: list[list[int]],
    max_tokens: int | None,
    logprobs: int | None,
) -> Job:
    """What all requests have in common."""
    parameters: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_k": request.top_k or 0,
        "min_p": request.min_p or 0.0,
        "repetition_penalty": request.repetition_penalty or 1.0,
        "logprobs": logprobs,
        "ignore_eos": bool(request.ignore_eos),
        "min_tokens": request.min_tokens or 0,
    }
    job = Job(
        prompts=ids,
        parameters=parameters,
        seed=random_seed() if request.seed is None else request.seed % MAX_SEED,
        stream=bool(request.stream),
        logprobs=logprobs,
        priority=request.priority or 0,
        progress=bool(request.return_progress),
    )
    if isinstance(request, protocol.Penalties):
        _more(request, job, model)
    try:
        SamplingParameters(**parameters, stop=job.stop)
    except RequestError as error:
        raise invalid(str(error)) from error
    return job


def _more(request: protocol.Penalties, job: Job, model: ServedModel) -> None:
    """The fields that responses do not have."""
    job.n = request.n or 1
    if job.n * len(job.prompts) > protocol.MAX_CONTINUATIONS:
        raise invalid(
            f"n={job.n} times {len(job.prompts)} prompts: at most {protocol.MAX_CONTINUATIONS} in one "
            "request; ask for fewer",
            "n",
        )
    job.stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    job.parameters["presence_penalty"] = request.presence_penalty or 0.0
    job.parameters["frequency_penalty"] = request.frequency_penalty or 0.0
    job.parameters["logit_bias"] = _bias(request.logit_bias or {}, model)
    options = request.stream_options
    if options is not None and not request.stream:
        raise invalid("stream_options: needs stream=true; set it, or leave them out", "stream_options")
    job.include_usage = bool(options and options.include_usage)


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


async def constraint(request: protocol.Sampling, wanted: Maker | None) -> tuple[str, str] | None:
    """The form of the answer, of regex, grammar or choices, or the one that OpenAI's field asks for."""
    makers: dict[str, Maker | None] = {
        "regex": partial(Grammar.regex, request.regex) if request.regex else None,
        "grammar": partial(Grammar.lark, request.grammar) if request.grammar else None,
        "choices": partial(Grammar.choice, request.choices) if request.choices else None,
        "response_format": wanted,
    }
    named = [(field, make) for field, make in makers.items() if make is not None]
    if not named:
        return None
    field, make = named[0]
    if len(named) > 1:
        raise invalid(f"{field} and {named[1][0]}: one constraint at a time; leave one out", named[1][0])
    return await compiled(make, field)


async def compiled(make: Maker, field: str) -> tuple[str, str]:
    """The constraint that `make` gives. Raises ApiError 400 if the library does not take it."""

    def check() -> Grammar:
        grammar = make()
        if grammar.kind != "lark":  # which may name special tokens: the engine knows them
            grammar.check()
        return grammar

    try:
        grammar = await asyncio.to_thread(check)
    except LowbitError as error:
        told = str(error)
        raise invalid(told if told.startswith(f"{field}: ") else f"{field}: {told}", field) from error
    return grammar.kind, grammar.text


def _format(wanted: Any) -> Maker | None:
    if isinstance(wanted, protocol.ObjectFormat):
        return Grammar.json_object
    if isinstance(wanted, protocol.SchemaFormat):
        return partial(Grammar.json_schema, wanted.json_schema.schema or {})
    return None
