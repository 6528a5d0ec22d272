"""The published schema, `GET /openapi.json`: made from the types that decode the requests."""

from __future__ import annotations

from typing import Any

import msgspec

from lowbit.server import protocol, responses_protocol

REQUESTS = {
    "/v1/completions": (protocol.CompletionRequest, "Continue a text."),
    "/v1/chat/completions": (protocol.ChatRequest, "Answer a conversation."),
    "/v1/responses": (responses_protocol.ResponsesRequest, "Answer a conversation, as items."),
    "/tokenize": (protocol.TokenizeRequest, "Token ids of a text or a conversation."),
    "/detokenize": (protocol.DetokenizeRequest, "The text of token ids."),
}
STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
READS = {
    "/v1/models": "The models that are served.",
    "/v1/models/{model}": "One of them.",
    "/stats": "Counters and gauges as JSON.",
    "/metrics": "The same for Prometheus.",
    "/health": "Whether the API process answers.",
    "/ready": "Whether every engine can take requests.",
}
ERRORS = {
    "400": "The request must be changed; the message says how.",
    "401": "The API key is missing or wrong.",
    "403": "A page of another site asks.",
    "404": "No such model or path.",
    "405": "No such method.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "429": "Too much is waiting; Retry-After says when to come back.",
    "500": "A bug of lowbit, or numbers that overflow.",
    "503": "The engine is starting or the server ends; Retry-After says when to come back.",
    "504": "The answer took too long.",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1."""
    kinds = [kind for kind, _ in REQUESTS.values()]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {}
    for (path, (_, text)), schema in zip(REQUESTS.items(), schemas):
        content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if path in STREAMED:
            content["text/event-stream"] = {"schema": {}}
        paths[path] = {
            "post": {
                "summary": text,
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": {"200": {"description": "The answer.", "content": content}, **_errors()},
            }
        }
    for path, text in READS.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        ok = {"description": text, "content": {kind: {"schema": {}}}}
        paths[path] = {"get": {"summary": text, "responses": {"200": ok, **_errors()}}}
    paths["/v1/models/{model}"]["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    # Not an error in the shape of the others: it says which engine is not ready.
    paths["/ready"]["get"]["responses"]["503"] = paths["/ready"]["get"]["responses"]["200"]
    return {
        "openapi": "3.1.0",
        "info": {"title": "lowbit", "version": version, "description": "OpenAI's API on this machine."},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": content} for status, text in ERRORS.items()}
