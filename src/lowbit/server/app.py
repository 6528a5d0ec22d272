"""The routes: an ASGI application, a table of paths and what each does.

Everything that is wrong with a request is an ApiError in OpenAI's shape; an answer of 500 is a bug of ours.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from lowbit.server import chat, http, metrics, page_files, protocol, render, stats
from lowbit.server.chat_completions import ChatRenderer
from lowbit.server.completions import CompletionRenderer
from lowbit.server.errors import ApiError, invalid
from lowbit.server.generation import Generation
from lowbit.server.http import Receive, Scope, Send
from lowbit.server.jobs import chat_job, completion_job, responses_job
from lowbit.server.limits import Keys, Limits, Slots
from lowbit.server.models import ServedModel
from lowbit.server.openapi import document
from lowbit.server.responses import ResponsesRenderer
from lowbit.server.responses_protocol import ResponsesRequest

Handler = Callable[[Scope, Receive, Send, str], Awaitable[int]]

TICK_SECONDS = 0.25


class App:
    """Answers HTTP for several models.

    draining: the server is about to end; what runs is finished and nothing new is taken.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        counters: stats.Counters,
        limits: Limits,
        keys: Keys,
        version: str,
    ) -> None:
        self.models = models
        self.counters = counters
        self.limits = limits
        self.draining = False
        self._keys = keys
        self._version = version
        self._slots = Slots(limits, len(keys))
        self._open: dict[str, dict[str, Handler]] = {  # without a key
            "/": {"GET": self._page},
            "/page/{name}": {"GET": self._page},
            "/openapi.json": {"GET": self._openapi},
            "/health": {"GET": self._health},
            "/ready": {"GET": self._ready},
        }
        generate = self._generate
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/models": {"GET": self._list_models},
            "/v1/models/{id}": {"GET": self._one_model},
            "/v1/completions": {
                "POST": partial(generate, protocol.CompletionRequest, completion_job, CompletionRenderer)
            },
            "/v1/chat/completions": {"POST": partial(generate, protocol.ChatRequest, chat_job, ChatRenderer)},
            "/v1/responses": {"POST": partial(generate, ResponsesRequest, responses_job, ResponsesRenderer)},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/stats": {"GET": self._stats},
            "/metrics": {"GET": self._metrics},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        route = path
        if path.startswith("/v1/models/"):
            route = "/v1/models/{id}"
        elif path.startswith("/page/"):
            route = "/page/{name}"
        status = 500
        self.counters.in_flight += 1
        try:
            status = await self._dispatch(route, scope, receive, send)
        except ApiError as error:
            status = error.status
            # A request that was not read to its end cannot be followed by another on this connection.
            await http.send_error(send, error, close=self.draining or status in (408, 413))
        except http.Disconnected:
            status = 499  # as nginx counts clients that left
        except Exception as error:
            traceback.print_exc()
            text = f"{type(error).__name__}: this is a bug of lowbit; its log says more"
            await http.send_error(send, ApiError(500, text, code="internal_error"))
        finally:
            self.counters.in_flight -= 1
            known = route in self._routes or route in self._open
            self.counters.answered(route if known else "other", status)

    async def _dispatch(self, route: str, scope: Scope, receive: Receive, send: Send) -> int:
        tenant = ""
        methods = self._open.get(route)
        if methods is None:
            http.check_origin(scope)
            tenant = self._keys.tenant(http.header(scope, b"authorization"))
            methods = self._routes.get(route)
        if methods is None:
            raise ApiError(404, f"{route[:100]!r}: no such path; /openapi.json lists them", code="not_found")
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        handler = methods.get(method)
        if handler is None:
            allowed = ", ".join(methods)
            raise ApiError(405, f"{method}: not for {route}; use {allowed}", allow=allowed)
        return await handler(scope, receive, send, tenant)

    # Generating.

    async def _generate(
        self,
        kind: Any,
        make_job: Any,
        make_renderer: Any,
        scope: Scope,
        receive: Receive,
        send: Send,
        tenant: str,
    ) -> int:
        if self.draining:
            raise ApiError(
                503, "the server is shutting down; ask another one", code="shutting_down", retry_after=5.0
            )
        self._slots.take(tenant)
        try:
            request = await self._read(kind, scope, receive)
            model = self.model(request.model)
            model.engine.check()
            if len(self._keys) > 1 and (request.priority or 0) > 0:
                raise invalid(
                    f"priority={request.priority}: above 0 it would take from the other keys of this server; "
                    "choose 0 or less",
                    "priority",
                )
            generation = Generation(model, await make_job(request, model), tenant)
            return await self._answer(generation, make_renderer(generation), receive, send)
        finally:
            self._slots.give_back(tenant)

    async def _answer(self, generation: Generation, renderer: Any, receive: Receive, send: Send) -> int:
        generation.abort_connection = partial(http.abort_connection, send)
        watcher = asyncio.create_task(http.watch(receive, generation))
        try:
            generation.start()
            return await http.answer(generation, renderer, send)
        finally:
            watcher.cancel()
            generation.close()

    async def _read(self, kind: Any, scope: Scope, receive: Receive) -> Any:
        body = await http.read_body(scope, receive, self.limits.body_bytes, self.limits.body_seconds)
        return protocol.decode(kind, body)

    def model(self, name: str | None) -> ServedModel:
        """The model called `name`; without a name the only one."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise invalid(f"model: missing; choose one of {', '.join(self.models)}", "model", "missing_field")
        found = self.models.get(name)
        if found is None:
            raise ApiError(
                404,
                f"model={name[:100]!r}: not served here; choose one of {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return found

    async def tick(self) -> None:
        """Now and then: pings, time limits and clients that do not read."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            for model in self.models.values():
                for generation in list(model.generations):
                    self._watch_over(generation, now)

    def _watch_over(self, generation: Generation, now: float) -> None:
        limits = self.limits
        since = generation.writing_since
        if since is not None:
            waiting = sum(choice.waiting for choice in generation.choices)
            if now - since > limits.write_seconds or waiting > limits.waiting_pieces:
                generation.leave("slow_reader")
                generation.abort_connection()
            return
        if now - generation.arrived > limits.request_seconds:
            generation.fail(
                ApiError(
                    504,
                    f"the answer took more than {limits.request_seconds:g} s; ask for fewer tokens, or serve "
                    "with a larger --timeout",
                    code="timeout",
                )
            )
        elif now - generation.spoken > limits.ping_seconds:
            generation.spoken = now
            generation.ping = True
            generation.wake.set()

    # About models.

    async def _list_models(self, scope: Scope, receive: Receive, send: Send, tenant: str) -> int:
        models = [_describe(model) for model in self.models.values()]
        await http.send_json(send, {"object": "list", "data": models})
        return 200

    async def _one_model(self, scope: Scope, receive: Receive, send: Send, tenant: str) -> int:
        await http.send_json(send, _describe(self.model(scope["path"][len("/v1/models/") :])))
        return 200

    async def _tokenize(self, scope: Scope, receive: Receive, send: Send, tenant: str) -> int:
        request = await self._read(protocol.TokenizeRequest, scope, receive)
        model = self.model(request.model)
        if isinstance(request.prompt, str) == isinstance(request.messages, list):
            raise invalid("prompt, messages: give one of them", "prompt")
        if isinstance(request.prompt, str):
            ids = await model.encode(request.prompt, request.add_special_tokens)
        else:
            text = chat.render_messages(
                model, request.messages, add_generation_prompt=request.add_generation_prompt
            )
            ids = await model.encode(text, False, "messages")
        answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": model.context}
        if request.return_token_strs:
            answer["token_strs"] = [render.token_name(model, token) for token in ids]
        await http.send_json(send, answer)
        return 200

    async def _detokenize(self, scope: Scope, receive: Receive, send: Send, tenant: str) -> int:
        request = await self._read(protocol.DetokenizeRequest, scope, receive)
        model = self.model(request.model)
        if request.tokens:
            model.check_ids(request.tokens, "tokens")
        text = model.tokenizer.decode(request.tokens, skip_special=request.skip_special_tokens)
        await http.send_json(send, {"prompt": text})
        return 200

    # About the server.

    async def _page(self, scope: Scope, receive: Receive, send: Send, tenant: str) -> int:
        name = scope["path"].removeprefix("/").removeprefix("page/") or "index.html"
        known = http.header(scope, b"if-none-match")
        found = page_files.respond(name, None if known is None else known.decode("latin-1"))
        if found is None:
            raise ApiError(404, f"{name[:100]!r}: not a file of the page; open /", code="not_found")
        status, kind, headers, body = found
        await http.send_bytes(send, status, body, kind, headers)
        return status

    async def _openapi(self, scope: Scope, receive: Receive, send: Send, tenant: str) -> int:
        await http.send_json(send, document(self._version))
        return 200

    async def _health(self, scope: Scope, receive: Receive, send: Send, tenant: str) -> int:
        await http.send_json(send, {"status": "ok"})
        return 200

    async def _ready(self, scope: Scope, receive: Receive, send: Send, tenant: str) -> int:
        states = {name: model.engine.state for name, model in self.models.items()}
        for name, model in self.models.items():
            if states[name] == "ready" and not model.engine.ready:
                states[name] = f"silent for {model.engine.silent_seconds:.0f} s"
        ready = not self.draining and all(model.engine.ready for model in self.models.values())
        status = 200 if ready else 503
        await http.send_json(send, {"ready": ready, "draining": self.draining, "models": states}, status)
        return status

    def snapshot(self) -> stats.Stats:
        return stats.build(
            self.counters,
            [model.describe() for model in self.models.values()],
            {name: model.engine.stats for name, model in self.models.items()},
            version=self._version,
            draining=self.draining,
        )

    async def _stats(self, scope: Scope, receive: Receive, send: Send, tenant: str) -> int:
        await http.send_json(send, self.snapshot())
        return 200

    async def _metrics(self, scope: Scope, receive: Receive, send: Send, tenant: str) -> int:
        await http.send_bytes(send, 200, metrics.render(self.snapshot()), metrics.CONTENT_TYPE.encode())
        return 200


def _describe(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "lowbit",
        "max_model_len": model.context,
    }
