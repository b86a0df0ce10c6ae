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

REFERENCE = "#/components/schemas/{name}"
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
TEXTS = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
        {"type": "null"},
    ]
}
# What text/chat.py and text/tools.py read; it is they who say what is wrong with a message or a tool.
SHARED: dict[str, dict[str, Any]] = {
    "Call": {
        "type": "object",
        "properties": {
            "id": {"type": "string"},
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "arguments": {"type": "string", "description": "JSON"}},
                "required": ["name", "arguments"],
            },
        },
        "required": ["function"],
    },
    "Message": {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": TEXTS,
            "reasoning_content": {"type": "string", "description": "of the assistant; also called reasoning"},
            "tool_calls": {"type": "array", "items": {"$ref": REFERENCE.format(name="Call")}},
            "tool_call_id": {"type": "string"},
        },
        "required": ["role"],
    },
    "Tool": {
        "type": "object",
        "properties": {
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "description": {"type": "string"},
                    "parameters": {"type": "object", "description": "a JSON schema"},
                },
                "required": ["name"],
            },
        },
        "required": ["type", "function"],
    },
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
    forms, components = msgspec.json.schema_components(types, ref_template=REFERENCE)
    for name in ("ChatBody", "TokenizeBody"):
        _name_items(components[name]["properties"])
    schema.setdefault("components", {}).setdefault("schemas", {}).update(components | SHARED)
    for path, form in zip((path for path in schema["paths"] if path in BODIES), forms):
        operation = schema["paths"][path]["post"]
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": form}}}
    for methods in schema["paths"].values():
        for operation in methods.values():
            operation["responses"] |= {status: {"description": why} for status, why in ERRORS.items()}
    return schema


def _name_items(properties: dict[str, Any]) -> None:
    """Say what the lists of messages and tools hold, which are objects of any kind to msgspec."""
    for name, item in (("messages", "Message"), ("tools", "Tool")):
        for form in properties[name].get("anyOf", [properties[name]]):
            if form.get("type") == "array":
                form["items"] = {"$ref": REFERENCE.format(name=item)}
