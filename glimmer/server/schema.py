"""The server's description of itself, /openapi.json: what FastAPI knows of the routes, and what their bodies may hold.

The bodies are types of msgspec, which the routes read by themselves (exchange.py). Other APIs add theirs to BODIES.
"""

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from glimmer import __version__
from glimmer.server.anthropic_types import CountBody, MessagesBody
from glimmer.server.openai_types import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from glimmer.server.responses_types import ResponsesBody

BODIES: dict[str, type] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/v1/messages": MessagesBody,
    "/v1/responses": ResponsesBody,
    "/v1/responses/input_tokens": ResponsesBody,
    "/v1/messages/count_tokens": CountBody,
}
ERRORS = {
    "400": "the request cannot be served; the error names the field",
    "401": "no key, or a wrong one",
    "413": "the body is too long",
    "503": "no engine, or too much is waiting: ask again later",
}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI schema of an application."""
    schema: dict[str, Any] = get_openapi(title="glimmer", version=__version__, routes=app.routes)
    types = [BODIES[path] for path in schema["paths"] if path in BODIES]
    forms, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema.setdefault("components", {}).setdefault("schemas", {}).update(components)
    for path, form in zip((path for path in schema["paths"] if path in BODIES), forms):
        operation = schema["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": form}}}
    for methods in schema["paths"].values():
        for operation in methods.values():
            operation["responses"] |= {status: {"description": why} for status, why in ERRORS.items()}
    return schema
