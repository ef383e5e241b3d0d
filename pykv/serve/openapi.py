"""The description of the endpoints at /openapi.json, for tools that make clients and requests.

What bodies may hold is not written here: a Protocol reads one body of each kind, and the fields
that it asks for, with their bounds, are the description. Source: OpenAPI 3.1.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

from pykv import __version__
from pykv.serve.fields import ApiError, Fields
from pykv.serve.protocol import Protocol

_HI = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hi"},
    {"role": "tool", "content": "Hi", "tool_call_id": "x"},
]


class _Post(NamedTuple):
    """A POST: the Protocol's method, bodies of which every field is asked for, what answers have,
    and the type of a stream's."""

    method: str
    bodies: list[dict[str, Any]]
    answer: str
    stream: str = ""


_COMPLETION = "id object created model choices usage"
_POSTS = {
    "/v1/chat/completions": _Post("chat", [{"messages": _HI}], _COMPLETION, "text/event-stream"),
    "/v1/completions": _Post("completions", [{"prompt": "Hi"}], _COMPLETION, "text/event-stream"),
    "/generate": _Post("generate", [{"prompt": "Hi"}], "output", "application/jsonl"),
    "/tokenize": _Post(
        "tokenize", [{"prompt": "Hi"}, {"messages": _HI}], "tokens count max_model_len"
    ),
    "/detokenize": _Post("detokenize", [{"tokens": [0]}], "prompt"),
}
_GETS = {
    "/v1/models": "object data",
    "/v1/models/{name}": "id object created owned_by",
    "/health": "status",
    "/openapi.json": "openapi info paths",
}


def describe(protocol: Protocol, *, has_key: bool) -> dict[str, Any]:
    """The endpoints but the page's, as an OpenAPI document.

    Args:
        protocol: reads the bodies.
        has_key: requests must carry a key.
    """
    paths: dict[str, Any] = {}
    for path, post in _POSTS.items():
        schemas = [_schema(protocol, post.method, body) for body in post.bodies]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        operation = _operation(path, _answers(post.answer, post.stream))
        operation["requestBody"] = {"required": True, "content": _json(schema)}
        paths[path] = {"post": operation}
    for path, answer in _GETS.items():
        paths[path] = {"get": _operation(path, _answers(answer))}
    paths["/metrics"] = {"get": _operation("/metrics", {"text/plain": {}})}
    parameter = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [parameter]
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "pykv serve", "version": __version__},
        "paths": paths,
    }
    if has_key:
        made["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        made["security"] = [{"key": []}]
        paths["/health"]["get"]["security"] = []
    return made


class _Listening(Protocol):
    """Remembers the fields of the body that was read last."""

    def __init__(self, protocol: Protocol) -> None:
        vars(self).update(vars(protocol))

    def _begin(self, body: dict[str, Any]) -> Fields:
        self.fields = super()._begin(body)
        return self.fields


def _schema(protocol: Protocol, method: str, body: dict[str, Any]) -> dict[str, Any]:
    """What a method asks for of a body; a model without a template refuses messages afterwards."""
    listening = _Listening(protocol)
    with suppress(ApiError):
        getattr(listening, method)(body)
    return listening.fields.schema()


def _operation(path: str, content: dict[str, Any]) -> dict[str, Any]:
    plain = path == "/generate"  # m40-llm's has the message alone
    error = _object("message type param code")
    refused = _json(_object("error", {"type": "string"} if plain else error))
    return {
        "operationId": path.strip("/").replace("/", "_").replace("{", "").replace("}", ""),
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {"description": "It is refused.", "content": refused},
        },
    }


def _answers(names: str, stream: str = "") -> dict[str, Any]:
    return _json(_object(names)) | ({stream: {}} if stream else {})


def _object(names: str, each: dict[str, Any] | None = None) -> dict[str, Any]:
    required = names.split()
    return {
        "type": "object",
        "properties": {name: each or {} for name in required},
        "required": required,
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
